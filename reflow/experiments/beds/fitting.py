"""The optimizer's side of a student on the exact bed, for losses that are no recipe's: as `students.train` has it, one network at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reflow.experiments.beds.exact import Correction
from reflow.experiments.beds.students import rate


def fit(network: Correction, loss: Callable[[int], Tensor], steps: int, *, learning_rate: float = 2e-3) -> dict[str, Tensor]:
    """Weights of the average after so many steps down `loss(step)`, a scalar; `network` is left as it ended."""
    parameters = list(network.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    warmup = min(20, steps // 10)
    for step in range(steps):
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss(step), parameters), strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate(step, steps, warmup)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1.0 - min(0.99, (1 + step) / (10 + step)))
    names = [name for name, _ in network.named_parameters()]
    return {name: value.cpu() for name, value in zip(names, average, strict=True)}
