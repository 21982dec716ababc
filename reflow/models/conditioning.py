"""What a network is told besides sample and time, as named rows, and the one way to call it.

Data, cache, teacher, student and solver carry the rows without knowing their names; a family makes them (`Base.encode_prompts`) and says
how its network is called with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from reflow.errors import UserError

UNET = "unet"
# The rows that belong to an image, not to its caption: sizes and crops.
OF_IMAGE = ("time_ids",)
# Calls whose pipelines guide by more than u + w (c - u); they are told w and answer with the guided output in both halves.
OWN_GUIDANCE: set[str] = set()


class Conditioning:
    """Named tensors with one row a sample each, in the order in which they were given; None stands for a row that a family has not.

    UNets of SD1.5 and SDXL have encoder_hidden_states [B,T,D], and the latter text_embeds [B,P] and time_ids [B,6]; other families have
    the names of their network's own arguments. A name that is not there reads as None. call: which of `CALLS` asks the network.
    """

    __slots__ = ("call", "rows")

    rows: Mapping[str, torch.Tensor]
    call: str

    def __init__(
        self,
        encoder_hidden_states: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
        *,
        call: str = UNET,
        **others: torch.Tensor | None,
    ) -> None:
        given = {"encoder_hidden_states": encoder_hidden_states, "text_embeds": text_embeds, "time_ids": time_ids, **others}
        rows = {name: tensor for name, tensor in given.items() if tensor is not None}
        if len({len(tensor) for tensor in rows.values()}) > 1:
            shapes = {name: list(tensor.shape) for name, tensor in rows.items()}
            raise ValueError(f"Every tensor of a conditioning has one row a sample, got {shapes}")
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "call", call)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"A conditioning does not change; use with_rows({name}=...)")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("rows", "call"):  # what pickle asks for before they are set
            raise AttributeError(name)
        return self.rows.get(name)

    def __reduce__(self) -> Any:
        return _restored, (dict(self.rows), self.call)

    def __repr__(self) -> str:
        told = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self.rows.items())
        return f"Conditioning({told}, call={self.call!r})"

    def __len__(self) -> int:
        return len(next(iter(self.rows.values()))) if self.rows else 0

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The rows without their names, in order: what a recorded solve and a digest take."""
        return tuple(self.rows.values())

    def of(self, tensors: Sequence[torch.Tensor]) -> Conditioning:
        """The same names with other tensors, in the order of `tensors`."""
        return Conditioning(call=self.call, **dict(zip(self.rows, tensors, strict=True)))

    def with_rows(self, **rows: torch.Tensor | None) -> Conditioning:
        """The same with some rows replaced, or left out where None is given."""
        return Conditioning(call=self.call, **{**self.rows, **rows})

    def parts(self, of_image: bool) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, rows) of what belongs to the image, or else to the caption."""
        return ((name, tensor) for name, tensor in self.rows.items() if (name in OF_IMAGE) == of_image)

    def _map(self, function: Any, *others: Conditioning) -> Conditioning:
        for other in others:
            apart = sorted(self.rows.keys() ^ other.rows.keys())
            if apart or other.call != self.call:
                raise ValueError(f"Conditionings of two families cannot be combined: only one has {apart[0] if apart else self.call}")
        return self.of([function(tensor, *(other.rows[name] for other in others)) for name, tensor in self.rows.items()])

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

    def guiding(self, scale: float | torch.Tensor) -> Conditioning:
        """Of rows [null; prompt] [2B] what a network is told that is guided with this scale, a number or [B]: the same, or for the calls of
        `OWN_GUIDANCE` with the scale as the row `guided_by` [2B,1]."""
        if self.call not in OWN_GUIDANCE:
            return self
        first = self.tensors[0]
        w = torch.as_tensor(scale, dtype=first.dtype, device=first.device).expand(len(self) // 2)[:, None]
        return self.with_rows(guided_by=torch.cat([w, w]))

    def expand(self, batch: int) -> Conditioning:
        """One row repeated to [batch] as a view."""
        return self._map(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))


def _restored(rows: dict[str, torch.Tensor], call: str) -> Conditioning:
    return Conditioning(call=call, **rows)


def unet_rows(config: Mapping[str, Any], tokens: int, dtype: torch.dtype) -> Conditioning:
    """One row of conditioning for a UNet of this config."""
    hidden, pooled, times = torch.empty(1, tokens, config["cross_attention_dim"], dtype=dtype), None, None
    if config.get("addition_embed_type") == "text_time":
        width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        pooled, times = torch.empty(1, width, dtype=dtype), torch.empty(1, 6, dtype=dtype)
    return Conditioning(hidden, pooled, times)


def call_unet(unet: nn.Module, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    """A UNet of SD1.5 or SDXL; timestep: an index of its schedule."""
    added = None
    if conditioning.text_embeds is not None:
        added = {"text_embeds": conditioning.text_embeds, "time_ids": conditioning.time_ids}
    return unet(sample, timestep, conditioning.encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]


# network, sample [B,C,h,w], timestep [B], conditioning [B] -> output [B,C,h,w]
Call = Callable[[nn.Module, torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]
CALLS: dict[str, Call] = {UNET: call_unet}


def denoise(network: nn.Module, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    """A network's output [B,C,h,w] for sample [B,C,h,w] at timesteps [B]: indices of a discrete schedule, or 1000 t of a flow, float or
    integer. Raises UserError for a conditioning whose family is not registered here."""
    call = CALLS.get(conditioning.call)
    if call is None:
        raise UserError(f"Nothing here calls a network as {conditioning.call!r}; name the .py file of its family as model.family.")
    return call(network, sample, timestep, conditioning)
