"""The aligned-v loss: magnitude and direction of a predicted velocity, differentiable in ``model_output``.

The formula is that of :func:`reflow_kernels.reference.aligned_v_loss`. The gradient to v^ is linear in d, v^ and v once
a few numbers per sample are known; the kernels save these in ``stats`` [6, B] and nothing of the operands' size. On a
CPU, where operands are small and time goes by operations, the gradient takes the rows that the loss has worked out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch, layout, plans, reference
from .reference import AlignedVLoss, PerSample
from .registration import Op

STATS = 6


class Operands(NamedTuple):
    model_output: Tensor
    target: Tensor
    direction_weight: Tensor
    weight: Tensor | None
    sample: Tensor | None
    sample_coef: Tensor | None
    output_coef: Tensor | None
    eps: float
    backend: str
    strict: bool


class OperandsBackward(NamedTuple):
    grad_loss: Tensor
    model_output: Tensor
    target: Tensor
    direction_weight: Tensor
    weight: Tensor | None
    sample: Tensor | None
    sample_coef: Tensor | None
    output_coef: Tensor | None
    stats: Tensor
    eps: float
    backend: str
    strict: bool


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
    given = (model_output, target, direction_weight, weight, sample, sample_coef, output_coef)
    key = plans.signature("aligned_v_loss", given, eps, backend, strict)
    plan = plans.find(key) or plans.keep(key, _plan(*given, eps, backend, strict))
    result: AlignedVLoss = plan(*given)
    return result


def _plan(
    model_output: Tensor,
    target: Tensor,
    direction_weight: PerSample,
    weight: PerSample | None,
    sample: Tensor | None,
    sample_coef: PerSample | None,
    output_coef: PerSample | None,
    eps: float,
    backend: str,
    strict: bool,
) -> plans.Plan:
    """Check a call and say how calls like it run."""
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
    checks.per_sample("direction_weight", direction_weight, model_output, batch)
    coefs = {"direction_weight": direction_weight, "weight": weight}
    coefs |= {"sample_coef": sample_coef, "output_coef": output_coef}
    for name, coef in coefs.items():
        if coef is not None:
            checks.per_sample(name, coef, model_output, batch)
    tensors = [value for value in (sample, *coefs.values()) if isinstance(value, Tensor)]
    direct = dispatch.runs_directly("aligned_v_loss", backend, strict, model_output, target, *tensors)
    operands = [value for value in (model_output, target, sample) if value is not None]
    triton = direct and dispatch.select("aligned_v_loss", model_output.device, backend, strict) == "triton"
    kept = triton and model_output.numel() > 0 and layout.shared_order(*operands) is not None
    grad = model_output.requires_grad and torch.is_grad_enabled()
    function = (_Direct if triton else _DirectOnTorch) if direct and grad else None
    return _Call(direct, kept, function, reference.accumulate_dtype(*operands), (float(eps), backend, strict))


class _Call:
    """Calls of one signature: through the dispatcher, with ``direct`` around it, with ``kept`` by prepared launches;
    ``function`` is autograd's where it is needed around the dispatcher."""

    def __init__(
        self,
        direct: bool,
        kept: bool,
        function: type[torch.autograd.Function] | None,
        dtype: torch.dtype,
        options: tuple[float, str, bool],
    ):
        self.direct, self.function, self.dtype, self.options = direct, function, dtype, options
        self.kernels = dispatch.triton_module("aligned_v").Kept() if kept else None

    def __call__(
        self,
        model_output: Tensor,
        target: Tensor,
        direction_weight: PerSample,
        weight: PerSample | None,
        sample: Tensor | None,
        sample_coef: PerSample | None,
        output_coef: PerSample | None,
    ) -> AlignedVLoss:
        values = (direction_weight, weight, sample_coef, output_coef)
        direction, weight, sample_coef, output_coef = plans.fill(
            values, model_output, model_output.shape[0], self.dtype
        )
        operands = (model_output, target, direction, weight, sample, sample_coef, output_coef)
        if self.function is not None:
            parts: list[Tensor] = []
            loss = self.function.apply(self, model_output, operands[1:], parts)  # type: ignore[no-untyped-call]
            return AlignedVLoss(loss, *parts)
        if self.kernels is not None:
            loss, found, _ = self.kernels.forward(*operands, self.options[0])
        else:
            run = _LOSS.run if self.direct else _LOSS
            loss, found, _ = run(Operands._make((*operands, *self.options)))
        return AlignedVLoss(loss, *found.detach().unbind(0))


def _run(o: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], parts [3, B] = mse, magnitude, cosine, stats [6, B] for the Triton gradient, zeros for PyTorch)."""
    if _on_triton(o):
        results: tuple[Tensor, Tensor, Tensor] = dispatch.triton_module("aligned_v").forward(*o[:8], o.strict)
        return results
    result = reference.aligned_v_loss(o.model_output, o.target, eps=o.eps, **_options(o))
    stats = result.mse.new_zeros((STATS, o.model_output.shape[0]))
    return result.loss, torch.stack(result[1:]), stats


def _fake(o: Operands) -> tuple[Tensor, Tensor, Tensor]:
    dtype = reference.accumulate_dtype(o.model_output, o.target, o.sample)
    batch = o.model_output.shape[0]
    return (
        o.model_output.new_empty((), dtype=dtype),
        o.model_output.new_empty((3, batch), dtype=dtype),
        o.model_output.new_empty((STATS, batch), dtype=dtype),
    )


def _run_backward(o: OperandsBackward) -> Tensor:
    """The gradient to model_output, in its dtype and sample order."""
    if _on_triton(o):
        grad: Tensor = dispatch.triton_module("aligned_v").backward(*o[:9], o.strict)
        return grad
    grad = reference.aligned_v_loss_backward(o.grad_loss, o.model_output, o.target, eps=o.eps, **_options(o))
    return layout.settle(grad, layout.leading_order(o.model_output))


def _fake_backward(o: OperandsBackward) -> Tensor:
    return layout.empty((o.model_output.shape[0],), o.model_output, layout.leading_order(o.model_output))


def _on_triton(o: Operands | OperandsBackward) -> bool:
    device = o.model_output.device
    return dispatch.select("aligned_v_loss", device, o.backend, o.strict) == "triton" and o.model_output.numel() > 0


def _options(o: Operands | OperandsBackward) -> dict[str, Any]:
    names = ("direction_weight", "sample", "sample_coef", "output_coef", "weight")
    return {name: getattr(o, name) for name in names}


_LOSS = Op("aligned_v_loss", Operands, _run, _fake, results=3)
_BACKWARD = Op("aligned_v_loss_backward", OperandsBackward, _run_backward, _fake_backward, results=1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, eps, backend, strict = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.options = (eps, backend, strict)
    ctx.set_materialize_grads(False)  # zeros for parts and stats would be two more launches in every backward


def _autograd(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    rest = (None,) * (len(Operands._fields) - 1)
    if grad_loss is None:
        return (None, *rest)
    return (_BACKWARD(OperandsBackward(grad_loss, *ctx.saved_tensors, *ctx.options)), *rest)


_LOSS.definition.register_autograd(_autograd, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The same as autograd's own function, for calls that need no dispatcher. What gets no gradient comes as one
    argument and goes as ``parts``: every argument and result that autograd looks at costs the host time."""

    @staticmethod
    def forward(
        ctx: Any, call: Any, model_output: Tensor, others: tuple[Tensor | None, ...], parts: list[Tensor]
    ) -> Tensor:
        loss: Tensor
        if call.kernels is not None:
            loss, found, stats = call.kernels.forward(model_output, *others, call.options[0])
        else:
            loss, found, stats = _run(Operands._make((model_output, *others, *call.options)))
        ctx.save_for_backward(model_output, *others, stats)
        ctx.call = call
        parts += found.unbind(0)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the registered op says that it has no second derivative
            grad = _BACKWARD(OperandsBackward(grad_loss, *saved, *call.options))
        elif call.kernels is not None:
            grad = call.kernels.backward(grad_loss, *saved)
        else:
            grad = _run_backward(OperandsBackward(grad_loss, *saved, *call.options))
        return None, grad, None, None


class _DirectOnTorch(torch.autograd.Function):
    """The same in PyTorch, where the gradient takes what the loss has worked out already."""

    @staticmethod
    def forward(
        ctx: Any, call: Any, model_output: Tensor, others: tuple[Tensor | None, ...], parts: list[Tensor]
    ) -> Tensor:
        target, direction_weight, weight, sample, sample_coef, output_coef = others
        assert target is not None and direction_weight is not None
        ctx.worked_out = reference.AlignedV(model_output, target, sample, sample_coef, output_coef, call.options[0])
        result = ctx.worked_out.loss(direction_weight, weight)
        ctx.save_for_backward(model_output, *others)
        ctx.call = call
        parts += result[1:]
        loss: Tensor = result.loss
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # autograd refuses operands that were changed meanwhile
        if torch.is_grad_enabled():  # create_graph, as above
            stats = saved[0].new_zeros((STATS, saved[0].shape[0]))
            operands = OperandsBackward._make((grad_loss, *saved, stats, *ctx.call.options))
            return None, _BACKWARD(operands), None, None
        model_output, _, direction_weight, weight, *_, output_coef = saved
        grad = ctx.worked_out.gradient(grad_loss, model_output, direction_weight, weight, output_coef)
        return None, layout.settle(grad, layout.leading_order(model_output)), None, None
