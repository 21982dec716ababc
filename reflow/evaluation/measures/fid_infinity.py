"""FID without its bias in the number of images (Chong and Forsyth 2019), and its interval over images.

The Fréchet distance of N images is too large by an amount that is close to linear in 1/N, grows with the width D of the features and
differs from model to model: at 2048 features several thousand images still leave whole points of it, so two models at different N cannot be
compared by it, and two of different spread not well. FID-infinity is the intercept of a line through FIDs of growing N over 1/N. Only the
generated side is extrapolated; the reference keeps its own count, which is to be large and the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from reflow.evaluation.intervals import Interval
from reflow.evaluation.measures.checked import pair_of
from reflow.evaluation.measures.frechet import distance_of_moments, moments, root_of
from reflow.evaluation.measures.resampling import bootstrap


@dataclass(frozen=True)
class Extrapolation:
    """value at N = infinity; slope over 1/N; the counts and the distances that the line goes through."""

    value: float
    slope: float
    counts: tuple[int, ...]
    distances: tuple[float, ...]


def fid_infinity(generated: torch.Tensor, reference: torch.Tensor, *, points: int = 15, smallest: int = 0, seed: int = 0) -> Extrapolation:
    """Features [N, D] and [M, D]: FIDs of `points` seeded random subsets from `smallest` images (0: N / 10, at least D + 1 where N allows
    twice that, and 5,000 from 50,000 as in the paper) to all N, evenly spaced, and the least-squares line over 1/N.

    Raises ValueError for fewer than two different counts.
    """
    generated, reference = pair_of(generated, reference, least=4)
    count, width = generated.shape
    least = smallest or max(2, count // 10, width + 1 if count >= 2 * (width + 1) else 2)
    counts = sorted({round(float(n)) for n in torch.linspace(least, count, points, dtype=torch.float64)})
    if len(counts) < 2 or counts[0] < 2:
        raise ValueError(f"A line needs subsets of two sizes, of 2 images or more; from {least} to {count} images there are not")
    generator = torch.Generator().manual_seed(seed)
    to_reference = _distance_to(reference)
    distances = [to_reference(generated[torch.randperm(count, generator=generator)[:n]]) for n in counts]
    inverse = torch.tensor([1 / n for n in counts], dtype=torch.float64)
    line = torch.linalg.lstsq(torch.stack([torch.ones_like(inverse), inverse], 1), torch.tensor(distances, dtype=torch.float64)[:, None]).solution
    return Extrapolation(float(line[0]), float(line[1]), tuple(counts), tuple(distances))


def fid_interval(generated: torch.Tensor, reference: torch.Tensor, *, replicates: int = 30, seed: int = 0) -> Interval:
    """FID of all images with a bootstrap interval over the generated ones, the reference fixed. It tells the spread, not the bias in N."""
    generated, reference = pair_of(generated, reference, least=2)
    to_reference = _distance_to(reference)
    return bootstrap(lambda rows: to_reference(generated[rows]), len(generated), replicates=replicates, seed=seed)


def _distance_to(reference: torch.Tensor) -> Callable[[torch.Tensor], float]:
    """FID of features to the reference, whose part is computed once."""
    mean, covariance = moments(reference)
    root = root_of(covariance)
    return lambda features: distance_of_moments(mean, covariance, *moments(features), root_a=root)
