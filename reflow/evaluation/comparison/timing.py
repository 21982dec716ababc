"""Seconds an image of every cell of one contender, warm, one image at a time as papers report it, encoding and decoding apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from reflow.evaluation.comparison.samples import Cell
from reflow.evaluation.contenders.contender import Contender

ROUNDS = 5


def timed(contender: Contender, cells: Sequence[Cell], prompt: str, seed: int) -> dict[str, dict[str, Any]]:
    """{str(cell): medians over rounds of text, denoise and decode, and all rounds' denoise}; the cells in turns, after one that warms up."""
    taken: dict[str, list[dict[str, float]]] = {str(cell): [] for cell in cells}
    for turn in range(ROUNDS + 1):
        for cell in cells:
            seconds = asdict(contender.draw([prompt], [seed], cell.steps, cell.guidance).seconds)
            if turn:
                taken[str(cell)].append(seconds)
    return {
        name: {**{part: statistics.median(r[part] for r in found) for part in found[0]}, "rounds": [r["denoise"] for r in found]}
        for name, found in taken.items()
    }
