"""Restart: back to a noisier level by noise and down again by the flow, several times (Xu et al., arXiv 2306.14878, algorithm 1).

Noise levels are sigma / alpha, z is at alpha = 1. Time runs from t=1 (noise) to t=0 (data).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reflow.experiments.beds.samplers import Eps, churned, karras, noised

LOW, HIGH = 0.06, 0.30  # the levels between which a path is restarted: the paper's for CIFAR-10
INNER = 3  # Heun steps of each way down


def split(steps: int) -> tuple[int, int]:
    """Heun steps of the path itself, and how often it is restarted: half of the steps each; at first the path alone."""
    times = (steps - -(-steps // 2)) // INNER
    return steps - times * INNER, times


def restarted(eps: Eps, z: Tensor, largest: float, smallest: float, steps: int, generator: torch.Generator) -> Tensor:
    """z at level `smallest` from z at level `largest`, in so many Heun steps in all: along Karras's levels, of which one is `LOW`, and there
    restarted from `HIGH`."""
    own, times = split(steps)
    levels = karras(largest, smallest, own)
    if not times or not smallest < LOW < HIGH < largest:
        return churned(eps, z, karras(largest, smallest, steps), generator, churn=0.0)
    at = int((levels[1:-1] - LOW).abs().argmin()) + 1 if own > 1 else 0
    if not at:
        return churned(eps, z, karras(largest, smallest, steps), generator, churn=0.0)
    low = float(levels[at])
    high = max(HIGH, 1.5 * low)
    z = churned(eps, z, levels[: at + 1], generator, churn=0.0)
    for _ in range(times):
        z = noised(z, math.sqrt(high**2 - low**2), generator)
        z = churned(eps, z, karras(high, low, INNER), generator, churn=0.0)
    return churned(eps, z, levels[at:], generator, churn=0.0)
