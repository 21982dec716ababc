"""Where pairs begin, by the number of their draw: at noised data, on trajectories from noise down, or on ones from data up."""

from __future__ import annotations

import numpy as np

from reflow.recipes.sections import Objective

DATA, NOISE, FORWARD = 0, 1, 2


def chosen(draws: np.ndarray, share: float) -> np.ndarray:
    """Which draws [n] bool are of a kind that `share` of all are: evenly spread, and of the draw's number alone."""
    return np.floor((draws + 1) * share) > np.floor(draws * share)


def on_paths(objective: Objective) -> bool:
    """Whether pairs come from whole trajectories, K windows from the same draws."""
    return objective.starts == "noise" or objective.forward_share > 0


def kinds(draws: np.ndarray, objective: Objective) -> np.ndarray:
    """What each draw [n] is of: noised DATA, a trajectory from NOISE, or one FORWARD from data to noise."""
    forward, rest = chosen(draws, objective.forward_share), draws - np.floor(draws * objective.forward_share).astype(draws.dtype)
    from_noise = chosen(rest, objective.starts_share if objective.starts == "noise" else 0.0)
    return np.where(forward, FORWARD, np.where(from_noise, NOISE, DATA))
