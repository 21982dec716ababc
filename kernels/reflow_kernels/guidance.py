"""Classifier-free guidance of a doubled batch, with the optional rescale of the standard deviation."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from . import checks, dispatch, layout, plans, reference
from .reference import PerSample
from .registration import Op


class Operands(NamedTuple):
    model_output: Tensor
    guidance_scale: Tensor
    rescale: Tensor | None
    backend: str
    strict: bool


def cfg_combine(
    model_output: Tensor,
    guidance_scale: PerSample,
    *,
    rescale: PerSample = 0.0,
    backend: str = "auto",
    strict: bool = False,
) -> Tensor:
    """guided = uncond + guidance_scale * (cond - uncond), optionally pulled to cond's standard deviation.

    Args:
        model_output: [2B, ...], rows [uncond; cond].
        guidance_scale: float or [B]; exactly cond at 1 and exactly uncond at 0.
        rescale: float or [B], 0 to 1: guided is multiplied by 1 + rescale (std(cond) / std(guided) - 1), one standard
            deviation per sample over all its elements (arXiv 2305.08891). The float 0 skips the reduction.
        backend: "auto", "triton" or "torch". strict: refuse fallbacks and layout copies.

    Returns:
        guided [B, ...] in model_output's dtype and sample order; arithmetic in fp32, or fp64 for fp64. No gradient.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, or an argument that requires a gradient.
        RuntimeError: the asked backend cannot run here.
    """
    factor = rescale if isinstance(rescale, Tensor) or rescale != 0 else None
    given = (model_output, guidance_scale, factor)
    key = plans.signature("cfg_combine", given, backend, strict)
    plan = plans.find(key) or plans.keep(key, _plan(*given, backend, strict))
    guided: Tensor = plan(*given)
    return guided


def _plan(
    model_output: Tensor, guidance_scale: PerSample, rescale: PerSample | None, backend: str, strict: bool
) -> plans.Plan:
    """Check a call and say how calls like it run."""
    checks.tensor("model_output", model_output)
    if model_output.shape[0] % 2:
        raise ValueError(f"model_output has {model_output.shape[0]} rows; expected an even number, [uncond; cond].")
    checks.no_grad("model_output", model_output, "cfg_combine has none")
    batch = model_output.shape[0] // 2
    checks.per_sample("guidance_scale", guidance_scale, model_output, batch)
    if rescale is not None:
        checks.per_sample("rescale", rescale, model_output, batch)
    tensors = [value for value in (guidance_scale, rescale) if isinstance(value, Tensor)]
    direct = dispatch.runs_directly("cfg_combine", backend, strict, model_output, *tensors)
    triton = direct and dispatch.select("cfg_combine", model_output.device, backend, strict) == "triton"
    if triton and model_output.numel():
        order = layout.shared_order(model_output)
        if order is not None:
            return _Direct(layout.Room((batch,), model_output, order))
    run, dtype = _COMBINE.run if direct else _COMBINE, reference.accumulate_dtype(model_output)

    def call(model_output: Tensor, guidance_scale: PerSample, rescale: PerSample | None) -> Tensor:
        values = plans.fill((guidance_scale, rescale), model_output, batch, dtype)
        guided: Tensor = run(Operands._make((model_output, *values, backend, strict)))
        return guided

    return call


class _Direct:
    """Calls of one signature straight to the kernels, whose launches are prepared once."""

    def __init__(self, guided: layout.Room):
        self.guided = guided
        self.kernels: Any = None

    def __call__(self, model_output: Tensor, guidance_scale: PerSample, rescale: PerSample | None) -> Tensor:
        guided = self.guided.empty()
        dtype = reference.accumulate_dtype(model_output)
        values = plans.fill((guidance_scale, rescale), model_output, guided.shape[0], dtype)
        if self.kernels is None:
            self.kernels = dispatch.triton_module("guidance").Kept(model_output, *values, guided)
        self.kernels.combine(model_output, *values, guided)
        return guided


def _run(o: Operands) -> Tensor:
    chosen = dispatch.select("cfg_combine", o.model_output.device, o.backend, o.strict)
    if chosen == "triton" and o.model_output.numel():
        guided = _output(o)
        dispatch.triton_module("guidance").combine(*o[:3], guided, o.strict)
        return guided
    guided = reference.cfg_combine(o.model_output, o.guidance_scale, rescale=0.0 if o.rescale is None else o.rescale)
    return layout.settle(guided, layout.leading_order(o.model_output))


def _output(o: Operands) -> Tensor:
    return layout.empty((o.model_output.shape[0] // 2,), o.model_output, layout.leading_order(o.model_output))


_COMBINE = Op("cfg_combine", Operands, _run, _output, results=1)
