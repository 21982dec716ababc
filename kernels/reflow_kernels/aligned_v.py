"""The aligned-v loss: magnitude and direction of a predicted velocity, differentiable in ``model_output``.

The formula is that of :func:`reflow_kernels.reference.aligned_v_loss`. The gradient to v^ is linear in d, v^ and v once
a few numbers per sample are known; the forward saves these in ``stats`` [6, B] and nothing of the operands' size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch, layout, reference
from .reference import AlignedVLoss, PerSample

STATS = 6


def aligned_v_loss(
    model_output: Tensor,
    target: Tensor,
    *,
    direction_weight: PerSample,
    sample: Tensor | None = None,
    sample_coef: PerSample | None = None,
    output_coef: PerSample | None = None,
    weight: PerSample | None = None,
    eps: float = 1e-4,
    backend: str = "auto",
    strict: bool = False,
) -> AlignedVLoss:
    """Mean over the batch of ``weight * (mse + direction_weight * (1 - cosine))`` of v^ against ``target``.

    Args:
        model_output: [B, ...], the network's output; the only argument that gets a gradient.
        target: [B, ...], the velocity v to match.
        direction_weight: float or [B], weight of 1 - cosine.
        sample, sample_coef, output_coef: all three for a network that does not predict velocity, sample [B, ...] and
            coefficients float or [B]: v^ = sample_coef * sample + output_coef * model_output. None: v^ = model_output.
        weight: None, float or [B], weight of each sample's loss.
        eps: floor of both norms in the cosine, per element (multiplied by sqrt(N)).
        backend: "auto", "triton" or "torch". strict: refuse fallbacks and layout copies.

    Returns:
        AlignedVLoss(loss, mse, magnitude, cosine): loss is a scalar, the others are [B] and detached; fp32, or fp64
        where an operand is fp64. An empty batch has loss 0. Norms and cosine run over all elements of a sample.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, or a gradient asked of another argument.
        RuntimeError: the asked backend cannot run here.
    """
    checks.tensor("model_output", model_output)
    batch = model_output.shape[0]
    for name, value in (("target", target), ("sample", sample)):
        if value is not None:
            checks.tensor(name, value)
            checks.same_shape(name, value, model_output.shape, "the shape of model_output")
            checks.same_device(name, value, model_output, "model_output")
            checks.no_grad(name, value, "only model_output gets one")
    given = [value is not None for value in (sample, sample_coef, output_coef)]
    if any(given) and not all(given):
        raise ValueError("sample, sample_coef and output_coef describe one conversion; give all three or none.")
    if not eps > 0:
        raise ValueError(f"eps is {eps}; expected a positive float.")
    dtype = reference.accumulate_dtype(model_output, target, sample)

    def coefficient(name: str, value: PerSample | None) -> Tensor | None:
        return None if value is None else checks.per_sample(name, value, model_output, batch, dtype)

    operands = (
        model_output,
        target,
        coefficient("direction_weight", direction_weight),
        coefficient("weight", weight),
        sample,
        coefficient("sample_coef", sample_coef),
        coefficient("output_coef", output_coef),
    )
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.reflow_kernels.aligned_v_loss
    if dispatch.runs_directly("aligned_v_loss", backend, strict, *operands):
        run = _Direct.apply if model_output.requires_grad and torch.is_grad_enabled() else _run
    loss, parts, _ = run(*operands, float(eps), backend, strict)
    return AlignedVLoss(loss, *parts.detach().unbind(0))


def _run(
    model_output: Tensor,
    target: Tensor,
    direction_weight: Tensor,
    weight: Tensor | None,
    sample: Tensor | None,
    sample_coef: Tensor | None,
    output_coef: Tensor | None,
    eps: float,
    backend: str,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], parts [3, B] = mse, magnitude, cosine, stats [6, B] for the Triton gradient, zeros for PyTorch)."""
    chosen = dispatch.select("aligned_v_loss", model_output.device, backend, strict)
    if chosen == "triton" and model_output.numel():
        run: Callable[..., tuple[Tensor, Tensor, Tensor]] = dispatch.triton_module("aligned_v").forward
        return run(model_output, target, direction_weight, weight, sample, sample_coef, output_coef, eps, strict)
    result = reference.aligned_v_loss(
        model_output,
        target,
        direction_weight=direction_weight,
        sample=sample,
        sample_coef=sample_coef,
        output_coef=output_coef,
        weight=weight,
        eps=eps,
    )
    stats = result.mse.new_zeros((STATS, model_output.shape[0]))
    return result.loss, torch.stack(result[1:]), stats


_forward = torch.library.custom_op("reflow_kernels::aligned_v_loss", _run, mutates_args=())


@_forward.register_fake
def _(
    model_output: Tensor,
    target: Tensor,
    direction_weight: Tensor,
    weight: Tensor | None,
    sample: Tensor | None,
    sample_coef: Tensor | None,
    output_coef: Tensor | None,
    eps: float,
    backend: str,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = reference.accumulate_dtype(model_output, target, sample)
    batch = model_output.shape[0]
    return (
        model_output.new_empty((), dtype=dtype),
        model_output.new_empty((3, batch), dtype=dtype),
        model_output.new_empty((STATS, batch), dtype=dtype),
    )


def _run_backward(
    grad_loss: Tensor,
    model_output: Tensor,
    target: Tensor,
    direction_weight: Tensor,
    weight: Tensor | None,
    sample: Tensor | None,
    sample_coef: Tensor | None,
    output_coef: Tensor | None,
    stats: Tensor,
    eps: float,
    backend: str,
    strict: bool,
) -> Tensor:
    """The gradient to model_output, in its dtype and sample order."""
    chosen = dispatch.select("aligned_v_loss", model_output.device, backend, strict)
    if chosen == "triton" and model_output.numel():
        run: Callable[..., Tensor] = dispatch.triton_module("aligned_v").backward
        return run(grad_loss, model_output, target, sample, sample_coef, output_coef, stats, strict)
    grad = reference.aligned_v_loss_backward(
        grad_loss,
        model_output,
        target,
        direction_weight=direction_weight,
        sample=sample,
        sample_coef=sample_coef,
        output_coef=output_coef,
        weight=weight,
        eps=eps,
    )
    return layout.settle(grad, layout.leading_order(model_output))


_backward = torch.library.custom_op("reflow_kernels::aligned_v_loss_backward", _run_backward, mutates_args=())


@_backward.register_fake
def _(grad_loss: Tensor, model_output: Tensor, *rest: Any) -> Tensor:
    return layout.empty((model_output.shape[0],), model_output, layout.leading_order(model_output))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    model_output, target, direction_weight, weight, sample, sample_coef, output_coef, eps, backend, strict = inputs
    ctx.save_for_backward(model_output, target, direction_weight, weight, sample, sample_coef, output_coef, output[2])
    ctx.options = (eps, backend, strict)
    ctx.set_materialize_grads(False)  # zeros for parts and stats would be two more launches in every backward


def _autograd(ctx: Any, grad_loss: Tensor | None, grad_parts: Any, grad_stats: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 10
    grad = torch.ops.reflow_kernels.aligned_v_loss_backward(grad_loss, *ctx.saved_tensors, *ctx.options)
    return (grad, *(None,) * 9)


_forward.register_autograd(_autograd, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The same two functions as autograd's own, for calls that need no dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        # With a setup_context of its own every call would look up this function's signature.
        output = _run(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_parts: Any, grad_stats: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: the registered op says that it has no second derivative
            return _autograd(ctx, grad_loss, grad_parts, grad_stats)
        if grad_loss is None:
            return (None,) * 10
        return _run_backward(grad_loss, *ctx.saved_tensors, *ctx.options), *(None,) * 9
