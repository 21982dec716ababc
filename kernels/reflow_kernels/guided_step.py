"""One step of a teacher's or a student's ODE: guidance, the step, and the next model input in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch, layout, reference
from .reference import PerSample

OPERANDS = ("state", "model_output", "state_coef", "output_coef", "guidance_scale", "input_scale")


def guided_step(
    state: Tensor,
    model_output: Tensor,
    state_coef: PerSample,
    output_coef: PerSample,
    *,
    guidance_scale: PerSample | None = None,
    input_scale: PerSample | None = None,
    input_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    input_out: Tensor | None = None,
    backend: str = "auto",
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """state' = state_coef * state + output_coef * guided(model_output), and the network's next input.

    Args:
        state: [B, ...] fp32 or fp64, which is also the dtype of the arithmetic.
        model_output: [B, ...] without guidance; [2B, ...] rows [uncond; cond] with it.
        state_coef, output_coef: float or [B]. A DDIM or Euler step of any parameterisation has this form.
        guidance_scale: None where there is no unconditional half. A float or [B], 1.0 included:
            guided = uncond + guidance_scale (cond - uncond).
        input_scale: None (1), float or [B]: model_input = input_scale * state'.
        input_dtype: dtype of model_input, by default that of model_output (or of ``input_out``).
        out, input_out: buffers for the two results, in one sample order. Each may be an operand's own memory, element
            for element (``out`` may be ``state``), but may not overlap one in part, nor the other buffer.
        backend: "auto", "triton" or "torch". strict: refuse fallbacks and layout copies.

    Returns:
        (state', model_input): state' [B, ...] in state's dtype; model_input has the rows of model_output. Both follow
        the sample order of model_output (of ``out`` where it is given). No gradient.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or layout, or an argument that requires a gradient.
        RuntimeError: the asked backend cannot run here.
    """
    checks.tensor("state", state, checks.PRECISE)
    checks.tensor("model_output", model_output)
    checks.dtype("input_dtype", input_dtype)
    batch = state.shape[0]
    rows = batch if guidance_scale is None else 2 * batch
    what = "the shape of state" if guidance_scale is None else "twice the rows of state, [uncond; cond]"
    checks.same_shape("model_output", model_output, (rows, *state.shape[1:]), what)
    checks.same_device("model_output", model_output, state, "state")
    for name, value in (("state", state), ("model_output", model_output)):
        checks.no_grad(name, value, "guided_step has none")

    def coefficient(name: str, value: PerSample) -> Tensor:
        return checks.per_sample(name, value, state, batch, state.dtype)

    operands = (
        state,
        model_output,
        coefficient("state_coef", state_coef),
        coefficient("output_coef", output_coef),
        None if guidance_scale is None else coefficient("guidance_scale", guidance_scale),
        None if input_scale is None else coefficient("input_scale", input_scale),
    )
    first = input_out if out is None else out
    if first is None:
        dtype = model_output.dtype if input_dtype is None else input_dtype
        if dispatch.runs_directly("guided_step", backend, strict, *operands):
            return _run(*operands, dtype, backend, strict)
        results: tuple[Tensor, Tensor] = torch.ops.reflow_kernels.guided_step(*operands, dtype, backend, strict)
        return results

    _check_buffer("out", out, state, batch, state.dtype, "the dtype of state")
    wanted = input_dtype if input_dtype is not None else (input_out.dtype if input_out is not None else None)
    _check_buffer("input_out", input_out, state, rows, wanted, "input_dtype")
    order = layout.leading_order(first)
    if out is None:
        out = layout.empty((batch,), state, order)
    if input_out is None:
        input_out = layout.empty((rows,), state, order, input_dtype or model_output.dtype)
    if layout.dense_order(input_out) != order:
        raise ValueError(
            f"input_out has strides {input_out.stride()}; expected the sample order of out, {out.stride()}."
        )
    if type(out) is Tensor and type(input_out) is Tensor and not torch.compiler.is_compiling():
        _check_memory({"out": out, "input_out": input_out}, operands)
    if dispatch.runs_directly("guided_step", backend, strict, *operands, out, input_out):
        _run_out(*operands, out, input_out, backend, strict)
        torch.autograd.graph.increment_version((out, input_out))
    else:
        torch.ops.reflow_kernels.guided_step_out(*operands, out, input_out, backend, strict)
    return out, input_out


def _check_buffer(
    name: str, value: Tensor | None, state: Tensor, rows: int, dtype: torch.dtype | None, of: str
) -> None:
    if value is None:
        return
    checks.tensor(name, value)
    checks.same_shape(name, value, (rows, *state.shape[1:]), f"{rows} rows of state's sample shape")
    checks.same_device(name, value, state, "state")
    checks.no_grad(name, value, "guided_step has none")
    if value.dtype != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}; expected {dtype}, {of}.")
    if layout.dense_order(value) is None or (rows > 1 and value.numel() and value.stride(0) < value[0].numel()):
        raise ValueError(f"{name} has strides {value.stride()}; expected samples that are dense and do not overlap.")


def _check_memory(buffers: dict[str, Tensor], operands: tuple[Tensor | None, ...]) -> None:
    """Refuse buffers that would be written where another program of the kernel still reads or writes."""
    if layout.overlap(buffers["out"], buffers["input_out"]):
        raise ValueError("out and input_out share memory; each is written whole, so give each a buffer of its own.")
    named = dict(zip(OPERANDS, operands, strict=True))
    for name, buffer in buffers.items():
        for other, operand in named.items():
            if operand is None or type(operand) is not Tensor or not layout.overlap(buffer, operand):
                continue
            if other not in OPERANDS[:2] or not layout.same_place(buffer, operand):
                raise ValueError(
                    f"{name} overlaps {other} in part, which would be overwritten before all of it is read; give a "
                    f"buffer of its own, or {other} itself."
                )


def _run(
    state: Tensor,
    model_output: Tensor,
    state_coef: Tensor,
    output_coef: Tensor,
    guidance_scale: Tensor | None,
    input_scale: Tensor | None,
    input_dtype: torch.dtype,
    backend: str,
    strict: bool,
) -> tuple[Tensor, Tensor]:
    chosen = dispatch.select("guided_step", state.device, backend, strict)
    order = layout.leading_order(model_output)
    if chosen == "triton" and state.numel():
        out = layout.empty((state.shape[0],), state, order)
        input_out = layout.empty((model_output.shape[0],), state, order, input_dtype)
        run = dispatch.triton_module("guided_step").step
        run(state, model_output, state_coef, output_coef, guidance_scale, input_scale, out, input_out, strict)
        return out, input_out
    results = _reference(state, model_output, state_coef, output_coef, guidance_scale, input_scale, input_dtype)
    return layout.settle(results[0], order), layout.settle(results[1], order)


_step = torch.library.custom_op("reflow_kernels::guided_step", _run, mutates_args=())


@_step.register_fake
def _(
    state: Tensor,
    model_output: Tensor,
    state_coef: Tensor,
    output_coef: Tensor,
    guidance_scale: Tensor | None,
    input_scale: Tensor | None,
    input_dtype: torch.dtype,
    backend: str,
    strict: bool,
) -> tuple[Tensor, Tensor]:
    order = layout.leading_order(model_output)
    return (
        layout.empty((state.shape[0],), state, order),
        layout.empty((model_output.shape[0],), state, order, input_dtype),
    )


def _run_out(
    state: Tensor,
    model_output: Tensor,
    state_coef: Tensor,
    output_coef: Tensor,
    guidance_scale: Tensor | None,
    input_scale: Tensor | None,
    out: Tensor,
    input_out: Tensor,
    backend: str,
    strict: bool,
) -> None:
    chosen = dispatch.select("guided_step", state.device, backend, strict)
    if chosen == "triton" and state.numel():
        run = dispatch.triton_module("guided_step").step
        run(state, model_output, state_coef, output_coef, guidance_scale, input_scale, out, input_out, strict)
        return
    results = _reference(state, model_output, state_coef, output_coef, guidance_scale, input_scale, input_out.dtype)
    out.copy_(results[0])
    input_out.copy_(results[1])


_step_out = torch.library.custom_op(
    "reflow_kernels::guided_step_out", _run_out, mutates_args=("out", "input_out")
)


@_step_out.register_fake
def _(*arguments: Any) -> None:
    return None


def _reference(
    state: Tensor,
    model_output: Tensor,
    state_coef: Tensor,
    output_coef: Tensor,
    guidance_scale: Tensor | None,
    input_scale: Tensor | None,
    input_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return reference.guided_step(
        state,
        model_output,
        state_coef,
        output_coef,
        guidance_scale=guidance_scale,
        input_scale=input_scale,
        input_dtype=input_dtype,
    )
