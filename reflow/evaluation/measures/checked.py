"""What every measure asks of its features: rows [N, D], finite, in fp64 on the CPU."""

from __future__ import annotations

import torch

from reflow.errors import UserError

TILE = 2048  # rows of one block of distances or kernel values: 32 MiB in fp64


def features_of(features: torch.Tensor, least: int = 1) -> torch.Tensor:
    """Features [N, D] in fp64 on the CPU. ValueError for another shape or fewer than `least` rows, UserError where they are not finite."""
    if features.ndim != 2 or len(features) < least or not features.shape[1]:
        raise ValueError(f"A measure needs features of shape [N, D] with N of {least} or more, got {list(features.shape)}")
    features = features.detach().to("cpu", torch.float64)
    bad = (~torch.isfinite(features).all(1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"The features of {len(bad)} of {len(features)} images are not finite, the first is number {bad[0]}, and nothing can be "
            "measured on them; the images or the weights of the network that reads them are damaged: draw them again in fp32."
        )
    return features


def pair_of(features_a: torch.Tensor, features_b: torch.Tensor, least: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sets as `features_of` gives them. ValueError where their widths differ."""
    if features_a.shape[1:] != features_b.shape[1:]:
        raise ValueError(f"Feature sets differ in width: {list(features_a.shape)} and {list(features_b.shape)}")
    return features_of(features_a, least), features_of(features_b, least)


def unit_rows(features: torch.Tensor) -> torch.Tensor:
    """Rows divided by their length. UserError where a row is zero, which has no direction."""
    length = features.norm(dim=1, keepdim=True)
    zero = (length == 0).flatten().nonzero().flatten().tolist()
    if zero:
        raise UserError(f"The features of {len(zero)} of {len(features)} images are all zero, the first is number {zero[0]}; they have no direction.")
    return features / length


def squared_distances(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """[n, m] squared Euclidean distances of fp64 rows. What lies within rounding of 0 beside the rows' lengths is 0, so that equal rows
    are at distance 0."""
    lengths = rows.square().sum(1)[:, None] + others.square().sum(1)
    squared = lengths - 2 * rows @ others.T
    return squared.masked_fill_(squared <= 1e-13 * lengths, 0.0)
