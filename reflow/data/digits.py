"""The handwritten digits that scikit-learn ships (1,797 scans of 8x8 pixels, 17 grey levels), with captions."""

from __future__ import annotations

import importlib.util
import pathlib
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from reflow.errors import UserError

RESOLUTION = 16
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# The first template is the canonical one: evaluation asks with it.
TEMPLATES = (
    "a handwritten {word}",
    "a handwritten digit {word}",
    "a scan of a handwritten {word}",
    "the digit {word}",
    "the number {word}",
    "a handwritten {numeral}",
)


@lru_cache(maxsize=1)
def _scans() -> tuple[torch.Tensor, torch.Tensor]:
    # Its file as `sklearn.datasets.load_digits` reads it: importing scikit-learn, and pandas with it, takes longer than all else here.
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise UserError("The digits come with scikit-learn, which is not installed; install it with 'pip install scikit-learn'.")
    file = pathlib.Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    if file.exists():
        table = np.loadtxt(file, delimiter=",")
    else:  # a version that keeps it elsewhere
        from sklearn.datasets import load_digits

        table = np.column_stack(load_digits(return_X_y=True))
    small = torch.from_numpy(table[:, :-1].copy()).view(-1, 1, 8, 8).to(torch.float32) / 8 - 1
    # Bicubic overshoots at strokes; the clamp keeps the range of the scans.
    pixels = F.interpolate(small, size=(RESOLUTION, RESOLUTION), mode="bicubic", align_corners=False).clamp_(-1, 1)
    return pixels, torch.from_numpy(table[:, -1]).to(torch.long)


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """All scans: pixels [1797,1,16,16] fp32 in [-1,1] (stroke 1, paper -1) and labels [1797] int64."""
    pixels, labels = _scans()
    return pixels.clone(), labels.clone()


def caption(label: int, template: int = 0) -> str:
    """One sentence for a digit 0..9; template 0 is the canonical "a handwritten seven"."""
    if not 0 <= label <= 9:
        raise ValueError(f"A digit label is 0 to 9, got {label}")
    return TEMPLATES[template].format(word=WORDS[label], numeral=label)


def captions(label: int) -> list[str]:
    """Every sentence for a digit 0..9, the canonical one first."""
    return [caption(label, template) for template in range(len(TEMPLATES))]


def prompts(labels: torch.Tensor) -> list[str]:
    """The canonical caption of each label in [B]."""
    return [caption(int(label)) for label in labels.tolist()]


def balanced_labels(count: int) -> torch.Tensor:
    """Labels 0,1,...,9,0,1,... [count] int64: what evaluation asks for."""
    return torch.arange(count) % 10


def split(held_out: float = 0.2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers (train, held-out) of `images()`, stratified by digit and fixed by the seed."""
    if not 0 < held_out < 1:
        raise ValueError(f"The held-out share lies between 0 and 1, got {held_out}")
    labels = _scans()[1]
    generator = torch.Generator().manual_seed(seed)
    train, held = [], []
    for digit in range(10):
        rows = (labels == digit).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        cut = round(len(rows) * held_out)
        held.append(rows[:cut])
        train.append(rows[cut:])
    return torch.cat(train).sort().values, torch.cat(held).sort().values
