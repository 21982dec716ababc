"""The one launch between the loss' tiles and its gradient: scalars of every sample from the partial sums of its tiles.

1 - cosine is taken without cancellation from one read of the operands. A tile keeps its residual |v^ - k v|^2 at its
own best k; residuals add up as sum_t (|v^ - k_t v|_t^2 + (k_t - k)^2 |v|_t^2), all positive, which is |v^|^2 sin^2
of the angle, and 1 - cos = sin^2 / (1 + cos). With floored norms
|v^/P - v/V|^2 = (|v^|/P - |v|/V)^2 + 2 |v^||v|/(PV) (1 - cos).
Rows with huge elements are scaled by a power of two, each of v^ and v on its own, so that no square overflows.
The gradient's coefficients are derived in ``kernels/README.md``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch
from .tiles import accumulator, divide, square_root

SAMPLES = 128  # a program finishes at most; fewer of samples of several tiles
COLUMN = 1024  # partial losses that the last program reads at a time


@triton.jit
def shrink(peak, ACC: tl.constexpr):
    """The scale of rows with this largest absolute value."""
    if ACC == tl.float32:
        return tl.where(peak < 1099511627776.0, 1.0, 3.2311742677852644e-27)  # 2^40, 2^-88
    else:
        return tl.where(peak < 2.5822498780869086e120, 1.0, 1.436424174966147e-188).to(ACC)  # 2^400, 2^-624


@triton.jit
def slope(pv, vv, ACC: tl.constexpr):
    """k = v^.v / |v|^2, 0 where |v|^2 is too small to divide by."""
    usable = vv > (1e-30 if ACC == tl.float32 else 1e-280)
    return tl.where(usable, divide(pv, tl.where(usable, vv, 1.0), ACC), 0.0)  # rounded: 1 exactly where v^ = v


@triton.jit
def _places(o_b, m_b, TILES, i_c, CHUNK: tl.constexpr):
    """Offsets and mask [SAMPLES, CHUNK] of the tiles' sums of some samples."""
    o_t = i_c * CHUNK + tl.arange(0, CHUNK)
    return o_b[:, None] * TILES + o_t[None, :], m_b[:, None] & (o_t < TILES)[None, :]


@triton.jit
def _rescales(sums, programs, o_s, m_s, scale, target_scale, common, ACC: tl.constexpr):
    """Powers of two, at most 1, from the scales that tiles were summed in to those of their samples."""
    tile = shrink(tl.load(sums + 6 * programs + o_s, mask=m_s, other=0.0), ACC)
    target_tile = shrink(tl.load(sums + 7 * programs + o_s, mask=m_s, other=0.0), ACC)
    return scale[:, None] / tile, target_scale[:, None] / target_tile, common[:, None] / tl.minimum(tile, target_tile)


@triton.jit
def _scales(sums, programs, o_b, m_b, TILES, CHUNKS, ACC: tl.constexpr, SAMPLES: tl.constexpr, CHUNK: tl.constexpr):
    """Scales [SAMPLES] of v^, of v and of d from the largest elements, and which targets are not all 0."""
    # Chunks of tiles are gathered side by side and reduced once: a reduction inside the loop does not compile.
    b_peak = tl.zeros([SAMPLES, CHUNK], ACC)
    b_target_peak = tl.zeros([SAMPLES, CHUNK], ACC)
    for i_c in range(CHUNKS):
        o_s, m_s = _places(o_b, m_b, TILES, i_c, CHUNK)
        b_peak = tl.maximum(b_peak, tl.load(sums + 6 * programs + o_s, mask=m_s, other=0.0))
        b_target_peak = tl.maximum(b_target_peak, tl.load(sums + 7 * programs + o_s, mask=m_s, other=0.0))
    target_peak = tl.max(b_target_peak, axis=1)
    scale = shrink(tl.max(b_peak, axis=1), ACC)
    target_scale = shrink(target_peak, ACC)
    return scale, target_scale, tl.minimum(scale, target_scale), target_peak > 0


@triton.jit
def _merged(
    sums, programs, o_b, m_b, TILES, CHUNKS, scale, target_scale, common,
    ACC: tl.constexpr, SAMPLES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """|v^|^2, |v|^2, v^.v, |d|^2, sum d (v^ + v) and |v^ - k v|^2 [SAMPLES] of whole samples, in their scales."""
    b_pp = tl.zeros([SAMPLES, CHUNK], ACC)
    b_vv = tl.zeros([SAMPLES, CHUNK], ACC)
    b_pv = tl.zeros([SAMPLES, CHUNK], ACC)
    b_dd = tl.zeros([SAMPLES, CHUNK], ACC)
    b_ds = tl.zeros([SAMPLES, CHUNK], ACC)
    for i_c in range(CHUNKS):
        o_s, m_s = _places(o_b, m_b, TILES, i_c, CHUNK)
        p, v, c = _rescales(sums, programs, o_s, m_s, scale, target_scale, common, ACC)
        b_pp += tl.load(sums + o_s, mask=m_s, other=0.0) * p * p
        b_vv += tl.load(sums + programs + o_s, mask=m_s, other=0.0) * v * v
        b_pv += tl.load(sums + 2 * programs + o_s, mask=m_s, other=0.0) * p * v
        b_dd += tl.load(sums + 4 * programs + o_s, mask=m_s, other=0.0) * c * c
        b_ds += tl.load(sums + 5 * programs + o_s, mask=m_s, other=0.0) * c * c
    pp = tl.sum(b_pp, axis=1)
    vv = tl.sum(b_vv, axis=1)
    pv = tl.sum(b_pv, axis=1)
    dd = tl.sum(b_dd, axis=1)
    ds = tl.sum(b_ds, axis=1)
    k = slope(pv, vv, ACC)
    b_residual = tl.zeros([SAMPLES, CHUNK], ACC)
    for i_c in range(CHUNKS):
        o_s, m_s = _places(o_b, m_b, TILES, i_c, CHUNK)
        p, v, c = _rescales(sums, programs, o_s, m_s, scale, target_scale, common, ACC)
        b_pp = tl.load(sums + o_s, mask=m_s, other=0.0) * p * p
        b_vv = tl.load(sums + programs + o_s, mask=m_s, other=0.0) * v * v
        b_k = slope(tl.load(sums + 2 * programs + o_s, mask=m_s, other=0.0) * p * v, b_vv, ACC)
        b_own = tl.load(sums + 3 * programs + o_s, mask=m_s, other=0.0) * p * p
        shift = (b_k - k[:, None]) * tl.sqrt(b_vv)
        b_residual += tl.where(b_k == 0.0, b_pp, b_own) + shift * shift
    return pp, vv, pv, dd, ds, tl.sum(b_residual, axis=1)


@triton.jit
def _one_minus_cosine(pp, vv, pv, residual, p_norm, v_norm, p_length, v_length, difference):
    """|v^/P - v/V|^2 / 2 from the difference of the floored lengths and the angle, each taken without cancellation."""
    sin2 = tl.minimum(residual / tl.where(pp > 0, pp, 1.0), 1.0)
    cos = pv / tl.where(pp > 0, p_norm, 1.0) / tl.where(vv > 0, v_norm, 1.0)
    turn = sin2 / (1.0 + tl.abs(cos))
    turn = tl.where(cos < 0, 2.0 - turn, turn)
    return difference * difference * 0.5 + p_length * v_length * turn


@triton.jit
def _gradient(cosine_weight, one_minus_cosine, gap, P, V, p_free, v_free, v_length, to_common, target_to_common):
    """Coefficients of d, v^ and v in the gradient of the cosine part, in scaled units; see ``kernels/README.md``."""
    along = tl.where(p_free, one_minus_cosine + (1.0 - v_length * v_length) * 0.5, 0.0)
    # Near in length, u = d / V + v^ (V - P) / (PV), which does not cancel; elsewhere v^/P - v/V does not.
    ratio = (P * to_common) / (V * target_to_common)
    near = (ratio > 0.5) & (ratio < 2.0)
    lean = -tl.where(p_free & v_free, gap / (V * target_to_common), ratio - 1.0)
    c_d = tl.where(near, cosine_weight / (V * target_to_common), 0.0)
    c_p = cosine_weight * tl.where(near, lean - along, 1.0 - along) / P
    c_v = tl.where(near, 0.0, -cosine_weight / V)
    return c_d, c_p, c_v


@triton.jit(
    do_not_specialize=["N", "TILES", "CHUNKS", "BATCH", "direction_weight_stride", "weight_stride"],
    do_not_specialize_on_alignment=["sums", "direction_weight", "weight", "losses", "parts", "stats"],
)
def _finish_kernel(
    sums,  # [8, B * TILES]
    direction_weight,  # [B]
    weight,  # [B] or None
    losses,  # [programs], which add up to the loss
    parts,  # [3, B]: mse, magnitude, cosine
    stats,  # [6, B]
    N,  # elements a sample
    TILES,  # tiles a sample
    CHUNKS,  # reads of CHUNK tiles; no constant: the compiler would unroll the loops and run out of registers
    BATCH,
    direction_weight_stride,  # elements, as all strides
    weight_stride,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    programs = tl.cast(BATCH, tl.int64) * TILES
    o_b = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)  # [SAMPLES]
    m_b = o_b < BATCH
    scale, target_scale, common, aimed = _scales(sums, programs, o_b, m_b, TILES, CHUNKS, ACC, SAMPLES, CHUNK)
    pp, vv, pv, dd, ds, residual = _merged(
        sums, programs, o_b, m_b, TILES, CHUNKS, scale, target_scale, common, ACC, SAMPLES, CHUNK
    )

    # Norms are those of the scaled rows; to_common brings them to the scale of d.
    to_common = common / scale
    target_to_common = common / target_scale
    floor = EPS * square_root(tl.cast(N, ACC), ACC)
    p_norm = square_root(pp, ACC)
    v_norm = square_root(vv, ACC)
    p_free = p_norm > floor * scale
    v_free = v_norm > floor * target_scale
    P = tl.where(p_free, p_norm, floor * scale)
    V = tl.where(v_free, v_norm, floor * target_scale)
    total = p_norm * to_common + v_norm * target_to_common
    gap = divide(ds, tl.where(total > 0, total, 1.0), ACC)  # |v^| - |v|
    p_length = tl.where(p_free, 1.0, p_norm / P)
    v_length = tl.where(v_free, 1.0, v_norm / V)
    difference = tl.where(p_free | v_free, p_length - v_length, gap / (P * to_common))
    one_minus_cosine = _one_minus_cosine(pp, vv, pv, residual, p_norm, v_norm, p_length, v_length, difference)

    inverse = 1.0 / common
    mse = (dd / N) * inverse * inverse
    magnitude = ((gap * gap) / N) * inverse * inverse
    b_weight = tl.zeros([SAMPLES], ACC) + 1.0
    if weight is not None:
        b_weight = tl.load(weight + o_b * weight_stride, mask=m_b, other=0.0).to(ACC)
    b_direction = tl.load(direction_weight + o_b * direction_weight_stride, mask=m_b, other=0.0).to(ACC)
    b_loss = tl.where(m_b, b_weight * (mse + b_direction * one_minus_cosine), 0.0)
    tl.store(losses + tl.program_id(0), tl.sum(b_loss) / BATCH)
    tl.store(parts + o_b, mse, mask=m_b)
    tl.store(parts + BATCH + o_b, magnitude, mask=m_b)
    tl.store(parts + 2 * BATCH + o_b, 1.0 - one_minus_cosine, mask=m_b)

    b_weight = b_weight / BATCH
    cosine_weight = tl.where(aimed, b_weight * b_direction, 0.0) * scale / P
    c_d, c_p, c_v = _gradient(
        cosine_weight, one_minus_cosine, gap, P, V, p_free, v_free, v_length, to_common, target_to_common
    )
    tl.store(stats + o_b, b_weight * 2.0 / N * inverse + c_d, mask=m_b)
    tl.store(stats + BATCH + o_b, c_p, mask=m_b)
    tl.store(stats + 2 * BATCH + o_b, c_v, mask=m_b)
    tl.store(stats + 3 * BATCH + o_b, common, mask=m_b)
    tl.store(stats + 4 * BATCH + o_b, scale, mask=m_b)
    tl.store(stats + 5 * BATCH + o_b, target_scale, mask=m_b)


@triton.jit(do_not_specialize=["COUNT"], do_not_specialize_on_alignment=["losses", "loss"])
def _sum_kernel(
    losses,  # [COUNT]
    loss,  # []
    COUNT,
    ACC: tl.constexpr,
    COLUMN: tl.constexpr,
):
    b_loss = tl.zeros([COLUMN], ACC)
    for start in range(0, COUNT, COLUMN):
        o_p = start + tl.arange(0, COLUMN)
        b_loss += tl.load(losses + o_p, mask=o_p < COUNT, other=0.0)
    tl.store(loss, tl.sum(b_loss))


def finish_launch(
    size: int, tiles: int, batch: int, strides: tuple[int, int], eps: float, dtype: torch.dtype
) -> launch.Launch:
    """One program for up to 128 samples; the batch is in no constant, so that no size of it compiles anew."""
    most = launch.CHUNK // 4  # partial sums of a kind that registers hold
    chunk = min(launch.power_of_two(tiles), most)
    samples = min(SAMPLES, most // chunk)
    return launch.Launch(
        _finish_kernel,
        -(-batch // samples),
        16 if tiles > chunk else 4,  # several reads keep more in registers
        (size, tiles, -(-tiles // chunk), batch, *strides),
        EPS=eps,
        ACC=accumulator(dtype),
        SAMPLES=samples,
        CHUNK=chunk,
    )


def sum_launch(count: int, dtype: torch.dtype) -> launch.Launch:
    """The loss from the parts of several finishing programs, in a fixed order."""
    return launch.Launch(_sum_kernel, 1, 4, (count,), ACC=accumulator(dtype), COLUMN=COLUMN)
