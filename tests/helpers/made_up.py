"""Weights that are the same everywhere without a file or a random generator, so that numbers of other code for them can be written down."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def numbers(count: int, which: int) -> torch.Tensor:
    """fp64 [count] of mean 0 and variance 1 that look random: far digits of sines."""
    sines = torch.sin((torch.arange(count, dtype=torch.float64) + 1) * 12.9898 + which * 78.233) * 43758.5453
    return (sines - sines.floor() - 0.5) * 12**0.5


def weights(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """fp32 weights in place of those of a state, by their names and shapes: matrices that keep variances, biases and means near 0, scales and
    variances near 1."""
    made = {}
    for which, name in enumerate(sorted(state)):
        old = state[name]
        new = numbers(old.numel(), which).reshape(old.shape)
        if not old.is_floating_point():
            new = old
        elif old.ndim > 1:
            new = new * (2 / old[0].numel()) ** 0.5
        elif name.endswith(("bias", "mean", "embedding")):
            new = 0.1 * new
        else:
            new = 1 + 0.1 * new
        made[name] = new.to(torch.float32) if old.is_floating_point() else new
    return made


def images(count: int, height: int, width: int) -> torch.Tensor:
    """uint8 [count, 3, height, width]: smooth colours with some grain."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height, dtype=torch.float64), torch.linspace(0, 1, width, dtype=torch.float64), indexing="ij")
    waves = torch.stack([torch.sin(3 * (i + 1) * x + 2 * (i + c) * y + c) for i in range(count) for c in range(3)]).reshape(count, 3, height, width)
    grain = numbers(waves.numel(), 999).reshape(waves.shape)
    return (128 + 80 * waves + 12 * grain).clamp(0, 255).to(torch.uint8)
