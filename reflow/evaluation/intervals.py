"""Means with their 95 % interval, by Student's t."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean of `count` independent values and the interval around it; low and high are None for a single value."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def half_width(self) -> float | None:
        return None if self.low is None else (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0; False where there is no interval."""
        return self.low is not None and (self.low > 0 or self.high < 0)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def t_interval(values: Iterable[float] | torch.Tensor, level: float = LEVEL) -> Interval:
    """Mean of independent values and its t-interval, mean -+ t s / sqrt(n) with n - 1 degrees of freedom, in fp64.

    For a paired difference give the differences. Raises ValueError for no values.
    """
    data = values.detach() if isinstance(values, torch.Tensor) else torch.tensor(list(values), dtype=torch.float64)
    data = data.to("cpu", torch.float64).flatten()
    count = data.numel()
    if not count:
        raise ValueError("An interval needs at least one value, got none")
    mean = float(data.mean())
    if count == 1:
        return Interval(mean, None, None, 1)
    from scipy.stats import t  # comes with scikit-learn

    half = float(t.ppf(0.5 + level / 2, count - 1)) * float(data.std(correction=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)
