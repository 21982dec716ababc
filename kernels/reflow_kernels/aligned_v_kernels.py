"""Triton kernels of :func:`reflow_kernels.aligned_v_loss`: tiles of partial sums, one launch that finishes the scalars
(:mod:`.aligned_v_finish_kernels`), one backward launch. v^ is built where it is used; neither v^ nor d = v^ - v is ever
stored.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch, layout, reference
from .aligned_v_finish_kernels import finish_launch, shrink, slope, sum_launch
from .tiles import accumulator, load, store

SUMS = 8  # |v^|^2, |v|^2, v^.v, |v^ - k v|^2, |d|^2, sum d (v^ + v), max |v^|, max |v|
STATS = 6  # gradient coefficients of d, v^ and v, then the scales of d, v^ and v

_COEFS = ["output_coef", "sample_coef"]  # [B]: read one by one, at any address


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


@triton.jit(
    do_not_specialize=["TILES", "PROGRAMS", "output_coef_stride", "sample_coef_stride"],
    do_not_specialize_on_alignment=_COEFS,
)
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
    scale = shrink(peak, ACC)
    target_scale = shrink(target_peak, ACC)
    common = tl.minimum(scale, target_scale)
    b_velocity *= scale
    b_target *= target_scale
    # Each value is summed where it is built: kept for later, they would not fit the registers.
    column = tl.cast(PROGRAMS, tl.int64)
    tl.store(sums + program, tl.sum(b_velocity * b_velocity))
    vv = tl.sum(b_target * b_target)
    tl.store(sums + column + program, vv)
    pv = tl.sum(b_velocity * b_target)
    tl.store(sums + 2 * column + program, pv)
    b_residual = b_velocity - slope(pv, vv, ACC) * b_target
    tl.store(sums + 3 * column + program, tl.sum(b_residual * b_residual))
    b_velocity *= common / scale
    b_target *= common / target_scale
    b_difference = b_velocity - b_target
    tl.store(sums + 4 * column + program, tl.sum(b_difference * b_difference))
    tl.store(sums + 5 * column + program, tl.sum(b_difference * (b_velocity + b_target)))
    tl.store(sums + 6 * column + program, peak)
    tl.store(sums + 7 * column + program, target_peak)


@triton.jit(
    do_not_specialize=["TILES", "BATCH", "output_coef_stride", "sample_coef_stride"],
    do_not_specialize_on_alignment=[*_COEFS, "grad_loss", "stats"],
)
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


class Kept:
    """The launches of one signature of calls, whose operands share one sample order, prepared at the first call."""

    def __init__(self) -> None:
        self.forwards: tuple[launch.Launch, launch.Launch, launch.Launch | None] | None = None
        self.gradient: launch.Launch | None = None

    def forward(
        self,
        model_output: Tensor,
        target: Tensor,
        direction_weight: Tensor,
        weight: Tensor | None,
        sample: Tensor | None,
        sample_coef: Tensor | None,
        output_coef: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss [], parts [3, B], stats [6, B]) in two launches, three where one program cannot finish all samples."""
        batch = model_output.shape[0]
        if self.forwards is None:
            strides = (launch.stride(direction_weight), launch.stride(weight))
            self.forwards = self._prepared(model_output, target, sample, sample_coef, output_coef, strides, eps)
        partial, finish, total = self.forwards
        sums = model_output.new_empty((SUMS, partial.programs), dtype=self.dtype)
        loss = sums.new_empty(())
        parts = sums.new_empty((3, batch))
        stats = sums.new_empty((STATS, batch))
        losses = loss if total is None else sums.new_empty((finish.programs,))
        launch.start(partial, model_output, target, sample, output_coef, sample_coef, sums)
        launch.start(finish, sums, direction_weight, weight, losses, parts, stats)
        if total is not None:
            launch.start(total, losses, loss)
        return loss, parts, stats

    def _prepared(
        self,
        model_output: Tensor,
        target: Tensor,
        sample: Tensor | None,
        sample_coef: Tensor | None,
        output_coef: Tensor | None,
        weight_strides: tuple[int, int],
        eps: float,
    ) -> tuple[launch.Launch, launch.Launch, launch.Launch | None]:
        self.dtype = reference.accumulate_dtype(model_output, target, sample)
        batch, size = model_output.shape[0], model_output[0].numel()
        blocks = launch.reduction(size, model_output, target, sample)
        partial = launch.Launch(
            _sums_kernel,
            batch * blocks.tiles,
            blocks.warps,
            (
                size,
                blocks.tiles,
                batch * blocks.tiles,
                *_strides(model_output, target, sample, output_coef, sample_coef),
            ),
            ACC=accumulator(self.dtype),
            BLOCK=blocks.block,
            EVEN=blocks.even,
        )
        finish = finish_launch(size, blocks.tiles, batch, weight_strides, eps, self.dtype)
        return partial, finish, sum_launch(finish.programs, self.dtype) if finish.programs > 1 else None

    def backward(
        self,
        grad_loss: Tensor,
        model_output: Tensor,
        target: Tensor,
        direction_weight: Tensor,
        weight: Tensor | None,
        sample: Tensor | None,
        sample_coef: Tensor | None,
        output_coef: Tensor | None,
        stats: Tensor,
    ) -> Tensor:
        """The gradient to model_output in one launch, in its dtype and sample order."""
        if self.gradient is None:
            order = layout.leading_order(model_output)
            self.room = layout.Room(model_output.shape[:1], model_output, order)
            batch, size = model_output.shape[0], model_output[0].numel()
            blocks = launch.elementwise(size)
            self.gradient = launch.Launch(
                _gradient_kernel,
                batch * blocks.tiles,
                blocks.warps,
                (size, blocks.tiles, batch, *_strides(model_output, target, sample, output_coef, sample_coef)),
                ACC=accumulator(stats.dtype),
                BLOCK=blocks.block,
                EVEN=blocks.even,
            )
        grad = self.room.empty()
        launch.start(self.gradient, grad_loss, model_output, target, sample, output_coef, sample_coef, stats, grad)
        return grad


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
    """One call in whatever orders: (loss [], parts [3, B], stats [6, B])."""
    model_output, target, sample = _ordered(model_output, target, sample, strict)
    return Kept().forward(model_output, target, direction_weight, weight, sample, sample_coef, output_coef, eps)


def backward(
    grad_loss: Tensor,
    model_output: Tensor,
    target: Tensor,
    direction_weight: Tensor,
    weight: Tensor | None,
    sample: Tensor | None,
    sample_coef: Tensor | None,
    output_coef: Tensor | None,
    stats: Tensor,
    strict: bool,
) -> Tensor:
    """The gradient of one such call."""
    model_output, target, sample = _ordered(model_output, target, sample, strict)
    return Kept().backward(
        grad_loss, model_output, target, direction_weight, weight, sample, sample_coef, output_coef, stats
    )


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
