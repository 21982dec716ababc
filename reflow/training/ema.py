"""Exponential moving average over the local fp32 master weights: one lerp a step, gathered by name only for export."""

from __future__ import annotations

import torch


def decay(half_life: float, batch: int, step: int, warmup: bool) -> float:
    """Decay of optimizer step `step` (from 0). `half_life` is in samples; the warm-up min(d, (1+i)/(10+i)) forgets the start faster."""
    full = 0.5 ** (batch / half_life) if half_life > 0 else 0.0
    return min(full, (1 + step) / (10 + step)) if warmup else full


class Ema:
    """Average of the flat buffers that an engine trains. The buffers stay the same tensors for a whole stage.

    masters: the fp32 tensors of this rank (whole parameters, or the flat partitions of a ZeRO stage).
    """

    def __init__(self, masters: list[torch.Tensor]) -> None:
        self.masters = masters
        self.average = [m.detach().clone() for m in masters]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        torch._foreach_lerp_(self.average, [m.detach() for m in self.masters], 1.0 - decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {str(i): a for i, a in enumerate(self.average)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for i, a in enumerate(self.average):
            a.copy_(state[str(i)])
