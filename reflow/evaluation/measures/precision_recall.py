"""Improved precision and recall (Kynkäänniemi et al. 2019), and density and coverage (Naeem et al. 2020), by nearest neighbours.

Each image of a set stands for the ball around its features that reaches its k-th nearest neighbour in its own set. Precision is the share
of generated images inside a ball of the reference, recall the share of reference images inside a ball of the generated; density counts the
balls, coverage the reference images whose own ball is reached. Precision and recall grow with the number of images on the side of the
balls and move with the ratio of the two counts: compare equal counts only (10,000 to 50,000 a side in the papers), k = 3 in the first
paper, 5 in the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reflow.evaluation.measures.checked import TILE, pair_of, squared_distances


@dataclass(frozen=True)
class Manifolds:
    """Shares from 0 to 1; density has no upper end."""

    precision: float
    recall: float
    density: float
    coverage: float


def _radii(rows: torch.Tensor, k: int) -> torch.Tensor:
    """[N] squared distance of each row to its k-th nearest neighbour among the others."""
    radii = []
    for start in range(0, len(rows), TILE):
        some = rows[start : start + TILE]
        nearest = torch.empty(len(some), 0, dtype=rows.dtype)
        for other in range(0, len(rows), TILE):
            squared = squared_distances(some, rows[other : other + TILE])
            if other == start:
                squared.fill_diagonal_(torch.inf)
            nearest = torch.cat([nearest, squared], 1)
            nearest = nearest.topk(min(k, nearest.shape[1]), largest=False).values
        radii.append(nearest[:, k - 1])
    return torch.cat(radii)


def manifolds(generated: torch.Tensor, reference: torch.Tensor, k: int = 3) -> Manifolds:
    """All four of features [N, D] and [M, D]. ValueError unless each set has more than k images."""
    generated, reference = pair_of(generated, reference, least=k + 1)
    # One origin near both keeps rounding of the distances small.
    origin = reference.mean(0)
    generated, reference = generated - origin, reference - origin
    radii_g, radii_r = _radii(generated, k), _radii(reference, k)
    inside = torch.zeros(len(generated), dtype=torch.float64)
    reached, covered = torch.zeros(2, len(reference), dtype=torch.bool)
    for i in range(0, len(generated), TILE):
        for j in range(0, len(reference), TILE):
            squared = squared_distances(generated[i : i + TILE], reference[j : j + TILE])
            within = squared <= radii_r[j : j + TILE]
            inside[i : i + TILE] += within.sum(1)
            covered[j : j + TILE] |= within.any(0)
            reached[j : j + TILE] |= (squared <= radii_g[i : i + TILE, None]).any(0)
    share = [float(which.double().mean()) for which in (inside > 0, reached, covered)]
    return Manifolds(share[0], share[1], float(inside.mean()) / k, share[2])
