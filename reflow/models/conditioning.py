"""What the UNet is told besides sample and time, and the one way to call it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told besides sample and time; every tensor has one row a sample.

    encoder_hidden_states [B,T,D]; text_embeds [B,P] and time_ids [B,6] for families with `text_time` conditioning,
    else None.
    """

    encoder_hidden_states: torch.Tensor
    text_embeds: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    def _map(self, function: Any, *others: Conditioning) -> Conditioning:
        values = {}
        for name in (field.name for field in fields(self)):
            tensors = [getattr(item, name) for item in (self, *others)]
            if len({tensor is None for tensor in tensors}) > 1:
                raise ValueError(f"Conditionings of two families cannot be combined: only one has {name}")
            values[name] = None if tensors[0] is None else function(*tensors)
        return Conditioning(**values)

    def __len__(self) -> int:
        return len(self.encoder_hidden_states)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype))

    def select(self, index: torch.Tensor | slice) -> Conditioning:
        """Rows by number, boolean mask or slice."""
        return self._map(lambda tensor: tensor[index])

    def where(self, mask: torch.Tensor, other: Conditioning) -> Conditioning:
        """Row i of self where mask[i], else row i of other; the mask is boolean [B]."""
        return self._map(lambda a, b: torch.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b), other)

    def cat(self, other: Conditioning) -> Conditioning:
        """Rows of self, then rows of other (guidance: null.cat(prompt))."""
        return self._map(lambda a, b: torch.cat([a, b]), other)

    def expand(self, batch: int) -> Conditioning:
        """One row repeated to [batch] as a view."""
        return self._map(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))


def denoise(unet: nn.Module, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    """UNet output [B,C,h,w] for sample [B,C,h,w] at network timesteps [B] (schedule indices, float or integer)."""
    added = None
    if conditioning.text_embeds is not None:
        added = {"text_embeds": conditioning.text_embeds, "time_ids": conditioning.time_ids}
    return unet(sample, timestep, conditioning.encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]
