"""One step of AdamW in one pass over flat shards, with the gradient's scale, the weights' average and their copy."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch, reference
from .adamw_reference import BLOCK, Scalar, correction, logarithm
from .registration import Op

SCALARS = ("grad_scale", "learning_rate", "step", "decay")
COUNTS = (torch.float32, torch.float64, torch.int32, torch.int64)


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
    written = {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    _check(written, {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}, grad, average, copy)
    scalars, plain = _scalars(param, grad_scale, learning_rate, step, decay)
    _check_memory(
        {**written, "average": average, "copy": copy}, {"grad": grad, **dict(zip(SCALARS, scalars, strict=True))}
    )
    numbers = (*plain, float(beta1), float(beta2), float(eps), float(weight_decay))
    given = (param, grad, exp_avg, exp_avg_sq, average, copy, *scalars)
    _call(_ADAMW, Operands._make((*given, *numbers, backend, strict)), (param, exp_avg, exp_avg_sq, average, copy))


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
    written = {"param": param, "state1": state1, "state2": state2}
    _check(written, {"state1": torch.uint8, "state2": torch.uint8}, grad, average, copy)
    scales, maps = {"absmax1": absmax1, "absmax2": absmax2}, {"qmap1": qmap1, "qmap2": qmap2}
    for name, value in {**scales, **maps}.items():
        _flat(name, value, param, (torch.float32,), BLOCK if name in maps else -(-param.numel() // BLOCK))
    scalars, plain = _scalars(param, grad_scale, learning_rate, step, decay)
    read = {"grad": grad, **maps, **dict(zip(SCALARS, scalars, strict=True))}
    _check_memory({**written, **scales, "average": average, "copy": copy}, read)
    numbers = (*plain, float(beta1), float(beta2), float(eps), float(weight_decay))
    given = (param, grad, state1, state2, absmax1, absmax2, qmap1, qmap2, average, copy, *scalars)
    written8bit = (param, state1, state2, absmax1, absmax2, average, copy)
    _call(_ADAMW8BIT, Operands8bit._make((*given, *numbers, backend, strict)), written8bit)


def _call(op: Op, operands: Any, written: tuple[Tensor | None, ...]) -> None:
    """Run the step directly where nothing wants to see the op, else through torch.library.

    On a CPU too, where a small network has many small parameters and the dispatcher takes longer than their step.
    """
    if dispatch.runs_directly(op.name, operands.backend, operands.strict, *_tensors(operands)):
        op.run(operands)
        torch.autograd.graph.increment_version(tuple(t for t in written if t is not None))
    else:
        op(operands)


def _tensors(operands: Any) -> Any:
    return (value for value in operands if isinstance(value, Tensor))


def _check(
    written: dict[str, Tensor],
    dtypes: dict[str, torch.dtype],
    grad: Tensor,
    average: Tensor | None,
    copy: Tensor | None,
) -> None:
    param = written["param"]
    size = param.numel() if isinstance(param, Tensor) else 0
    for name, value in written.items():
        _flat(name, value, param, (dtypes.get(name, torch.float32),), size)
    _flat("grad", grad, param, checks.FLOATS, size)
    if average is not None:
        _flat("average", average, param, (torch.float32,), size)
    if copy is not None:
        _flat("copy", copy, param, checks.FLOATS, size)


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


def _check_memory(written: dict[str, Tensor | None], read: dict[str, Tensor | None]) -> None:
    """Refuse what is written where another program of the kernel still reads or writes."""
    named = [*written.items(), *read.items()]
    if torch.compiler.is_compiling() or any(t is not None and type(t) not in dispatch.PLAIN for _, t in named):
        return
    places = [
        (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size(), name)
        for name, tensor in named
        if tensor is not None and tensor.numel()
    ]
    ours = sorted(place for place in places if place[2] in written)
    pairs = list(zip(ours, ours[1:], strict=False))
    pairs += [(place, other) for other in places if other[2] in read for place in ours]
    for (begin, end, one), (first, last, other) in pairs:
        if begin < last and first < end:
            raise ValueError(f"{one} and {other} share memory; give each a buffer of its own.")


def _scalars(
    param: Tensor, grad_scale: Tensor | None, learning_rate: Scalar, step: Scalar, decay: Scalar
) -> tuple[tuple[Tensor | None, ...], tuple[float, float, float]]:
    """(grad_scale, learning_rate, step and decay where they are tensors; the last three where they are numbers)."""
    if grad_scale is not None and not isinstance(grad_scale, Tensor):
        raise TypeError(f"grad_scale is a {type(grad_scale).__name__}; expected None or a one-element tensor.")
    device: list[Tensor | None] = []
    host: list[float] = []
    for name, value in zip(SCALARS, (grad_scale, learning_rate, step, decay), strict=True):
        if isinstance(value, Tensor):
            dtypes = COUNTS if name == "step" else checks.PRECISE
            if value.dtype not in dtypes:
                raise TypeError(f"{name} has dtype {value.dtype}; expected {checks._names(dtypes)}.")
            if value.numel() != 1:
                raise ValueError(f"{name} has shape {list(value.shape)}; expected one element.")
            checks.same_device(name, value, param, "param")
            checks.no_grad(name, value, "an optimizer's step has none")
            device.append(value.reshape(()))
            host.append(1.0)
        elif value is None or isinstance(value, numbers.Real):
            device.append(None)
            host.append(1.0 if value is None else float(value))
        else:
            raise TypeError(f"{name} is a {type(value).__name__}; expected a number or a one-element tensor.")
    if host[2] < 1:
        raise ValueError(f"step is {host[2]:g}; expected the number of this step, from 1.")
    return tuple(device), (host[1], host[2], host[3])


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
    """Start the kernel; its numbers are each computed in fp64 as PyTorch computes it."""
    kernels = dispatch.triton_module("adamw")
    numbers = kernels.Numbers(
        rate=o.rate,
        shrink=1 - o.rate * o.weight_decay,
        weight_decay=o.weight_decay,
        correction1=float(correction(o.beta1, o.number)),
        root2=math.sqrt(correction(o.beta2, o.number)),
        weight1=1 - o.beta1,
        beta2=o.beta2,
        weight2=1 - o.beta2,
        eps=o.eps,
        average_weight=1 - o.keep,
        logarithm1=logarithm(o.beta1),
        logarithm2=logarithm(o.beta2),
    )
    scalars = kernels.Scalars(o.grad_scale, o.learning_rate, o.step, o.decay)
    kernels.adamw(o.param, o.grad, kernels.Moments(*moments), o.average, o.copy, scalars, numbers)
