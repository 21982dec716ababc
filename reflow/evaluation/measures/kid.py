"""Kernel inception distance (Bińkowski et al. 2018): unbiased squared MMD of a cubic kernel, by any count of images.

Kernel (x.y / D + 1)^3 on features as the network gives them (Inception, 2048 wide, in the paper). Its expectation does not depend on the
number of images, unlike FID's. The published protocol averages over subsets of 1,000 images; the mean over all of them has the same
expectation and less spread. Values are often printed times 1,000: these are not.
"""

from __future__ import annotations

import torch

from reflow.evaluation.intervals import Interval, t_interval
from reflow.evaluation.measures.checked import pair_of
from reflow.evaluation.measures.mmd import squared_mmd


def cubic(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return (rows @ others.T / rows.shape[1] + 1) ** 3


def kid(generated: torch.Tensor, reference: torch.Tensor) -> float:
    """KID of whole sets [N, D] and [M, D], the unbiased estimate with the least spread. About 2 N^2 D multiplications."""
    return kid_interval(generated, reference).mean


def kid_interval(generated: torch.Tensor, reference: torch.Tensor) -> Interval:
    """`kid` with its interval over the generated images, at no further cost (`squared_mmd`)."""
    return squared_mmd(cubic, *pair_of(generated, reference, least=2))


def kid_of_subsets(generated: torch.Tensor, reference: torch.Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> Interval:
    """KID as published: mean over `subsets` pairs of random subsets of `size` images, without replacement within one.

    The interval is Student's over subsets: it tells what drawing other subsets of these images would change, not other images. Raises
    ValueError where a set has fewer than `size` images.
    """
    a, b = pair_of(generated, reference, least=2)
    if not 2 <= size <= min(len(a), len(b)):
        raise ValueError(f"Subsets of {size} images need 2 or more of them and as many in each set; there are {len(a)} and {len(b)}")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        picks = [torch.randperm(len(f), generator=generator)[:size] for f in (a, b)]
        values.append(squared_mmd(cubic, a[picks[0]], b[picks[1]]).mean)
    return t_interval(values)
