"""Fréchet distance between two sets of features, in fp64 (Heusel et al. 2017, eq. 6)."""

from __future__ import annotations

import torch

from reflow.errors import UserError


def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [D] and unbiased covariance [D,D] of features [N,D], fp64 on the CPU. UserError where they are not finite."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"Moments need features of shape [N,D] with N of 2 or more, got {list(features.shape)}")
    features = features.detach().to("cpu", torch.float64)
    bad = (~torch.isfinite(features).all(1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"The features of {len(bad)} of {len(features)} images are not finite, the first is number {bad[0]}, and have no "
            "Fréchet distance; the images are damaged: draw them again in fp32, or train that stage again."
        )
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], features.shape[1])


def root_of(matrix: torch.Tensor) -> torch.Tensor:
    """Symmetric square root of a covariance [D,D]."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def distance_of_moments(
    mean_a: torch.Tensor, cov_a: torch.Tensor, mean_b: torch.Tensor, cov_b: torch.Tensor, *, root_a: torch.Tensor | None = None
) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)); the moments as `moments` gives them. root_a: `root_of(cov_a)` where
    one reference meets many sets."""
    root = root_of(cov_a) if root_a is None else root_a
    # The symmetric product has the eigenvalues of cov_a cov_b and stays real where covariances are singular.
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def frechet_distance(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    """Fréchet distance of two feature sets [N,D] and [M,D]. Its bias depends on N and M: compare equal counts only."""
    if features_a.shape[1:] != features_b.shape[1:]:
        raise ValueError(f"Feature sets differ in width: {list(features_a.shape)} and {list(features_b.shape)}")
    return distance_of_moments(*moments(features_a), *moments(features_b))


def equal_sized(features_a: torch.Tensor, features_b: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sets shuffled by the seed and cut to the smaller count, so that the distance has the same bias on either
    side.
    """
    generator = torch.Generator().manual_seed(seed)
    count = min(len(features_a), len(features_b))
    picks = [torch.randperm(len(f), generator=generator)[:count].to(f.device) for f in (features_a, features_b)]
    return features_a[picks[0]], features_b[picks[1]]
