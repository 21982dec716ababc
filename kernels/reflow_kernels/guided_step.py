"""One step of a teacher's or a student's ODE: guidance, the step, and the next model input in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch, launch, layout, plans, reference
from .reference import PerSample
from .registration import Op


class Operands(NamedTuple):
    state: Tensor
    model_output: Tensor
    state_coef: Tensor
    output_coef: Tensor
    guidance_scale: Tensor | None
    input_scale: Tensor | None
    input_dtype: torch.dtype
    backend: str
    strict: bool


class OperandsInto(NamedTuple):
    """The same with a buffer for each result."""

    state: Tensor
    model_output: Tensor
    state_coef: Tensor
    output_coef: Tensor
    guidance_scale: Tensor | None
    input_scale: Tensor | None
    out: Tensor
    input_out: Tensor
    backend: str
    strict: bool


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
    given = (state, model_output, state_coef, output_coef, guidance_scale, input_scale, out, input_out)
    key = plans.signature("guided_step", given, input_dtype, backend, strict)
    plan = plans.find(key) or plans.keep(key, _plan(*given, input_dtype, backend, strict))
    results: tuple[Tensor, Tensor] = plan(*given)
    return results


def _plan(
    state: Tensor,
    model_output: Tensor,
    state_coef: PerSample,
    output_coef: PerSample,
    guidance_scale: PerSample | None,
    input_scale: PerSample | None,
    out: Tensor | None,
    input_out: Tensor | None,
    input_dtype: torch.dtype | None,
    backend: str,
    strict: bool,
) -> plans.Plan:
    """Check a call and say how calls like it run."""
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
    checks.per_sample("state_coef", state_coef, state, batch)
    checks.per_sample("output_coef", output_coef, state, batch)
    for name, coef in (("guidance_scale", guidance_scale), ("input_scale", input_scale)):
        if coef is not None:
            checks.per_sample(name, coef, state, batch)
    _check_buffer("out", out, state, batch, state.dtype, "the dtype of state")
    wanted = input_dtype if input_dtype is not None else (input_out.dtype if input_out is not None else None)
    _check_buffer("input_out", input_out, state, rows, wanted, "input_dtype")
    dtype = wanted or model_output.dtype
    coefs = (state_coef, output_coef, guidance_scale, input_scale)
    tensors = [value for value in (*coefs, out, input_out) if isinstance(value, Tensor)]
    direct = dispatch.runs_directly("guided_step", backend, strict, state, model_output, *tensors)
    triton = direct and dispatch.select("guided_step", state.device, backend, strict) == "triton" and state.numel() > 0
    first = input_out if out is None else out
    if first is None:
        order = layout.shared_order(model_output, state) if triton else None
        if order is None:
            return _Checked(direct, None, dtype, (backend, strict))
        results = _rooms(state, rows, order, dtype)
        return _Direct(False, results)
    order = layout.leading_order(first)
    if input_out is not None and layout.dense_order(input_out) != order:
        raise ValueError(
            f"input_out has strides {input_out.stride()}; expected the sample order of out, {first.stride()}."
        )
    results = _rooms(state, rows, order, dtype)
    if triton and layout.shared_order(first, state, model_output) is not None:
        return _Direct(True, results)
    return _Checked(direct, results, dtype, (backend, strict))


def _rooms(
    state: Tensor, rows: int, order: tuple[int, ...], input_dtype: torch.dtype
) -> tuple[layout.Room, layout.Room]:
    return layout.Room(state.shape[:1], state, order), layout.Room((rows,), state, order, input_dtype)


class _Call:
    """Calls of one signature: coefficients as tensors, and buffers from ``results``, where those are known."""

    def __init__(self, results: tuple[layout.Room, layout.Room] | None):
        self.results = results

    def __call__(
        self,
        state: Tensor,
        model_output: Tensor,
        state_coef: PerSample,
        output_coef: PerSample,
        guidance_scale: PerSample | None,
        input_scale: PerSample | None,
        out: Tensor | None,
        input_out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        coefs = plans.fill((state_coef, output_coef, guidance_scale, input_scale), state, state.shape[0], state.dtype)
        if self.results is None:
            return self.made(state, model_output, *coefs)
        out = self.results[0].empty() if out is None else out
        input_out = self.results[1].empty() if input_out is None else input_out
        self.write(out, input_out, state, model_output, *coefs)
        return out, input_out

    def made(self, *operands: Any) -> tuple[Tensor, Tensor]:
        """Both results, in the sample order of model_output."""
        raise NotImplementedError

    def write(self, out: Tensor, input_out: Tensor, *operands: Any) -> None:
        """Both results, into their buffers."""
        raise NotImplementedError


class _Checked(_Call):
    """Through the dispatcher, or ``direct`` around it; ``results`` where buffers are given."""

    def __init__(
        self,
        direct: bool,
        results: tuple[layout.Room, layout.Room] | None,
        input_dtype: torch.dtype,
        options: tuple[str, bool],
    ):
        super().__init__(results)
        self.input_dtype, self.options = input_dtype, options
        self.run = _STEP.run if direct else _STEP
        self.run_into = _written if direct else _STEP_INTO

    def made(self, *operands: Any) -> tuple[Tensor, Tensor]:
        results: tuple[Tensor, Tensor] = self.run(Operands._make((*operands, self.input_dtype, *self.options)))
        return results

    def write(self, out: Tensor, input_out: Tensor, *operands: Any) -> None:
        if type(out) is Tensor and type(input_out) is Tensor and not torch.compiler.is_compiling():
            _check_memory(out, input_out, *operands)
        self.run_into(OperandsInto._make((*operands, out, input_out, *self.options)))


class _Direct(_Call):
    """Straight to the kernel, whose launch is prepared once; ``into`` where buffers are given."""

    def __init__(self, into: bool, results: tuple[layout.Room, layout.Room]):
        super().__init__(results)
        self.into = into
        self.launch: launch.Launch | None = None
        self.apart = plans.Apart(_check_memory)

    def write(self, out: Tensor, input_out: Tensor, *operands: Any) -> None:
        if self.into:
            self.apart((out, input_out, *operands))
        if self.launch is None:
            prepare = dispatch.triton_module("guided_step").prepare
            self.launch = prepare(*operands, out, input_out)
        launch.start(self.launch, *operands, out, input_out)
        if self.into:
            torch.autograd.graph.increment_version((out, input_out))


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


def _check_memory(out: Tensor, input_out: Tensor, *operands: Tensor | None) -> None:
    """Refuse buffers that would be written where another program of the kernel still reads or writes."""
    if layout.overlap(out, input_out):
        raise ValueError("out and input_out share memory; each is written whole, so give each a buffer of its own.")
    for name, buffer in (("out", out), ("input_out", input_out)):
        for other, operand in zip(Operands._fields, operands, strict=False):
            if operand is None or type(operand) is not Tensor or not layout.overlap(buffer, operand):
                continue
            if other not in ("state", "model_output") or not layout.same_place(buffer, operand):
                raise ValueError(
                    f"{name} overlaps {other} in part, which would be overwritten before all of it is read; give a "
                    f"buffer of its own, or {other} itself."
                )


def _run(o: Operands) -> tuple[Tensor, Tensor]:
    if _on_triton(o):
        results = _outputs(o)
        dispatch.triton_module("guided_step").step(*o[:6], *results, o.strict)
        return results
    order = layout.leading_order(o.model_output)
    state, model_input = _reference(o, o.input_dtype)
    return layout.settle(state, order), layout.settle(model_input, order)


def _outputs(o: Operands) -> tuple[Tensor, Tensor]:
    order = layout.leading_order(o.model_output)
    return (
        layout.empty((o.state.shape[0],), o.state, order),
        layout.empty((o.model_output.shape[0],), o.state, order, o.input_dtype),
    )


def _run_into(o: OperandsInto) -> None:
    if _on_triton(o):
        dispatch.triton_module("guided_step").step(*o[:8], o.strict)
        return
    for buffer, result in zip((o.out, o.input_out), _reference(o, o.input_out.dtype), strict=True):
        buffer.copy_(result)


def _written(o: OperandsInto) -> None:
    """Without the dispatcher, which would tell autograd that the buffers have changed."""
    _run_into(o)
    torch.autograd.graph.increment_version((o.out, o.input_out))


def _on_triton(o: Operands | OperandsInto) -> bool:
    return dispatch.select("guided_step", o.state.device, o.backend, o.strict) == "triton" and o.state.numel() > 0


def _reference(o: Operands | OperandsInto, input_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return reference.guided_step(
        *o[:4], guidance_scale=o.guidance_scale, input_scale=o.input_scale, input_dtype=input_dtype
    )


_STEP = Op("guided_step", Operands, _run, _outputs, results=2)
_STEP_INTO = Op("guided_step_out", OperandsInto, _run_into, lambda o: None, results=0, mutates=("out", "input_out"))
