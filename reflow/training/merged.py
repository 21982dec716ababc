"""Windows that merge within a stage: solves whose chords the stage's own EMA student finishes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from reflow.models.conditioning import denoise
from reflow.training.ema import Ema
from reflow.training.engine import Engine
from reflow.training.networks import Whole, trained_dtype
from reflow.training.solves import Solved
from reflow.training.stages import StageFlow

Source = Callable[[list[int]], Solved]


class Merged:
    """Solves by global index, as `source` makes or reads them, each chord then finished by the average as it stands.

    A target is thus a function of the solve's index and of the average that a checkpoint holds, so a resumed run has the same.
    """

    def __init__(self, flow: StageFlow, source: Source, networks: Whole) -> None:
        if flow.merger is None:
            raise ValueError(f"Stage {flow.index} merges no windows.")
        self.merger, self.source, self.networks = flow.merger, source, networks
        self.dtype, self.network = trained_dtype(flow.recipe), networks.follower()

    def follow(self, engine: Engine, ema: Ema) -> None:
        """Take over the average of the trained weights. All ranks call it, before each optimizer step."""
        self.networks.follow(self.network, engine.whole(ema.average))

    def __call__(self, indices: list[int]) -> Solved:
        solved = self.source(indices)

        def student(z: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return denoise(self.network, z, t, solved.conditioning.select(rows).to(z.device, self.dtype))

        return replace(solved, z_end=self.merger.finish(student, solved.z_end, solved.window.cpu(), input_dtype=self.dtype))
