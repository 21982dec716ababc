"""Bootstrap intervals over images: what other images from the same model and prompts would have changed (Efron 1979)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from reflow.evaluation.intervals import LEVEL, Interval

DRAWS = 2**22  # rows drawn at once for a mean: 32 MiB


def bootstrap_mean(values: torch.Tensor, *, replicates: int = 2000, seed: int = 0, level: float = LEVEL) -> Interval:
    """Mean of values [N] with the percentiles of the means of `replicates` resamples of N, in fp64. No interval for a single value."""
    values = values.detach().to("cpu", torch.float64).flatten()
    count = len(values)
    if not count:
        raise ValueError("An interval needs at least one value, got none")
    if count == 1:
        return Interval(float(values[0]), None, None, 1)
    generator = torch.Generator().manual_seed(seed)
    each = max(1, DRAWS // count)
    means = [values[torch.randint(count, (min(each, replicates - i), count), generator=generator)].mean(1) for i in range(0, replicates, each)]
    low, high = _ends(torch.cat(means), level)
    return Interval(float(values.mean()), low, high, count)


def bootstrap(
    measure: Callable[[torch.Tensor], float], count: int, *, replicates: int = 30, seed: int = 0, level: float = LEVEL
) -> Interval:
    """A measure of a set of `count` images, given the rows to take (int64 [count]), with a bootstrap interval.

    The measure of a resample, in which images stand twice, is shifted (FID, KID and precision upwards): the percentiles of the replicates
    are moved so that their median lies at the measure of the whole set. With 30 replicates the ends themselves are known to about a fifth
    of the interval's width.
    """
    if count < 2 or replicates < 2:
        raise ValueError(f"A bootstrap needs two images and two replicates or more, got {count} and {replicates}")
    generator = torch.Generator().manual_seed(seed)
    value = float(measure(torch.arange(count)))
    found = torch.tensor([float(measure(torch.randint(count, (count,), generator=generator))) for _ in range(replicates)], dtype=torch.float64)
    low, high = _ends(found, level)
    shift = value - float(found.quantile(0.5))
    return Interval(value, low + shift, high + shift, count)


def _ends(values: torch.Tensor, level: float) -> tuple[float, float]:
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(values, edges).tolist()
    return low, high
