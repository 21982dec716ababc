"""Several data sets as one: each counts so many times in an epoch, and its items are read from where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from reflow.data.shapes import Shaped, grouped
from reflow.models.conditioning import Conditioning


class Joined(Shaped):
    """Data sets of one base with the interface of `LatentDataset`.

    repeats: how often an epoch visits each item of each part. Items lie shape by shape, in the parts' order and repeats side by
    side, so which one a sample takes is a function of (seed, stage, sample index) as with a single data set.
    """

    def __init__(self, parts: Sequence[Any], repeats: Sequence[int]) -> None:
        self.parts = list(parts)
        shapes = list(dict.fromkeys(group.shape for part in parts for group in part.groups))
        part_of, item_of, counts = [], [], []
        for shape in shapes:
            before = sum(map(len, part_of))
            for number, (part, times) in enumerate(zip(parts, repeats, strict=True)):
                for group in part.groups:
                    if group.shape == shape:
                        items = torch.arange(group.first, group.first + group.count).repeat(times)
                        item_of.append(items)
                        part_of.append(torch.full((len(items),), number, dtype=torch.int32))
            counts.append(sum(map(len, part_of)) - before)
        self.part_of, self.item_of, self.groups = torch.cat(part_of), torch.cat(item_of), grouped(counts, shapes)
        # Its time ids, where the family has them, are those of the data set's own shape.
        self.null = next((part for part in parts if part.shape == self.shape), parts[0]).null

    def __len__(self) -> int:
        return len(self.item_of)

    def latent(self, items: torch.Tensor) -> torch.Tensor:
        """Latents [B,C,h,w] fp32 of items of one shape."""
        return self._gather(items, lambda part, own, _: part.latent(own))

    def conditioning(self, items: torch.Tensor, dropped: torch.Tensor | None = None) -> Conditioning:
        """Captions of the items [B]; where `dropped` [B] bool is set, the null prompt with the image's own time ids."""
        return self._gather(items, lambda part, own, rows: part.conditioning(own, None if dropped is None else dropped[rows]))

    def null_rows(self, items: torch.Tensor) -> Conditioning:
        """The null prompt [B] of items, with each image's own time ids where the family has them."""
        return self._gather(items, lambda part, own, _: part.null_rows(own))

    def _gather(self, items: torch.Tensor, read: Callable[[Any, torch.Tensor, torch.Tensor], Any]) -> Any:
        """What `read` gives of each part's own items, in the order asked for: a tensor or a Conditioning of B rows."""
        places, found = [], []
        for number in self.part_of[items].unique().tolist():
            rows = (self.part_of[items] == number).nonzero().flatten()
            places.append(rows)
            found.append(read(self.parts[number], self.item_of[items[rows]], rows))
        back = torch.cat(places).argsort()
        if isinstance(found[0], torch.Tensor):
            return torch.cat(found)[back]
        whole = found[0]
        for other in found[1:]:
            whole = whole.cat(other)
        return whole.select(back)
