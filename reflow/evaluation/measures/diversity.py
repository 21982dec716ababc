"""How different the images of one prompt are over its seeds, averaged over prompts: what few-step models lose first."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from reflow.evaluation.measures.checked import features_of, unit_rows


def pairs_within(groups: torch.Tensor | Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(pairs [P, 2] of different rows of one group, the group [P] of each, counted from 0 in the order of its number): what a distance
    of images, LPIPS for one, is asked for."""
    groups = torch.as_tensor(groups).cpu()
    found, of = [], []
    for number, group in enumerate(groups.unique().tolist()):
        members = (groups == group).nonzero().flatten()
        found.append(members[torch.combinations(torch.arange(len(members)), 2)])
        of.append(torch.full((len(found[-1]),), number))
    return torch.cat(found), torch.cat(of)


def means_of_groups(values: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """[G] fp64 mean of the pairs' values in each group that has pairs. ValueError where none has."""
    if not len(values):
        raise ValueError("Diversity needs a prompt with at least two images")
    counts = torch.bincount(of)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, of, values.detach().to("cpu", torch.float64))
    return sums[counts > 0] / counts[counts > 0]


def diversity_of_prompts(features: torch.Tensor, groups: torch.Tensor | Sequence[int], *, cosine: bool = False) -> torch.Tensor:
    """[G] mean distance of two images of one prompt, for each prompt with two images or more; features [N, D], groups [N] the prompt of
    each row. Euclidean, or 1 - cos. Without bias in the number of seeds; the mean over prompts is a model's diversity.
    """
    rows = features_of(features)
    if len(rows) != len(groups):
        raise ValueError(f"Each row of features needs its group; there are {len(rows)} and {len(groups)}")
    rows = unit_rows(rows) if cosine else rows
    pairs, of = pairs_within(groups)
    values = [
        1 - (rows[some[:, 0]] * rows[some[:, 1]]).sum(1) if cosine else (rows[some[:, 0]] - rows[some[:, 1]]).norm(dim=1)
        for some in pairs.split(8192)  # pairs of rows held at once
    ]
    return means_of_groups(torch.cat(values), of)
