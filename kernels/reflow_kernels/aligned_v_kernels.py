"""Triton kernels of :func:`reflow_kernels.aligned_v_loss`: tiles of partial sums, one launch that finishes the scalars,
one backward launch. v^ is built where it is used; neither v^ nor d = v^ - v is ever stored.

1 - cosine is taken without cancellation from one read of the operands. A tile keeps its residual |v^ - k v|^2 at its
own best k; residuals add up as sum_t (|v^ - k_t v|_t^2 + (k_t - k)^2 |v|_t^2), all positive, which is |v^|^2 sin^2
of the angle, and 1 - cos = sin^2 / (1 + cos). With floored norms
|v^/P - v/V|^2 = (|v^|/P - |v|/V)^2 + 2 |v^||v|/(PV) (1 - cos).
Rows with huge elements are scaled by a power of two, each of v^ and v on its own, so that no square overflows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch, layout, reference
from .tiles import accumulator, divide, load, square_root, store

SUMS = 8  # |v^|^2, |v|^2, v^.v, |v^ - k v|^2, |d|^2, sum d (v^ + v), max |v^|, max |v|
STATS = 6  # gradient coefficients of d, v^ and v, then the scales of d, v^ and v


@triton.jit
def _shrink(peak, ACC: tl.constexpr):
    """The scale of rows with this largest absolute value."""
    if ACC == tl.float32:
        return tl.where(peak < 1099511627776.0, 1.0, 3.2311742677852644e-27)  # 2^40, 2^-88
    else:
        return tl.where(peak < 2.5822498780869086e120, 1.0, 1.436424174966147e-188).to(ACC)  # 2^400, 2^-624


@triton.jit
def _slope(pv, vv, ACC: tl.constexpr):
    """k = v^.v / |v|^2, 0 where |v|^2 is too small to divide by."""
    usable = vv > (1e-30 if ACC == tl.float32 else 1e-280)
    return tl.where(usable, divide(pv, tl.where(usable, vv, 1.0), ACC), 0.0)  # rounded: 1 exactly where v^ = v


@triton.jit
def _velocity(output, sample, output_coef, sample_coef, o_output, o_sample, o_coef, s_coef, mask, ACC, EVEN):
    """v^ of a tile."""
    b_velocity = load(output, o_output, mask, ACC, EVEN)
    if sample is not None:
        b_sample = load(sample, o_sample, mask, ACC, EVEN)
        a = tl.load(sample_coef + s_coef).to(ACC)
        b = tl.load(output_coef + o_coef).to(ACC)
        b_velocity = a * b_sample + b * b_velocity
    return b_velocity


@triton.jit(do_not_specialize=["TILES", "PROGRAMS", "output_coef_stride", "sample_coef_stride"])
def _sums_kernel(
    output,  # [B, N]
    target,  # [B, N]
    sample,  # [B, N] or None, with its two coefficients
    output_coef,  # [B]
    sample_coef,  # [B]
    sums,  # [8, B * TILES]
    N,
    TILES,
    PROGRAMS,
    output_stride,
    target_stride,
    sample_stride,
    output_coef_stride,
    sample_coef_stride,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i_b = program // TILES
    o_n = (program % TILES) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_n = o_n < N
    b_velocity = _velocity(
        output, sample, output_coef, sample_coef, i_b * output_stride + o_n, i_b * sample_stride + o_n,
        i_b * output_coef_stride, i_b * sample_coef_stride, m_n, ACC, EVEN,
    )  # fmt: skip
    if not EVEN:
        b_velocity = tl.where(m_n, b_velocity, 0.0)
    b_target = load(target, i_b * target_stride + o_n, m_n, ACC, EVEN)

    peak = tl.max(tl.abs(b_velocity))
    target_peak = tl.max(tl.abs(b_target))
    scale = _shrink(peak, ACC)
    target_scale = _shrink(target_peak, ACC)
    common = tl.minimum(scale, target_scale)
    b_velocity *= scale
    b_target *= target_scale
    vv = tl.sum(b_target * b_target)
    pv = tl.sum(b_velocity * b_target)
    b_residual = b_velocity - _slope(pv, vv, ACC) * b_target
    b_difference = b_velocity * (common / scale) - b_target * (common / target_scale)
    b_total = b_velocity * (common / scale) + b_target * (common / target_scale)
    column = tl.cast(PROGRAMS, tl.int64)
    tl.store(sums + program, tl.sum(b_velocity * b_velocity))
    tl.store(sums + column + program, vv)
    tl.store(sums + 2 * column + program, pv)
    tl.store(sums + 3 * column + program, tl.sum(b_residual * b_residual))
    tl.store(sums + 4 * column + program, tl.sum(b_difference * b_difference))
    tl.store(sums + 5 * column + program, tl.sum(b_difference * b_total))
    tl.store(sums + 6 * column + program, peak)
    tl.store(sums + 7 * column + program, target_peak)


@triton.jit
def _places(o_b, m_b, TILES, i_c, CHUNK: tl.constexpr):
    """Offsets and mask [SAMPLES, CHUNK] of the tiles' sums of some samples."""
    o_t = i_c * CHUNK + tl.arange(0, CHUNK)
    return o_b[:, None] * TILES + o_t[None, :], m_b[:, None] & (o_t < TILES)[None, :]


@triton.jit
def _rescales(sums, programs, o_s, m_s, scale, target_scale, common, ACC: tl.constexpr):
    """Powers of two, at most 1, from the scales that tiles were summed in to those of their samples."""
    tile = _shrink(tl.load(sums + 6 * programs + o_s, mask=m_s, other=0.0), ACC)
    target_tile = _shrink(tl.load(sums + 7 * programs + o_s, mask=m_s, other=0.0), ACC)
    return scale[:, None] / tile, target_scale[:, None] / target_tile, common[:, None] / tl.minimum(tile, target_tile)


@triton.jit(do_not_specialize=["N", "TILES", "CHUNKS", "BATCH", "direction_weight_stride", "weight_stride"])
def _finish_kernel(
    sums,  # [8, B * TILES]
    direction_weight,  # [B]
    weight,  # [B] or None
    loss,  # []
    parts,  # [3, B]: mse, magnitude, cosine
    stats,  # [6, B]
    N,
    TILES,
    CHUNKS,  # no constant: the compiler would unroll the loops over them and run out of registers
    BATCH,
    direction_weight_stride,
    weight_stride,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROUNDS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    programs = tl.cast(BATCH, tl.int64) * TILES
    floor = EPS * square_root(tl.cast(N, ACC), ACC)
    b_loss = tl.zeros([SAMPLES], ACC)
    for i_r in range(ROUNDS):
        o_b = i_r * SAMPLES + tl.arange(0, SAMPLES).to(tl.int64)  # [SAMPLES]
        m_b = o_b < BATCH
        # Chunks of tiles are gathered side by side and reduced once: a reduction inside the loop does not compile.
        b_peak = tl.zeros([SAMPLES, CHUNK], ACC)
        b_target_peak = tl.zeros([SAMPLES, CHUNK], ACC)
        for i_c in range(CHUNKS):
            o_s, m_s = _places(o_b, m_b, TILES, i_c, CHUNK)
            b_peak = tl.maximum(b_peak, tl.load(sums + 6 * programs + o_s, mask=m_s, other=0.0))
            b_target_peak = tl.maximum(b_target_peak, tl.load(sums + 7 * programs + o_s, mask=m_s, other=0.0))
        peak = tl.max(b_peak, axis=1)
        target_peak = tl.max(b_target_peak, axis=1)
        scale = _shrink(peak, ACC)
        target_scale = _shrink(target_peak, ACC)
        common = tl.minimum(scale, target_scale)

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
        k = _slope(pv, vv, ACC)
        b_residual = tl.zeros([SAMPLES, CHUNK], ACC)
        for i_c in range(CHUNKS):
            o_s, m_s = _places(o_b, m_b, TILES, i_c, CHUNK)
            p, v, c = _rescales(sums, programs, o_s, m_s, scale, target_scale, common, ACC)
            b_pp = tl.load(sums + o_s, mask=m_s, other=0.0) * p * p
            b_vv = tl.load(sums + programs + o_s, mask=m_s, other=0.0) * v * v
            b_k = _slope(tl.load(sums + 2 * programs + o_s, mask=m_s, other=0.0) * p * v, b_vv, ACC)
            b_own = tl.load(sums + 3 * programs + o_s, mask=m_s, other=0.0) * p * p
            shift = (b_k - k[:, None]) * tl.sqrt(b_vv)
            b_residual += tl.where(b_k == 0.0, b_pp, b_own) + shift * shift
        residual = tl.sum(b_residual, axis=1)

        # Norms are those of the scaled rows; to_common brings them to the scale of d.
        to_common = common / scale
        target_to_common = common / target_scale
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

        sin2 = tl.minimum(residual / tl.where(pp > 0, pp, 1.0), 1.0)
        cos = pv / tl.where(pp > 0, p_norm, 1.0) / tl.where(vv > 0, v_norm, 1.0)
        turn = sin2 / (1.0 + tl.abs(cos))
        turn = tl.where(cos < 0, 2.0 - turn, turn)
        one_minus_cosine = difference * difference * 0.5 + p_length * v_length * turn

        inverse = 1.0 / common
        mse = (dd / N) * inverse * inverse
        magnitude = ((gap * gap) / N) * inverse * inverse
        b_weight = tl.zeros([SAMPLES], ACC) + 1.0
        if weight is not None:
            b_weight = tl.load(weight + o_b * weight_stride, mask=m_b, other=0.0).to(ACC)
        b_direction = tl.load(direction_weight + o_b * direction_weight_stride, mask=m_b, other=0.0).to(ACC)
        b_loss += tl.where(m_b, b_weight * (mse + b_direction * one_minus_cosine), 0.0)
        tl.store(parts + o_b, mse, mask=m_b)
        tl.store(parts + BATCH + o_b, magnitude, mask=m_b)
        tl.store(parts + 2 * BATCH + o_b, 1.0 - one_minus_cosine, mask=m_b)

        # Gradient to v^ = c_d d + c_p v^ + c_v v in scaled units. The cosine part is (u - (u . v^/P) v^/P) / P.
        b_weight = b_weight / BATCH
        cosine_weight = tl.where(target_peak > 0, b_weight * b_direction, 0.0) * scale / P
        along = tl.where(p_free, one_minus_cosine + (1.0 - v_length * v_length) * 0.5, 0.0)
        # Near in length, u = d / V + v^ (V - P) / (PV), which does not cancel; elsewhere v^/P - v/V does not.
        ratio = (P * to_common) / (V * target_to_common)
        near = (ratio > 0.5) & (ratio < 2.0)
        slope = -tl.where(p_free & v_free, gap / (V * target_to_common), ratio - 1.0)
        c_d = b_weight * 2.0 / N * inverse + tl.where(near, cosine_weight / (V * target_to_common), 0.0)
        c_p = cosine_weight * tl.where(near, slope - along, 1.0 - along) / P
        c_v = tl.where(near, 0.0, -cosine_weight / V)
        tl.store(stats + o_b, c_d, mask=m_b)
        tl.store(stats + BATCH + o_b, c_p, mask=m_b)
        tl.store(stats + 2 * BATCH + o_b, c_v, mask=m_b)
        tl.store(stats + 3 * BATCH + o_b, common, mask=m_b)
        tl.store(stats + 4 * BATCH + o_b, scale, mask=m_b)
        tl.store(stats + 5 * BATCH + o_b, target_scale, mask=m_b)
    tl.store(loss, tl.sum(b_loss) / BATCH)


@triton.jit(do_not_specialize=["TILES", "BATCH", "output_coef_stride", "sample_coef_stride"])
def _gradient_kernel(
    grad_loss,  # []
    output,  # [B, N]
    target,  # [B, N]
    sample,  # [B, N] or None, with its two coefficients
    output_coef,  # [B]
    sample_coef,  # [B]
    stats,  # [6, B]
    grad,  # [B, N]
    N,
    TILES,
    BATCH,
    output_stride,
    target_stride,
    sample_stride,
    output_coef_stride,
    sample_coef_stride,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i_b = program // TILES
    o_n = (program % TILES) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_n = o_n < N
    b_velocity = _velocity(
        output, sample, output_coef, sample_coef, i_b * output_stride + o_n, i_b * sample_stride + o_n,
        i_b * output_coef_stride, i_b * sample_coef_stride, m_n, ACC, EVEN,
    )  # fmt: skip
    b_target = load(target, i_b * target_stride + o_n, m_n, ACC, EVEN)
    column = tl.cast(BATCH, tl.int64)
    c_d = tl.load(stats + i_b)
    c_p = tl.load(stats + column + i_b)
    c_v = tl.load(stats + 2 * column + i_b)
    common = tl.load(stats + 3 * column + i_b)
    scale = tl.load(stats + 4 * column + i_b)
    target_scale = tl.load(stats + 5 * column + i_b)
    b_difference = b_velocity * common - b_target * common
    b_grad = c_d * b_difference + c_p * (b_velocity * scale) + c_v * (b_target * target_scale)
    factor = tl.load(grad_loss).to(ACC)
    if sample is not None:
        factor *= tl.load(output_coef + i_b * output_coef_stride).to(ACC)
    store(grad, i_b * N + o_n, factor * b_grad, m_n, EVEN)


def forward(
    model_output: Tensor,
    target: Tensor,
    direction_weight: Tensor,
    weight: Tensor | None,
    sample: Tensor | None,
    sample_coef: Tensor | None,
    output_coef: Tensor | None,
    eps: float,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], parts [3, B], stats [6, B]) in two launches."""
    dtype = reference.accumulate_dtype(model_output, target, sample)
    model_output, target, sample = _ordered(model_output, target, sample, strict)
    batch, size = model_output.shape[0], model_output[0].numel()
    blocks = launch.reduction(size, model_output, target, sample)
    sums = model_output.new_empty((SUMS, batch * blocks.tiles), dtype=dtype)
    loss = model_output.new_empty((), dtype=dtype)
    parts = model_output.new_empty((3, batch), dtype=dtype)
    stats = model_output.new_empty((STATS, batch), dtype=dtype)
    launch.start(
        _sums_kernel,
        batch * blocks.tiles,
        loss.device,
        blocks.warps,
        *(model_output, target, sample, output_coef, sample_coef, sums, size, blocks.tiles, sums.shape[1]),
        *_strides(model_output, target, sample, output_coef, sample_coef),
        ACC=accumulator(dtype),
        BLOCK=blocks.block,
        EVEN=blocks.even,
    )
    chunk = min(launch.power_of_two(blocks.tiles), launch.CHUNK)
    samples = min(launch.power_of_two(batch), launch.CHUNK // chunk)
    launch.start(
        _finish_kernel,
        1,
        loss.device,
        4 if blocks.tiles <= launch.CHUNK else 16,  # several reads keep more in registers
        *(sums, direction_weight, weight, loss, parts, stats, size, blocks.tiles, -(-blocks.tiles // chunk), batch),
        launch.stride(direction_weight),
        launch.stride(weight),
        EPS=eps,
        ACC=accumulator(dtype),
        SAMPLES=samples,
        ROUNDS=-(-batch // samples),
        CHUNK=chunk,
    )
    return loss, parts, stats


def backward(
    grad_loss: Tensor,
    model_output: Tensor,
    target: Tensor,
    sample: Tensor | None,
    sample_coef: Tensor | None,
    output_coef: Tensor | None,
    stats: Tensor,
    strict: bool,
) -> Tensor:
    """The gradient to model_output in one launch, in its dtype and sample order."""
    order = layout.leading_order(model_output)
    grad = layout.empty((model_output.shape[0],), model_output, order)
    model_output, target, sample = _ordered(model_output, target, sample, strict)
    batch, size = grad.shape[0], grad[0].numel()
    blocks = launch.elementwise(size)
    launch.start(
        _gradient_kernel,
        batch * blocks.tiles,
        grad.device,
        blocks.warps,
        *(grad_loss, model_output, target, sample, output_coef, sample_coef, stats, grad, size, blocks.tiles, batch),
        *_strides(model_output, target, sample, output_coef, sample_coef),
        ACC=accumulator(stats.dtype),
        BLOCK=blocks.block,
        EVEN=blocks.even,
    )
    return grad


def _ordered(
    model_output: Tensor, target: Tensor, sample: Tensor | None, strict: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    order = layout.leading_order(model_output)
    return (
        layout.in_order("aligned_v_loss", "model_output", model_output, order, strict),
        layout.in_order("aligned_v_loss", "target", target, order, strict),
        None if sample is None else layout.in_order("aligned_v_loss", "sample", sample, order, strict),
    )


def _strides(
    model_output: Tensor,
    target: Tensor,
    sample: Tensor | None,
    output_coef: Tensor | None,
    sample_coef: Tensor | None,
) -> tuple[int, ...]:
    return (
        model_output.stride(0),
        target.stride(0),
        launch.stride(sample),
        launch.stride(output_coef),
        launch.stride(sample_coef),
    )
