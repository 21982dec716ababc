"""The optimizer ops in plain PyTorch: AdamW with the gradient's scale, the weights' average and their copy.

Everything is in place. Arithmetic is that of ``param``'s dtype, fp32 or fp64 for oracles.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

BLOCK = 256  # elements that share one scale in 8-bit states

Scalar = Tensor | float


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
) -> None:
    """One step of AdamW (arXiv 1711.05101) in the order of torch.optim.AdamW, and what follows it.

        g = grad_scale grad
        param *= 1 - learning_rate weight_decay
        exp_avg += (1 - beta1) (g - exp_avg);   exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) g^2
        param -= learning_rate / c1 * exp_avg / (sqrt(exp_avg_sq) / sqrt(c2) + eps),   c = 1 - beta^step
        average += (1 - decay) (param - average);   copy = param

    ``step`` counts from 1: it is the number of this step.
    """
    g = grad.to(param.dtype)
    if grad_scale is not None:
        g = g * grad_scale.to(param.dtype)
    correction1, correction2 = correction(beta1, step), correction(beta2, step)
    root2 = correction2.sqrt() if isinstance(correction2, Tensor) else math.sqrt(correction2)
    size = -learning_rate / correction1
    if isinstance(learning_rate, Tensor):
        param.mul_((1 - learning_rate * weight_decay).to(param.dtype))
    else:
        param.mul_(1 - learning_rate * weight_decay)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root2 = root2.to(param.dtype) if isinstance(root2, Tensor) else root2
    denominator = exp_avg_sq.sqrt().div_(root2).add_(eps)
    if isinstance(size, Tensor):
        param.add_(size.to(param.dtype) * (exp_avg / denominator))
    else:
        param.addcdiv_(exp_avg, denominator, value=size)
    if average is not None:
        weight = 1 - decay
        average.lerp_(param, weight.to(param.dtype) if isinstance(weight, Tensor) else weight)
    if copy is not None:
        copy.copy_(param)


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
) -> None:
    """The same with moments of 8 bits a value (arXiv 2110.02861), in the layout of bitsandbytes.

    A moment is qmap[state] * absmax of its block of 256. The step is taken with the new moments in full precision,
    which are then rounded to the nearest entries of their maps.
    """
    moments = [dequantize(*args).to(param.dtype) for args in ((state1, absmax1, qmap1), (state2, absmax2, qmap2))]
    fused_adamw(
        param,
        grad,
        *moments,
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        step=step,
        grad_scale=grad_scale,
        average=average,
        decay=decay,
        copy=copy,
    )
    for moment, state, absmax, qmap in zip(moments, (state1, state2), (absmax1, absmax2), (qmap1, qmap2), strict=True):
        codes, scales = quantize(moment, qmap)
        state.copy_(codes)
        absmax.copy_(scales)


def correction(beta: float, step: Scalar) -> Scalar:
    """1 - beta^step without cancellation where the step is on the device."""
    if not isinstance(step, Tensor):
        left: float = beta**step
        return 1 - left
    fallen: Tensor = -torch.expm1(step.double() * logarithm(beta))
    return fallen


def logarithm(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


def dequantize(state: Tensor, absmax: Tensor, qmap: Tensor) -> Tensor:
    """Values [N] of codes [N] uint8: the map's entry times the scale of the block of 256."""
    values = qmap[state.long()]
    return values.mul_(absmax.repeat_interleave(BLOCK)[: state.numel()])


def quantize(values: Tensor, qmap: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [N] uint8, scales [ceil(N / 256)]): the nearest entries of an ascending map, the lower one where two are
    equally near. A block of zeros has scale 0.
    """
    count = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -count % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1) if count else values.new_zeros(0)
    shares = blocks / torch.where(absmax > 0, absmax, 1.0).unsqueeze(1)
    middles = (qmap[:-1] + qmap[1:]) * 0.5
    codes = torch.bucketize(shares.view(-1), middles.to(shares.dtype)).to(torch.uint8)
    return codes[:count], absmax


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 ascending fp32 values of 8-bit moments: signed for the first, unsigned for the second (arXiv 2110.02861).

    Seven decades below 1, the smallest with the fewest values: in decade d of 0 to 6, from 1e-6 up, 2^d cells of equal
    width between a tenth and the whole (twice as many unsigned), each stood for by its middle; 0 and 1 beside them.
    """
    values = [torch.zeros(1), torch.ones(1)]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade * (1 if signed else 2) + 1)
        middles = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values
