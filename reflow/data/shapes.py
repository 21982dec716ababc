"""Items of one or several latent shapes, and what every data set answers about them."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass

import torch

from reflow.errors import UserError


@dataclass(frozen=True)
class Group:
    """Items first, first + 1, ... (count of them) whose latents all have one shape (C, h, w)."""

    first: int
    count: int
    shape: tuple[int, ...]


def grouped(counts: list[int], shapes: list[tuple[int, ...]]) -> tuple[Group, ...]:
    """Groups one after another; empty ones are left out."""
    groups, first = [], 0
    for count, shape in zip(counts, shapes, strict=True):
        if count:
            groups.append(Group(first, count, tuple(shape)))
        first += count
    return tuple(groups)


class Shaped:
    """A data set whose items lie group after group. Subclasses have `groups` and __len__."""

    groups: tuple[Group, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Items of each group: what the order of an epoch is made from."""
        return tuple(group.count for group in self.groups)

    @property
    def largest(self) -> Group:
        return max(self.groups, key=lambda group: group.count)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, h, w) of one latent: of the largest group where there are several."""
        return self.largest.shape

    def need_one_shape(self, what: str) -> None:
        """Raises UserError where the items have several shapes, which `what` cannot hold."""
        if len(self.groups) > 1:
            raise UserError(
                f"{what} needs images of one size, and these data come in {len(self.groups)} (aspect-ratio buckets); "
                "solve every window as it comes (pairs = 0), or prepare the data without --buckets."
            )

    def preview(self, count: int) -> torch.Tensor:
        """The first items, at most `count`, that have the data set's `shape`."""
        return torch.arange(self.largest.first, self.largest.first + min(count, self.largest.count))

    def identity(self) -> str:
        """A word for which items these are: their number, shapes and some captions, without an image read. Equal on ranks that read the same."""
        items = torch.linspace(0, len(self) - 1, min(len(self), 64), dtype=torch.float64).long()
        told = [[(g.first, g.count, list(g.shape)) for g in self.groups], self.own_words(items)]
        return f"{len(self)} items, {hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]}"

    def words(self, items: torch.Tensor) -> list[str]:
        """The captions of items [B] as text; "" where a data set does not keep it."""
        return [""] * len(items)

    def own_words(self, items: torch.Tensor) -> list[str]:
        """`words` of items [B] of any shapes, of the items themselves, without an image read."""
        return self.words(items)

    def group_of(self, items: torch.Tensor) -> Group:
        """The group of items [B]. Raises ValueError where they are of several."""
        group = next(g for g in self.groups if int(items.min()) < g.first + g.count)
        if int(items.max()) >= group.first + group.count:
            raise ValueError(f"Items of several latent shapes cannot make one batch: {items.tolist()}")
        return group

    def runs(self, items: list[int]) -> list[slice]:
        """Cut a list of items where the shape changes."""
        edges = (
            [0] + [i for i in range(1, len(items)) if self._group(items[i]) != self._group(items[i - 1])] + [len(items)]
        )
        return [slice(a, b) for a, b in itertools.pairwise(edges)]

    def _group(self, item: int) -> int:
        return next(n for n, g in enumerate(self.groups) if item < g.first + g.count)
