"""Maximum mean discrepancy of two feature sets by any kernel, in tiles: memory does not grow with the square of the number of images."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import torch

from reflow.evaluation.intervals import LEVEL, Interval
from reflow.evaluation.measures.checked import TILE

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # rows [n, D] and [m, D] to values [n, m]


def sums_between(kernel: Kernel, rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """[N] for each row the sum of the kernel over another set's rows."""
    return torch.cat([torch.stack([kernel(a, b).sum(1) for b in others.split(TILE)]).sum(0) for a in rows.split(TILE)])


def sums_within(kernel: Kernel, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([N] for each row the sum of a symmetric kernel over the other rows of its set, [N] the kernel of each with itself)."""
    alone, sums = [], torch.zeros(len(rows), dtype=rows.dtype)
    tiles, places = rows.split(TILE), sums.split(TILE)  # views of sums
    for i, a in enumerate(tiles):
        own = kernel(a, a)
        alone.append(own.diagonal().clone())
        places[i].add_(own.sum(1) - alone[-1])
        for j in range(i + 1, len(tiles)):
            values = kernel(a, tiles[j])
            places[i].add_(values.sum(1))
            places[j].add_(values.sum(0))
    return sums, torch.cat(alone)


def squared_mmd(kernel: Kernel, a: torch.Tensor, b: torch.Tensor, *, unbiased: bool = True, level: float = LEVEL) -> Interval:
    """Squared MMD of rows [N, D] and [M, D], N and M of 2 or more, with an interval over the rows of a, those of b fixed.

    Unbiased (Gretton et al. 2012, eq. 3; may be negative) or with every row's pair with itself (eq. 5; never negative, too large by the order
    of 1/N). The interval is a normal one by the first-order effect of each row, 2 (mean k to its own set - mean k to the other): it tells the
    spread over other images of the same model, and is too narrow where both sets are of one distribution, since that effect vanishes there.
    """
    n, m = len(a), len(b)
    (within_a, alone_a), (within_b, alone_b), between = sums_within(kernel, a), sums_within(kernel, b), sums_between(kernel, a, b)
    if unbiased:
        own_a, own_b = float(within_a.sum()) / (n * (n - 1)), float(within_b.sum()) / (m * (m - 1))
    else:
        own_a, own_b = float((within_a + alone_a).sum()) / n**2, float((within_b + alone_b).sum()) / m**2
    value = own_a + own_b - 2 * float(between.sum()) / (n * m)
    effect = 2 * (within_a / (n - 1) - between / m)
    half = NormalDist().inv_cdf((1 + level) / 2) * float(effect.std()) / math.sqrt(n)
    return Interval(value, value - half, value + half, n)
