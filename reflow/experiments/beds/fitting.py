"""One trainer for chord students and for what is none: optimizer, warm-up, clipping and average are its own, the loss is the caller's.

So that another method, trained by a loss of its own, is compared at the same batch, optimizer and average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from reflow.experiments.beds.exact import Correction

Loss = Callable[[Correction, list[Tensor]], Tensor]  # (network, its average's tensors) -> mean over all rows of all networks
Weights = dict[str, Tensor]


def fit(network: Correction, steps: int, loss: Loss, *, learning_rate: float) -> list[Weights]:
    """The averages of networks that lie side by side (`Correction.seeds`) after so many steps, one dict for each.

    The loss is asked once a step for all of them, with B rows of each in turn; the gradient of each is clipped to length 1 by itself.
    """
    parameters = list(network.parameters())
    count, average = len(parameters[0]), [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    warmup = min(20, steps // 10)
    for step in range(steps):
        gradients = torch.autograd.grad(loss(network, average) * count, parameters)
        size = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        kept = (1.0 / size.clamp(min=1e-12)).clamp(max=1.0).view(-1, 1, 1)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * kept
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate(step, steps, warmup)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1.0 - min(0.99, (1 + step) / (10 + step)))
    names = [name for name, _ in network.named_parameters()]
    return [{name: value[i : i + 1].cpu() for name, value in zip(names, average, strict=True)} for i in range(count)]


def rate(step: int, steps: int, warmup: int) -> float:
    """Warm-up, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def side_by_side(network: Correction, each: Sequence[Weights]) -> Correction:
    """The network with the weights of single ones, one after the other."""
    network.load_state_dict({key: torch.cat([one[key] for one in each]) for key in each[0]})
    return network
