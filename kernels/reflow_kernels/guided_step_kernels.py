"""Triton kernel of :func:`reflow_kernels.guided_step`: one launch, operands read once and results written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch, layout
from .tiles import accumulator, lerp, load, store

_VALUES = ["state_coef", "output_coef", "guidance_scale", "input_scale"]  # [B]: read one by one, at any address
_COUNTS = ["TILES", "BATCH", *(f"{name}_stride" for name in _VALUES)]


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_VALUES)
def _step_kernel(
    state,  # [B, N]
    output,  # [B, N], or [2B, N] with guidance
    state_coef,  # [B], as the three below
    output_coef,
    guidance_scale,  # None without guidance
    input_scale,  # None for 1
    out,  # [B, N]
    input_out,  # the rows of output
    N,
    TILES,
    BATCH,
    state_stride,
    output_stride,
    out_stride,
    input_out_stride,
    state_coef_stride,
    output_coef_stride,
    guidance_scale_stride,
    input_scale_stride,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i_b = program // TILES
    o_n = (program % TILES) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_n = o_n < N

    b_output = load(output, i_b * output_stride + o_n, m_n, ACC, EVEN)
    if guidance_scale is not None:
        b_cond = load(output, (i_b + BATCH) * output_stride + o_n, m_n, ACC, EVEN)
        b_output = lerp(b_output, b_cond, tl.load(guidance_scale + i_b * guidance_scale_stride).to(ACC))
    b_state = load(state, i_b * state_stride + o_n, m_n, ACC, EVEN)
    a = tl.load(state_coef + i_b * state_coef_stride).to(ACC)
    b = tl.load(output_coef + i_b * output_coef_stride).to(ACC)
    b_state = a * b_state + b * b_output
    store(out, i_b * out_stride + o_n, b_state, m_n, EVEN)

    if input_scale is not None:
        b_state = b_state * tl.load(input_scale + i_b * input_scale_stride).to(ACC)
    store(input_out, i_b * input_out_stride + o_n, b_state, m_n, EVEN)
    if guidance_scale is not None:
        store(input_out, (i_b + BATCH) * input_out_stride + o_n, b_state, m_n, EVEN)


def prepare(
    state: Tensor,
    model_output: Tensor,
    state_coef: Tensor,
    output_coef: Tensor,
    guidance_scale: Tensor | None,
    input_scale: Tensor | None,
    out: Tensor,
    input_out: Tensor,
) -> launch.Launch:
    """The launch for these eight tensors and others like them; all share one sample order."""
    batch, size = state.shape[0], out[0].numel()
    blocks = launch.elementwise(size)
    return launch.Launch(
        _step_kernel,
        batch * blocks.tiles,
        blocks.warps,
        (
            *(size, blocks.tiles, batch),
            *(state.stride(0), model_output.stride(0), out.stride(0), input_out.stride(0)),
            *(launch.stride(value) for value in (state_coef, output_coef, guidance_scale, input_scale)),
        ),
        ACC=accumulator(state.dtype),
        BLOCK=blocks.block,
        EVEN=blocks.even,
    )


def step(
    state: Tensor,
    model_output: Tensor,
    state_coef: Tensor,
    output_coef: Tensor,
    guidance_scale: Tensor | None,
    input_scale: Tensor | None,
    out: Tensor,
    input_out: Tensor,
    strict: bool,
) -> None:
    """Writes ``out`` and ``input_out``, which share one sample order; operands in another order are copied."""
    order = layout.leading_order(out)
    state = layout.in_order("guided_step", "state", state, order, strict)
    model_output = layout.in_order("guided_step", "model_output", model_output, order, strict)
    operands = (state, model_output, state_coef, output_coef, guidance_scale, input_scale, out, input_out)
    launch.start(prepare(*operands), *operands)
