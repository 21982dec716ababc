"""Exponential moving average over the local fp32 master weights: one lerp a step, in the optimizer's pass where it can, gathered by name only for export."""

from __future__ import annotations

import math

import torch

from reflow.training.fused import FusedAdamW


def half_life_at(half_life: float, warmup: float, done: int) -> float:
    """The half-life h(n) in samples that holds after `done` = n samples of a stage: min(half_life, warmup * n), or half_life for warmup 0.

    warmup is a share, 0 to 1: the average never looks back beyond about that share of what the stage has trained, and the
    recipe's own half-life is reached after half_life / warmup samples, in a shorter stage never.
    """
    return min(half_life, warmup * done) if warmup else half_life


def decay(half_life: float, warmup: float, done: int, batch: int) -> float:
    """What an optimizer step of `batch` samples leaves of the average, after `done` samples of the stage before it. All counts in samples.

    It is 2 ** -(integral of dn / h(n) from done to done + batch) with h of `half_life_at`, taken exactly: (a / b) ** (ln 2 / warmup) from a to
    b samples while the ramp lasts (the power function of EDM2, arXiv 2312.02696), 0.5 ** ((b - a) / half_life) after it. Two steps of half the
    batch therefore leave as much as one of the whole, and the first step of a ramp leaves nothing of what the stage started from.
    """
    if half_life <= 0:
        return 0.0
    end = done + batch
    ramp = half_life / warmup if warmup else 0.0  # samples until the recipe's own half-life holds
    a, b = min(done, ramp), min(end, ramp)
    rising = (a / b) ** (math.log(2) / warmup) if b else 1.0
    return rising * 0.5 ** (((end - b) - (done - a)) / half_life)


class Ema:
    """Average of the flat buffers that an engine trains. The buffers stay the same tensors for a whole stage.

    masters: the fp32 tensors of this rank (whole parameters, or the flat partitions of a ZeRO stage). tail: an optimizer over them that takes the
    average in its own pass, or None.
    """

    def __init__(self, masters: list[torch.Tensor], tail: FusedAdamW | None = None) -> None:
        self.masters, self.tail = masters, tail
        self.average = [m.detach().clone() for m in masters]
        if tail is not None:
            tail.averages = {id(m): a for m, a in zip(masters, self.average, strict=True)}

    def ride(self, decay: float) -> None:
        """Let the optimizer step that comes take the average, where it can; `update` after it does the rest."""
        if self.tail is not None:
            self.tail.decay = decay

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """What the optimizer's pass has not averaged: all of it where there is no such pass, or the step was dropped."""
        taken = self.tail.taken if self.tail is not None else set()
        rest = [(a, m.detach()) for a, m in zip(self.average, self.masters, strict=True) if id(m) not in taken]
        if rest:
            torch._foreach_lerp_([a for a, _ in rest], [m for _, m in rest], 1.0 - decay)
        if self.tail is not None:
            self.tail.decay = None
            self.tail.taken.clear()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {str(i): a for i, a in enumerate(self.average)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for i, a in enumerate(self.average):
            a.copy_(state[str(i)])
