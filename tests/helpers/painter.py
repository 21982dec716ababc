"""A contender that paints by arithmetic: what every measure must find is known, and a sample costs nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reflow.errors import UserError
from reflow.evaluation.contenders.contender import Drawn, Seconds

SIDE = 24


@dataclass(frozen=True)
class PainterSpec:
    """Images of a prompt and a seed, all channels `shift` levels away from those of a painter with shift 0; `noise` levels of the painter's
    own. fail_at: the batch, counted from 0, that raises; calls are counted in `log`, a file with a line for each batch."""

    label: str
    shift: int = 0
    noise: int = 0
    fail_at: int | None = None
    log: str = ""

    def files(self) -> list[Path]:
        return []

    def open(self, device: str, dtype: str) -> Painter:
        return Painter(self, device)


class Painter:
    def __init__(self, spec: PainterSpec, device: str) -> None:
        self.spec, self.label, self.device, self.batches = spec, spec.label, device, 0

    def describe(self) -> dict[str, Any]:
        return {"label": self.label, "kind": "painter", "shift": self.spec.shift, "noise": self.spec.noise}

    def check(self, steps: int, guidance: float) -> None:
        if steps > 64:
            raise UserError(f"{self.label} takes at most 64 steps, and {steps} was asked for.")

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float) -> Drawn:
        if self.batches == self.spec.fail_at:
            raise OSError(28, "No space left on device", "here")
        self.batches += 1
        if self.spec.log:
            with open(self.spec.log, "a") as file:
                file.write(f"{self.label} {steps} {guidance:g} {seeds[0]}\n")
        images, latents = [], []
        for prompt, seed in zip(prompts, seeds, strict=True):
            start = int(hashlib.sha256(f"{prompt} {seed}".encode()).hexdigest()[:8], 16)
            picture = torch.randint(60, 190, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(start))
            own = torch.randint(-self.spec.noise, self.spec.noise + 1, picture.shape, generator=torch.Generator().manual_seed(start + 1))
            images.append((picture + self.spec.shift + own).clamp(0, 255).byte())
            latents.append(torch.full((4, 3, 3), float(self.spec.shift)))
        evaluations = steps * (2 if guidance > 1 else 1)
        return Drawn(torch.stack(images), torch.stack(latents), evaluations, Seconds(0.0, 0.001 * steps, 0.002))

    def close(self) -> None:
        pass


class Means:
    """A network in place of Inception or CLIP: the mean of each third of an image and channel."""

    implementation, digest = "means of thirds", "thirds-1"

    def __init__(self, name: str) -> None:
        self.name = name

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.float().mean((2, 3)) for part in images.tensor_split(3, dim=2)], 1)

    def scores(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return images.float().mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])

    def distances(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.float() - b.float()).abs().mean((1, 2, 3))
