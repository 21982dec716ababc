"""What every contender offers: images of prompts and seeds at a number of steps and a guidance scale, with their latents and their time.

A sample depends on its own prompt and seed alone, never on the batch that it is drawn in (beyond rounding): pairs of samples with one
seed start from one noise wherever two contenders have latents of one shape and dtype. Time runs from t=1 (noise) to t=0 (data).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Seconds:
    """What a batch took, by the clock with the device waited for: encoding its prompts, all denoiser calls, decoding."""

    text: float
    denoise: float
    decode: float


@dataclass(frozen=True)
class Drawn:
    """A batch: images [B,3,H,W] uint8 as they would be saved, latents [B,...] at t=0 as the denoiser sees them, both on the CPU;
    evaluations: denoiser rows spent on each sample; seconds of the whole batch."""

    images: torch.Tensor
    latents: torch.Tensor
    evaluations: int
    seconds: Seconds


class Contender(Protocol):
    """One model in a comparison."""

    @property
    def label(self) -> str:
        """Its name in tables, of its own in a comparison."""

    def describe(self) -> dict[str, Any]:
        """All that changes its images, ready for JSON: weights with their sha256, LoRA and scale, scheduler's class and config, dtype,
        size of images, family, the known few-step model that it was taken for."""

    def check(self, steps: int, guidance: float) -> None:
        """Raises UserError where it is not made for this many steps or this guidance, naming what it is made for."""

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float) -> Drawn:
        """One sample a prompt and seed; guidance 1 or below computes no unconditional half. Raises UserError where latents are not finite."""

    def close(self) -> None:
        """Give the device's memory back."""
