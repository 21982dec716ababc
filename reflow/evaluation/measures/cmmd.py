"""CMMD (Jayasumana et al. 2024): squared MMD of a Gaussian kernel between CLIP embeddings of unit length, times 1,000.

k(x, y) = exp(-|x - y|^2 / (2 sigma^2)) with sigma = 10. The published code keeps each image's pair with itself in the estimate, which adds
about 1000 (1 - mean k) / N to it for each set; `unbiased` leaves it out. The published embedding is that of OpenAI's ViT-L/14 at 336
pixels: numbers of other CLIPs do not compare with it.
"""

from __future__ import annotations

import torch

from reflow.evaluation.intervals import Interval
from reflow.evaluation.measures.checked import pair_of, unit_rows
from reflow.evaluation.measures.mmd import squared_mmd

SIGMA = 10.0
SCALE = 1000.0


def gaussian(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The kernel between rows of unit length, whose squared distance is 2 - 2 x.y."""
    return torch.exp((rows @ others.T - 1) / SIGMA**2)


def cmmd(generated: torch.Tensor, reference: torch.Tensor, *, unbiased: bool = False) -> float:
    """CMMD of image embeddings [N, D] and [M, D] of any length, as published or `unbiased`."""
    return cmmd_interval(generated, reference, unbiased=unbiased).mean


def cmmd_interval(generated: torch.Tensor, reference: torch.Tensor, *, unbiased: bool = False) -> Interval:
    """`cmmd` with its interval over the generated images, at no further cost (`squared_mmd`)."""
    a, b = (unit_rows(features) for features in pair_of(generated, reference, least=2))
    found = squared_mmd(gaussian, a, b, unbiased=unbiased)
    return Interval(SCALE * found.mean, SCALE * found.low, SCALE * found.high, found.count)
