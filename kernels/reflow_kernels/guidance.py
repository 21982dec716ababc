"""Classifier-free guidance of a doubled batch, with the optional rescale of the standard deviation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import checks, dispatch, layout, reference
from .reference import PerSample


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
    checks.tensor("model_output", model_output)
    if model_output.shape[0] % 2:
        raise ValueError(f"model_output has {model_output.shape[0]} rows; expected an even number, [uncond; cond].")
    checks.no_grad("model_output", model_output, "cfg_combine has none")
    batch = model_output.shape[0] // 2
    dtype = reference.accumulate_dtype(model_output)
    factor = None
    scale = checks.per_sample("guidance_scale", guidance_scale, model_output, batch, dtype)
    if isinstance(rescale, Tensor) or rescale != 0:
        factor = checks.per_sample("rescale", rescale, model_output, batch, dtype)
    run: Callable[..., Tensor] = torch.ops.reflow_kernels.cfg_combine
    if dispatch.runs_directly("cfg_combine", backend, strict, model_output, scale, factor):
        run = _run
    return run(model_output, scale, factor, backend, strict)


def _run(
    model_output: Tensor, guidance_scale: Tensor, rescale: Tensor | None, backend: str, strict: bool
) -> Tensor:
    chosen = dispatch.select("cfg_combine", model_output.device, backend, strict)
    order = layout.leading_order(model_output)
    if chosen == "triton" and model_output.numel():
        guided = layout.empty((model_output.shape[0] // 2,), model_output, order)
        dispatch.triton_module("guidance").combine(model_output, guidance_scale, rescale, guided, strict)
        return guided
    guided = reference.cfg_combine(model_output, guidance_scale, rescale=0.0 if rescale is None else rescale)
    return layout.settle(guided, order)


_combine = torch.library.custom_op("reflow_kernels::cfg_combine", _run, mutates_args=())


@_combine.register_fake
def _(
    model_output: Tensor, guidance_scale: Tensor, rescale: Tensor | None, backend: str, strict: bool
) -> Tensor:
    return layout.empty((model_output.shape[0] // 2,), model_output, layout.leading_order(model_output))
