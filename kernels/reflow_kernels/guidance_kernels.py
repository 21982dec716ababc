"""Triton kernels of :func:`reflow_kernels.cfg_combine`.

Without rescale one elementwise launch. With it, one launch where a program holds a whole sample; larger samples take
two: moments of tiles, then every program merges its sample's moments in a fixed order and writes its tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, layout, reference
from .tiles import accumulator, divide, lerp, load, square_root, store

MOMENTS = 4

_VALUES = ["guidance_scale", "rescale"]  # [B]: read one by one, at any address


@triton.jit
def _moments(values, mask, count, ACC: tl.constexpr):
    """(mean, sum of squared deviations) of ``count`` values; two passes in registers, so nothing cancels."""
    mean = tl.sum(values) / count
    deviations = tl.where(mask, values - mean, 0.0)
    return mean, tl.sum(deviations * deviations)


@triton.jit
def _factor(cond_spread, guided_spread, rescale, ACC: tl.constexpr):
    """1 + rescale (std(cond) / std(guided) - 1) from sums of squared deviations; 1 where guided is constant."""
    ratio = divide(
        square_root(cond_spread, ACC), square_root(tl.where(guided_spread > 0, guided_spread, 1.0), ACC), ACC
    )
    return 1.0 + rescale * (tl.where(guided_spread > 0, ratio, 1.0) - 1.0)


@triton.jit(
    do_not_specialize=["TILES", "BATCH", "guidance_scale_stride", "rescale_stride"],
    do_not_specialize_on_alignment=_VALUES,
)
def _combine_kernel(
    output,  # [2B, N]
    guidance_scale,  # [B]
    rescale,  # [B], None for no rescale; a program then holds the whole sample
    guided,  # [B, N]
    N,
    TILES,
    BATCH,
    output_stride,
    guidance_scale_stride,
    rescale_stride,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i_b = program // TILES
    o_n = (program % TILES) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_n = o_n < N
    b_cond = load(output, (i_b + BATCH) * output_stride + o_n, m_n, ACC, EVEN)
    if rescale is not None:
        _, cond_spread = _moments(b_cond, m_n, N, ACC)  # before the next load: three tiles at once would not fit
    b_uncond = load(output, i_b * output_stride + o_n, m_n, ACC, EVEN)
    b_guided = lerp(b_uncond, b_cond, tl.load(guidance_scale + i_b * guidance_scale_stride).to(ACC))
    if rescale is not None:
        _, guided_spread = _moments(b_guided, m_n, N, ACC)
        b_guided *= _factor(cond_spread, guided_spread, tl.load(rescale + i_b * rescale_stride).to(ACC), ACC)
    store(guided, i_b * N + o_n, b_guided, m_n, EVEN)


@triton.jit(
    do_not_specialize=["TILES", "BATCH", "guidance_scale_stride"], do_not_specialize_on_alignment=["guidance_scale"]
)
def _moments_kernel(
    output,  # [2B, N]
    guidance_scale,  # [B]
    moments,  # [4, B * TILES]
    N,
    TILES,
    BATCH,
    output_stride,
    guidance_scale_stride,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i_b = program // TILES
    o_n = (program % TILES) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_n = o_n < N
    b_uncond = load(output, i_b * output_stride + o_n, m_n, ACC, EVEN)
    b_cond = load(output, (i_b + BATCH) * output_stride + o_n, m_n, ACC, EVEN)
    b_guided = lerp(b_uncond, b_cond, tl.load(guidance_scale + i_b * guidance_scale_stride).to(ACC))
    count = tl.minimum(N - (program % TILES) * BLOCK, BLOCK)
    cond_mean, cond_spread = _moments(b_cond, m_n, count, ACC)
    guided_mean, guided_spread = _moments(b_guided, m_n, count, ACC)
    column = tl.cast(BATCH, tl.int64) * TILES
    tl.store(moments + program, cond_mean)
    tl.store(moments + column + program, cond_spread)
    tl.store(moments + 2 * column + program, guided_mean)
    tl.store(moments + 3 * column + program, guided_spread)


@triton.jit
def _merge(
    moments, column, first, N, TILES, TILE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ACC: tl.constexpr
):
    """The sum of squared deviations of a whole sample from the moments of its tiles, in a fixed order."""
    total = tl.zeros([CHUNK], ACC)
    for i_c in range(CHUNKS):
        o_t = i_c * CHUNK + tl.arange(0, CHUNK)
        m_t = o_t < TILES
        counts = tl.minimum(N - o_t.to(tl.int64) * TILE, TILE).to(ACC)
        total += tl.where(m_t, counts * tl.load(moments + first + o_t, mask=m_t, other=0.0), 0.0)
    mean = tl.sum(total) / N
    spread = tl.zeros([CHUNK], ACC)
    for i_c in range(CHUNKS):
        o_t = i_c * CHUNK + tl.arange(0, CHUNK)
        m_t = o_t < TILES
        counts = tl.minimum(N - o_t.to(tl.int64) * TILE, TILE).to(ACC)
        shift = tl.load(moments + first + o_t, mask=m_t, other=0.0) - mean
        inner = tl.load(moments + column + first + o_t, mask=m_t, other=0.0)
        spread += tl.where(m_t, inner + counts * shift * shift, 0.0)
    return tl.sum(spread)


@triton.jit(
    do_not_specialize=["TILES", "SUMS", "BATCH", "guidance_scale_stride", "rescale_stride"],
    do_not_specialize_on_alignment=_VALUES,
)
def _rescale_kernel(
    output,  # [2B, N]
    guidance_scale,  # [B]
    rescale,  # [B]
    moments,  # [4, B * SUMS]
    guided,  # [B, N]
    N,
    TILES,
    SUMS,
    BATCH,
    output_stride,
    guidance_scale_stride,
    rescale_stride,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i_b = program // TILES
    o_n = (program % TILES) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_n = o_n < N
    column = tl.cast(BATCH, tl.int64) * SUMS
    cond_spread = _merge(moments, column, i_b * SUMS, N, SUMS, TILE, CHUNK, CHUNKS, ACC)
    guided_spread = _merge(moments + 2 * column, column, i_b * SUMS, N, SUMS, TILE, CHUNK, CHUNKS, ACC)
    b_uncond = load(output, i_b * output_stride + o_n, m_n, ACC, EVEN)
    b_cond = load(output, (i_b + BATCH) * output_stride + o_n, m_n, ACC, EVEN)
    b_guided = lerp(b_uncond, b_cond, tl.load(guidance_scale + i_b * guidance_scale_stride).to(ACC))
    b_guided *= _factor(cond_spread, guided_spread, tl.load(rescale + i_b * rescale_stride).to(ACC), ACC)
    store(guided, i_b * N + o_n, b_guided, m_n, EVEN)


class Kept:
    """The launches of one signature of calls, prepared for tensors like these; all share one sample order."""

    def __init__(self, model_output: Tensor, guidance_scale: Tensor, rescale: Tensor | None, guided: Tensor):
        batch, size = guided.shape[0], guided[0].numel()
        self.dtype = reference.accumulate_dtype(guided)
        acc = accumulator(self.dtype)
        sums = launch.reduction(size, model_output)
        whole = rescale is not None and sums.tiles == 1
        blocks = sums if whole else launch.elementwise(size)
        strides = (model_output.stride(0), launch.stride(guidance_scale))
        self.moments: launch.Launch | None = None
        if rescale is None or whole:
            self.last = launch.Launch(
                _combine_kernel,
                batch * blocks.tiles,
                blocks.warps,
                (size, blocks.tiles, batch, *strides, launch.stride(rescale)),
                ACC=acc,
                BLOCK=blocks.block,
                EVEN=blocks.even,
            )
            return
        self.moments = launch.Launch(
            _moments_kernel,
            batch * sums.tiles,
            sums.warps,
            (size, sums.tiles, batch, *strides),
            ACC=acc,
            BLOCK=sums.block,
            EVEN=sums.even,
        )
        chunk = min(launch.power_of_two(sums.tiles), launch.CHUNK)
        self.last = launch.Launch(
            _rescale_kernel,
            batch * blocks.tiles,
            blocks.warps,
            (size, blocks.tiles, sums.tiles, batch, *strides, launch.stride(rescale)),
            ACC=acc,
            BLOCK=blocks.block,
            EVEN=blocks.even,
            TILE=sums.block,
            CHUNK=chunk,
            CHUNKS=-(-sums.tiles // chunk),
        )

    def combine(self, model_output: Tensor, guidance_scale: Tensor, rescale: Tensor | None, guided: Tensor) -> None:
        if self.moments is None:
            launch.start(self.last, model_output, guidance_scale, rescale, guided)
            return
        moments = torch.empty((MOMENTS, self.moments.programs), dtype=self.dtype, device=guided.device)
        launch.start(self.moments, model_output, guidance_scale, moments)
        launch.start(self.last, model_output, guidance_scale, rescale, moments, guided)


def combine(model_output: Tensor, guidance_scale: Tensor, rescale: Tensor | None, guided: Tensor, strict: bool) -> None:
    """Writes ``guided``, which has model_output's sample order where that is dense."""
    model_output = layout.in_order("cfg_combine", "model_output", model_output, layout.leading_order(guided), strict)
    tensors = (model_output, guidance_scale, rescale, guided)
    Kept(*tensors).combine(*tensors)
