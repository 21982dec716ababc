"""The straight line between a window's ends: points on it, its velocity, and the points cast for the network."""

from __future__ import annotations

import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch, launch, layout, plans, reference
from .reference import PerSample
from .registration import Op


class Operands(NamedTuple):
    z_start: Tensor
    z_end: Tensor
    tau: Tensor
    dt: Tensor
    input_dtype: torch.dtype
    backend: str
    strict: bool


def window_chord(
    z_start: Tensor,
    z_end: Tensor,
    tau: PerSample,
    dt: PerSample,
    *,
    input_dtype: torch.dtype | None = None,
    backend: str = "auto",
    strict: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """z_t = z_start + tau (z_end - z_start) and velocity = (z_end - z_start) / dt.

    Args:
        z_start: [B, ...] fp32 or fp64, the window's noise side (t_start).
        z_end: [B, ...], the window's data side (t_end), in z_start's dtype.
        tau: float, [B], or [M, B] for M points on each chord; 0 at z_start and 1 at z_end, where z_t is exact.
        dt: float or [B], t_end - t_start, negative.
        input_dtype: dtype of model_input, by default z_start's.
        backend: "auto", "triton" or "torch". strict: refuse fallbacks and layout copies.

    Returns:
        (z_t, velocity, model_input) in the sample order of z_start: z_t and model_input [B, ...], or [M, B, ...] for an
        [M, B] tau; velocity [B, ...]. No gradient, and no memory is shared.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, dt >= 0, or an argument that requires a gradient.
        RuntimeError: the asked backend cannot run here.
    """
    if isinstance(dt, numbers.Real) and not dt < 0:
        raise ValueError(
            f"dt is {dt}; expected t_end - t_start, which is negative: time runs from 1 (noise) to 0 (data)."
        )
    given = (z_start, z_end, tau, dt)
    key = plans.signature("window_chord", given, input_dtype, backend, strict)
    plan = plans.find(key) or plans.keep(key, _plan(*given, input_dtype, backend, strict))
    results: tuple[Tensor, Tensor, Tensor] = plan(*given)
    return results


def _plan(
    z_start: Tensor,
    z_end: Tensor,
    tau: PerSample,
    dt: PerSample,
    input_dtype: torch.dtype | None,
    backend: str,
    strict: bool,
) -> plans.Plan:
    """Check a call and say how calls like it run."""
    checks.tensor("z_start", z_start, checks.PRECISE)
    checks.tensor("z_end", z_end, checks.PRECISE)
    checks.dtype("input_dtype", input_dtype)
    checks.same_shape("z_end", z_end, z_start.shape, "the shape of z_start")
    checks.same_device("z_end", z_end, z_start, "z_start")
    if z_end.dtype != z_start.dtype:
        raise TypeError(f"z_end has dtype {z_end.dtype}; expected {z_start.dtype}, the dtype of z_start.")
    for name, value in (("z_start", z_start), ("z_end", z_end)):
        checks.no_grad(name, value, "window_chord has none")
    batch = z_start.shape[0]
    leading: tuple[int, ...] = (batch,)
    if isinstance(tau, Tensor) and tau.dim() == 2:
        if tau.shape[1] != batch:
            raise ValueError(f"tau has shape {list(tau.shape)}; expected [{batch}] or [M, {batch}].")
        checks.per_sample("tau", tau.reshape(-1), z_start, tau.numel())
        leading = tuple(tau.shape)
    else:
        checks.per_sample("tau", tau, z_start, batch)
    checks.per_sample("dt", dt, z_start, batch)
    tensors = [value for value in (tau, dt) if isinstance(value, Tensor)]
    direct = dispatch.runs_directly("window_chord", backend, strict, z_start, z_end, *tensors)
    dtype = input_dtype or z_start.dtype
    triton = direct and dispatch.select("window_chord", z_start.device, backend, strict) == "triton"
    if triton and 0 not in (*leading, *z_start.shape):
        order = layout.shared_order(z_start, z_end)
        if order is not None:
            return _Direct(leading, z_start, order, dtype)
    run = _CHORD.run if direct else _CHORD

    def call(z_start: Tensor, z_end: Tensor, tau: PerSample, dt: PerSample) -> tuple[Tensor, Tensor, Tensor]:
        values = plans.fill((tau, dt), z_start, batch, z_start.dtype)
        given = (z_start, z_end, *values, dtype, backend, strict)
        results: tuple[Tensor, Tensor, Tensor] = run(Operands._make(given))
        return results

    return call


class _Direct:
    """Calls of one signature straight to the kernel, whose launch is prepared once."""

    def __init__(self, leading: tuple[int, ...], z_start: Tensor, order: tuple[int, ...], input_dtype: torch.dtype):
        self.z_t = layout.Room(leading, z_start, order)
        self.velocity = layout.Room(z_start.shape[:1], z_start, order)
        self.model_input = layout.Room(leading, z_start, order, input_dtype)
        self.launch: launch.Launch | None = None

    def __call__(self, z_start: Tensor, z_end: Tensor, tau: PerSample, dt: PerSample) -> tuple[Tensor, Tensor, Tensor]:
        values = plans.fill((tau, dt), z_start, z_start.shape[0], z_start.dtype)
        results = self.z_t.empty(), self.velocity.empty(), self.model_input.empty()
        if self.launch is None:
            self.launch = dispatch.triton_module("chord").prepare(z_start, z_end, *values, *results)
        launch.start(self.launch, z_start, z_end, *values, *results)
        return results


def _run(o: Operands) -> tuple[Tensor, Tensor, Tensor]:
    chosen = dispatch.select("window_chord", o.z_start.device, o.backend, o.strict)
    if chosen == "triton" and o.z_start.numel() and o.tau.numel():
        results = _outputs(o)
        dispatch.triton_module("chord").chord(*o[:4], *results, o.strict)
        return results
    order = layout.leading_order(o.z_start)
    z_t, velocity, model_input = reference.window_chord(*o[:4], input_dtype=o.input_dtype)
    return layout.settle(z_t, order), layout.settle(velocity, order), layout.settle(model_input, order)


def _outputs(o: Operands) -> tuple[Tensor, Tensor, Tensor]:
    order = layout.leading_order(o.z_start)
    return (
        layout.empty(o.tau.shape, o.z_start, order),
        layout.empty((o.z_start.shape[0],), o.z_start, order),
        layout.empty(o.tau.shape, o.z_start, order, o.input_dtype),
    )


_CHORD = Op("window_chord", Operands, _run, _outputs, results=3)
