"""Triton kernel of :func:`reflow_kernels.window_chord`: both ends are read once for all points of a chord."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch, layout
from .tiles import accumulator, divide, lerp, load, store

_COUNTS = ["TILES", "BATCH", "tau_point_stride", "tau_stride", "dt_stride"]


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=["tau", "dt"])
def _chord_kernel(
    z_start,  # [B, N]
    z_end,  # [B, N]
    tau,  # [M, B]
    dt,  # [B]
    z_t,  # [M, B, N]
    velocity,  # [B, N]
    model_input,  # [M, B, N]
    N,
    TILES,
    BATCH,
    start_stride,
    end_stride,
    tau_point_stride,
    tau_stride,
    dt_stride,
    ACC: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i_b = program // TILES
    o_n = (program % TILES) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_n = o_n < N

    b_start = load(z_start, i_b * start_stride + o_n, m_n, ACC, EVEN)
    b_end = load(z_end, i_b * end_stride + o_n, m_n, ACC, EVEN)
    b_dt = tl.zeros([BLOCK], ACC) + tl.load(dt + i_b * dt_stride).to(ACC)
    store(velocity, i_b * N + o_n, divide(b_end - b_start, b_dt, ACC), m_n, EVEN)
    for i_m in range(POINTS):
        b_point = lerp(b_start, b_end, tl.load(tau + i_m * tau_point_stride + i_b * tau_stride).to(ACC))
        o_point = (i_m * BATCH + i_b) * N + o_n
        store(z_t, o_point, b_point, m_n, EVEN)
        store(model_input, o_point, b_point, m_n, EVEN)


def prepare(
    z_start: Tensor, z_end: Tensor, tau: Tensor, dt: Tensor, z_t: Tensor, velocity: Tensor, model_input: Tensor
) -> launch.Launch:
    """The launch for these seven tensors and others like them; all share one sample order."""
    batch, size = velocity.shape[0], velocity[0].numel()
    blocks = launch.elementwise(size)
    several = tau.dim() == 2
    return launch.Launch(
        _chord_kernel,
        batch * blocks.tiles,
        blocks.warps,
        (
            *(size, blocks.tiles, batch, z_start.stride(0), z_end.stride(0)),
            *(tau.stride(0) if several else 0, tau.stride(-1), launch.stride(dt)),
        ),
        ACC=accumulator(z_start.dtype),
        POINTS=tau.shape[0] if several else 1,
        BLOCK=blocks.block,
        EVEN=blocks.even,
    )


def chord(
    z_start: Tensor,
    z_end: Tensor,
    tau: Tensor,
    dt: Tensor,
    z_t: Tensor,
    velocity: Tensor,
    model_input: Tensor,
    strict: bool,
) -> None:
    """Writes the three results, which are dense in one sample order; ends in another order are copied."""
    order = layout.leading_order(velocity)
    z_start = layout.in_order("window_chord", "z_start", z_start, order, strict)
    z_end = layout.in_order("window_chord", "z_end", z_end, order, strict)
    tensors = (z_start, z_end, tau, dt, z_t, velocity, model_input)
    launch.start(prepare(*tensors), *tensors)
