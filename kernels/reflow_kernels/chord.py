"""The straight line between a window's ends: points on it, its velocity, and the points cast for the network."""

from __future__ import annotations

import numbers
from collections.abc import Callable

import torch
from torch import Tensor

from . import checks, dispatch, layout, reference
from .reference import PerSample


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
    checks.tensor("z_start", z_start, checks.PRECISE)
    checks.tensor("z_end", z_end, checks.PRECISE)
    checks.dtype("input_dtype", input_dtype)
    checks.same_shape("z_end", z_end, z_start.shape, "the shape of z_start")
    checks.same_device("z_end", z_end, z_start, "z_start")
    if z_end.dtype != z_start.dtype:
        raise TypeError(f"z_end has dtype {z_end.dtype}; expected {z_start.dtype}, the dtype of z_start.")
    for name, value in (("z_start", z_start), ("z_end", z_end)):
        checks.no_grad(name, value, "window_chord has none")
    if isinstance(dt, numbers.Real) and not dt < 0:
        raise ValueError(
            f"dt is {dt}; expected t_end - t_start, which is negative: time runs from 1 (noise) to 0 (data)."
        )
    batch = z_start.shape[0]
    if isinstance(tau, Tensor) and tau.dim() == 2:
        if tau.shape[1] != batch:
            raise ValueError(f"tau has shape {list(tau.shape)}; expected [{batch}] or [M, {batch}].")
        checks.per_sample("tau", tau.reshape(-1), z_start, tau.numel(), z_start.dtype)
    else:
        tau = checks.per_sample("tau", tau, z_start, batch, z_start.dtype)
    dt = checks.per_sample("dt", dt, z_start, batch, z_start.dtype)
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.reflow_kernels.window_chord
    if dispatch.runs_directly("window_chord", backend, strict, z_start, z_end, tau, dt):
        run = _run
    return run(z_start, z_end, tau, dt, input_dtype or z_start.dtype, backend, strict)


def _run(
    z_start: Tensor, z_end: Tensor, tau: Tensor, dt: Tensor, input_dtype: torch.dtype, backend: str, strict: bool
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = dispatch.select("window_chord", z_start.device, backend, strict)
    if chosen == "triton" and z_start.numel() and tau.numel():
        results = _outputs(z_start, tau, input_dtype)
        dispatch.triton_module("chord").chord(z_start, z_end, tau, dt, *results, strict)
        return results
    order = layout.leading_order(z_start)
    z_t, velocity, model_input = reference.window_chord(z_start, z_end, tau, dt, input_dtype=input_dtype)
    return layout.settle(z_t, order), layout.settle(velocity, order), layout.settle(model_input, order)


_chord = torch.library.custom_op("reflow_kernels::window_chord", _run, mutates_args=())


@_chord.register_fake
def _(
    z_start: Tensor, z_end: Tensor, tau: Tensor, dt: Tensor, input_dtype: torch.dtype, backend: str, strict: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(z_start, tau, input_dtype)


def _outputs(z_start: Tensor, tau: Tensor, input_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    order = layout.leading_order(z_start)
    return (
        layout.empty(tau.shape, z_start, order),
        layout.empty((z_start.shape[0],), z_start, order),
        layout.empty(tau.shape, z_start, order, input_dtype),
    )
