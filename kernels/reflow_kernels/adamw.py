"""One step of AdamW in one pass over flat shards, with the gradient's scale, the weights' average and their copy."""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch, launch, plans, reference
from .adamw_reference import BLOCK, Scalar, correction, logarithm
from .registration import Op

SCALARS = ("grad_scale", "learning_rate", "step", "decay")
COUNTS = (torch.float32, torch.float64, torch.int32, torch.int64)
DTYPES = {"grad": checks.FLOATS, "copy": checks.FLOATS, "state1": (torch.uint8,), "state2": (torch.uint8,)}


class Operands(NamedTuple):
    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    average: Tensor | None
    copy: Tensor | None
    grad_scale: Tensor | None
    learning_rate: Tensor | None
    step: Tensor | None
    decay: Tensor | None
    rate: float  # what the three scalars are where they are no tensors
    number: float
    keep: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    backend: str
    strict: bool


class Operands8bit(NamedTuple):
    param: Tensor
    grad: Tensor
    state1: Tensor
    state2: Tensor
    absmax1: Tensor
    absmax2: Tensor
    qmap1: Tensor
    qmap2: Tensor
    average: Tensor | None
    copy: Tensor | None
    grad_scale: Tensor | None
    learning_rate: Tensor | None
    step: Tensor | None
    decay: Tensor | None
    rate: float
    number: float
    keep: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    backend: str
    strict: bool


def fused_adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    learning_rate: Scalar,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: Scalar,
    grad_scale: Tensor | None = None,
    average: Tensor | None = None,
    decay: Scalar = 0.0,
    copy: Tensor | None = None,
    backend: str = "auto",
    strict: bool = False,
) -> None:
    """One step of AdamW (arXiv 1711.05101) as torch.optim.AdamW takes it, in place, and what a trainer does around it.

        g = grad_scale grad
        param *= 1 - learning_rate weight_decay
        exp_avg += (1 - beta1) (g - exp_avg);   exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) g^2
        param -= learning_rate / c1 * exp_avg / (sqrt(exp_avg_sq) / sqrt(c2) + eps),   c = 1 - beta^step
        average += (1 - decay) (param - average);   copy = param

    Args:
        param, exp_avg, exp_avg_sq: [N] fp32, contiguous: a flat shard of master weights and its moments.
        grad: [N] fp16, bf16, fp32 or fp64; it is read and not changed.
        learning_rate: float, or a one-element fp32 or fp64 tensor on the device, which a captured graph reads anew.
        beta1, beta2, eps, weight_decay: floats.
        step: the number of this step, from 1: an int, or a one-element tensor on the device.
        grad_scale: None (1) or a one-element fp32 or fp64 tensor, e.g. what clips the global norm. One that is not
            finite makes everything so.
        average: None, or [N] fp32: an exponential moving average of the new weights.
        decay: float, or a one-element fp32 or fp64 tensor: what the step leaves of the average.
        copy: None, or [N] in any float dtype: the new weights, for the network.
        backend: "auto", "triton" or "torch". strict: refuse fallbacks.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or layout, tensors that share memory, or an argument that
            requires a gradient.
        RuntimeError: the asked backend cannot run here.
    """
    tensors, scalars = (param, grad, exp_avg, exp_avg_sq, average, copy), (grad_scale, learning_rate, step, decay)
    _take(_ADAMW, tensors, scalars, (beta1, beta2, eps, weight_decay), backend, strict)


def fused_adamw8bit(
    param: Tensor,
    grad: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    qmap1: Tensor,
    qmap2: Tensor,
    *,
    learning_rate: Scalar,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: Scalar,
    grad_scale: Tensor | None = None,
    average: Tensor | None = None,
    decay: Scalar = 0.0,
    copy: Tensor | None = None,
    backend: str = "auto",
    strict: bool = False,
) -> None:
    """:func:`fused_adamw` with moments of 8 bits a value (arXiv 2110.02861), in the layout of bitsandbytes.

    A moment is qmap[state] * absmax of its block of 256. The step is taken with the new moments in full precision,
    which are then rounded to the nearest entries of their maps, the lower one where two are equally near.

    Args:
        state1, state2: [N] uint8, contiguous. absmax1, absmax2: [ceil(N / 256)] fp32.
        qmap1, qmap2: [256] fp32, ascending: ``reference.dynamic_map(True)`` and ``(False)``, on the device.
        The others are those of :func:`fused_adamw`.

    Raises:
        As :func:`fused_adamw`.
    """
    tensors = (param, grad, state1, state2, absmax1, absmax2, qmap1, qmap2, average, copy)
    scalars = (grad_scale, learning_rate, step, decay)
    _take(_ADAMW8BIT, tensors, scalars, (beta1, beta2, eps, weight_decay), backend, strict)


def _take(
    op: Op, tensors: tuple[Any, ...], scalars: tuple[Any, ...], floats: tuple[float, ...], backend: str, strict: bool
) -> None:
    """One step: ``tensors`` are the first operands of ``op``, ``scalars`` are those of SCALARS."""
    key = plans.signature(op.name, (*tensors, *scalars), backend, strict)
    plan = plans.find(key) or plans.keep(key, _plan(op, tensors, scalars, backend, strict))
    plan(tensors, scalars, floats)


def _plan(op: Op, tensors: tuple[Any, ...], scalars: tuple[Any, ...], backend: str, strict: bool) -> plans.Plan:
    """Check a call and say how calls like it run."""
    param = tensors[0]
    size = param.numel() if isinstance(param, Tensor) else 0
    sizes = dict.fromkeys(("absmax1", "absmax2"), -(-size // BLOCK)) | dict.fromkeys(("qmap1", "qmap2"), BLOCK)
    for name, value in zip(op.operands._fields, tensors, strict=False):
        if value is not None or name not in ("average", "copy"):
            _flat(name, value, param, DTYPES.get(name, (torch.float32,)), sizes.get(name, size))
    for name, value in zip(SCALARS, scalars, strict=True):
        _check_scalar(name, value, param)
    given = [value for value in (*tensors, *scalars) if isinstance(value, Tensor)]
    direct = dispatch.runs_directly(op.name, backend, strict, *given)
    kept = direct and dispatch.select(op.name, param.device, backend, strict) == "triton" and size > 0
    return _Calls(op, direct, dispatch.triton_module("adamw") if kept else None, (backend, strict))


class _Calls:
    """Calls of one signature: through the dispatcher, with ``direct`` around it, with ``kernels`` by a prepared launch.

    Around it on a CPU too, where a small network has many small parameters and the dispatcher takes longer than their
    step.
    """

    def __init__(self, op: Op, direct: bool, kernels: Any, options: tuple[str, bool]):
        self.op, self.direct, self.kernels, self.options = op, direct, kernels, options
        self.launch: launch.Launch | None = None
        self.apart = plans.Apart(functools.partial(_check_memory, op))

    def __call__(self, tensors: tuple[Any, ...], scalars: tuple[Any, ...], floats: tuple[float, ...]) -> None:
        places, rates = _split(scalars)
        given = (*tensors, *places)
        if self.direct:
            self.apart(given)
        else:
            _check_memory(self.op, *given)
        floats = (*rates, *map(float, floats))
        if self.kernels is not None:
            moments = given[2:-6] if self.op is _ADAMW8BIT else (*given[2:4], None, None, None, None)
            if self.launch is None:
                self.launch = self.kernels.prepare(*given[:2], self.kernels.Moments(*moments), *tensors[-2:])
            of_step = _numbers(*floats)
            launch.start(self.launch, *given[:2], *moments, *given[-6:], tensors[0].numel(), *of_step)
        else:
            run = self.op.run if self.direct else self.op
            run(self.op.operands._make((*given, *floats, *self.options)))
        if self.direct:
            torch.autograd.graph.increment_version(self._written(tensors))

    def _written(self, tensors: tuple[Any, ...]) -> tuple[Tensor, ...]:
        named = zip(self.op.operands._fields, tensors, strict=False)
        return tuple([value for name, value in named if name in self.op.mutates and value is not None])


def _flat(name: str, value: object, param: Tensor, dtypes: tuple[torch.dtype, ...], size: int) -> None:
    """A contiguous [size] on param's device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor [{size}].")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}; expected {checks._names(dtypes)}.")
    if value.dim() != 1 or value.shape[0] != size:
        raise ValueError(f"{name} has shape {list(value.shape)}; expected [{size}], flat: pass {name}.view(-1).")
    if not value.is_contiguous():
        raise ValueError(f"{name} has stride {value.stride(0)}; expected 1, a contiguous shard.")
    if value.device != param.device:
        raise ValueError(f"{name} is on {value.device}; expected {param.device}, the device of param.")
    checks.no_grad(name, value, "an optimizer's step has none")


def _check_scalar(name: str, value: object, param: Tensor) -> None:
    """A number, or a tensor of one element on param's device; a gradient's scale is no number."""
    if isinstance(value, Tensor):
        dtypes = COUNTS if name == "step" else checks.PRECISE
        if value.dtype not in dtypes:
            raise TypeError(f"{name} has dtype {value.dtype}; expected {checks._names(dtypes)}.")
        if value.numel() != 1:
            raise ValueError(f"{name} has shape {list(value.shape)}; expected one element.")
        checks.same_device(name, value, param, "param")
        checks.no_grad(name, value, "an optimizer's step has none")
    elif name == "grad_scale" and value is not None:
        raise TypeError(f"{name} is a {type(value).__name__}; expected None or a one-element tensor.")
    elif name != "grad_scale" and not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a number or a one-element tensor.")


def _split(scalars: tuple[Any, ...]) -> tuple[tuple[Tensor | None, ...], tuple[float, ...]]:
    """Those that are tensors, None where they are none; and the last three where they are numbers, 1 where they are
    tensors."""
    places = tuple([value.reshape(()) if isinstance(value, Tensor) else None for value in scalars])
    rates = tuple([1.0 if isinstance(value, Tensor) else float(value) for value in scalars[1:]])
    if rates[1] < 1:
        raise ValueError(f"step is {rates[1]:g}; expected the number of this step, from 1.")
    return places, rates


def _check_memory(op: Op, *given: Tensor | None) -> None:
    """Refuse what is written where another program of the kernel still reads or writes."""
    if torch.compiler.is_compiling() or any(t is not None and type(t) not in dispatch.PLAIN for t in given):
        return
    places = [
        (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size(), name)
        for name, tensor in zip(op.operands._fields, given, strict=False)
        if tensor is not None and tensor.numel()
    ]
    ours = sorted(place for place in places if place[2] in op.mutates)
    pairs = list(zip(ours, ours[1:], strict=False))
    pairs += [(place, other) for other in places if other[2] not in op.mutates for place in ours]
    for (begin, end, one), (first, last, other) in pairs:
        if begin < last and first < end:
            raise ValueError(f"{one} and {other} share memory; give each a buffer of its own.")


def _run(o: Operands) -> None:
    if _on_triton("fused_adamw", o):
        _launch(o, o.exp_avg, o.exp_avg_sq)
    elif o.param.numel():
        reference.fused_adamw(*o[:4], average=o.average, copy=o.copy, **_options(o))


def _run8bit(o: Operands8bit) -> None:
    if _on_triton("fused_adamw8bit", o):
        _launch(o, *o[2:8])
    elif o.param.numel():
        reference.fused_adamw8bit(*o[:8], average=o.average, copy=o.copy, **_options(o))


_ADAMW = Op(
    "fused_adamw",
    Operands,
    _run,
    lambda o: None,
    results=0,
    mutates=("param", "exp_avg", "exp_avg_sq", "average", "copy"),
)
_ADAMW8BIT = Op(
    "fused_adamw8bit",
    Operands8bit,
    _run8bit,
    lambda o: None,
    results=0,
    mutates=("param", "state1", "state2", "absmax1", "absmax2", "average", "copy"),
)


def _on_triton(name: str, o: Operands | Operands8bit) -> bool:
    return dispatch.select(name, o.param.device, o.backend, o.strict) == "triton" and o.param.numel() > 0


def _options(o: Operands | Operands8bit) -> dict[str, Any]:
    return {
        "learning_rate": o.rate if o.learning_rate is None else o.learning_rate,
        "step": o.number if o.step is None else o.step,
        "decay": o.keep if o.decay is None else o.decay,
        **{name: getattr(o, name) for name in ("beta1", "beta2", "eps", "weight_decay", "grad_scale")},
    }


def _launch(o: Operands | Operands8bit, *moments: Tensor) -> None:
    """One call of which nothing is kept."""
    kernels = dispatch.triton_module("adamw")
    scalars = kernels.Scalars(o.grad_scale, o.learning_rate, o.step, o.decay)
    numbers = _numbers(o.rate, o.number, o.keep, o.beta1, o.beta2, o.eps, o.weight_decay)
    kernels.adamw(o.param, o.grad, kernels.Moments(*moments), o.average, o.copy, scalars, numbers)


@functools.lru_cache(maxsize=256)
def _numbers(
    rate: float, number: float, keep: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> Any:
    """The kernel's numbers, each computed in fp64 as PyTorch computes it; the same for all parameters of a step."""
    return dispatch.triton_module("adamw").Numbers(
        rate=rate,
        shrink=1 - rate * weight_decay,
        weight_decay=weight_decay,
        correction1=float(correction(beta1, number)),
        root2=math.sqrt(correction(beta2, number)),
        weight1=1 - beta1,
        beta2=beta2,
        weight2=1 - beta2,
        eps=eps,
        average_weight=1 - keep,
        logarithm1=logarithm(beta1),
        logarithm2=logarithm(beta2),
    )
