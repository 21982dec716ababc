"""Measures of a few-step student against its teacher and the data: paired error, straightness, diversity.

Time runs from t=1 (noise) to t=0 (data). Everything is accumulated in fp64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from reflow.flow import Windows


def paired_error(samples: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """[B] fp64: root mean square distance of each sample [B, ...] to the reference of the same noise and prompt."""
    if samples.shape != reference.shape:
        raise ValueError(f"Paired samples need one shape, got {list(samples.shape)} and {list(reference.shape)}")
    difference = samples.detach().to("cpu", torch.float64) - reference.detach().to("cpu", torch.float64)
    return difference.flatten(1).square().mean(1).sqrt()


def _velocities(path: torch.Tensor, times: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Velocity of each step [S, B, D] and the steps' lengths in time [S], both fp64."""
    time = torch.tensor(times, dtype=torch.float64)
    if path.ndim < 3 or len(path) != len(time) or len(time) < 2 or bool((time.diff() >= 0).any()):
        raise ValueError(
            "A path [S+1, B, ...] needs S+1 descending times, from noise to data; "
            f"got {list(path.shape)} and {len(time)} times"
        )
    steps = path.detach().to("cpu", torch.float64).flatten(2).diff(dim=0)
    return steps / time.diff()[:, None, None], -time.diff()


def straightness(path: torch.Tensor, times: Sequence[float]) -> torch.Tensor:
    """[B]: mean over a path's steps and dimensions of (v_i - (z_noise - z_data))^2; 0 for a straight path.

    path [S+1, B, ...] at descending times [S+1], with v_i = (z_{i+1} - z_i)/(t_{i+1} - t_i); steps count by their
    length. For t from 1 to 0 this is the metric of 2-rectified flow++ (arXiv 2405.20320, code).
    """
    velocity, length = _velocities(path, times)
    mean = (velocity * length[:, None, None]).sum(0) / length.sum()
    return ((velocity - mean).square().mean(2) * length[:, None]).sum(0) / length.sum()


def window_straightness(path: torch.Tensor, times: Sequence[float], windows: Windows) -> torch.Tensor:
    """[K, B]: `straightness` of the piece of path inside each window: its deviation from the window's chord.

    Raises ValueError unless every boundary is one of the times.
    """
    edges = [_position(times, edge) for edge in windows.boundaries]
    pieces = zip(edges, edges[1:], strict=False)
    return torch.stack([straightness(path[a : b + 1], times[a : b + 1]) for a, b in pieces])


def _position(times: Sequence[float], edge: float) -> int:
    found = [i for i, t in enumerate(times) if abs(t - edge) < 1e-6]
    if not found:
        raise ValueError(f"The path has no point at the window boundary t = {edge:g}, only at {list(times)}")
    return found[0]


def diversity(features: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean distance between two features of one class, averaged over the classes; features [N, D], labels [N].

    Classes with fewer than two members are left out. Raises ValueError if none is left.
    """
    features, labels = features.detach().to("cpu", torch.float64), labels.cpu()
    means = []
    for label in labels.unique():
        members = features[labels == label]
        if len(members) > 1:
            means.append(torch.pdist(members).mean())
    if not means:
        raise ValueError("Diversity needs a class with at least two members")
    return float(torch.stack(means).mean())
