"""Data that are encoded when they are asked for: for sets too large to cache. Nothing is stored."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from reflow.data import buckets
from reflow.data.encode import Encoder, Picture
from reflow.data.shapes import Shaped, grouped
from reflow.data.shards import npy
from reflow.data.source import Source
from reflow.data.sources import open_source
from reflow.data.tars import index_folder
from reflow.errors import UserError, printable
from reflow.models.conditioning import Conditioning
from reflow.models.family import Base
from reflow.outputs import written
from reflow.ranks import barrier
from reflow.recipes.sections import Data

CAPTIONS = 256  # encoded captions kept; SDXL's take 0.6 MB each


class StreamDataset(Shaped):
    """A source with the interface of `LatentDataset`: items are images by number, so any place of an epoch can be read.

    An image that cannot be read is named once, and the next one of its shape stands in for it, on every rank and in
    every run alike; more of them than `max_bad_share` are an error. One caption is encoded at a time, so that what it
    gives does not depend on what was kept.
    """

    def __init__(self, source: Source, base: Base, sizes: list[buckets.Size], *, max_bad_share: float = 0.05) -> None:
        self.source, self.base, self.sizes, self.max_bad = source, base, sizes, max_bad_share
        self.encoder = Encoder(base, source, threads=max(2, min(8, os.cpu_count() or 1)))
        order = [np.arange(len(source))]
        if len(sizes) > 1:
            bucket = buckets.nearest(sizes, scanned(source, self.encoder))
            order = [np.flatnonzero(bucket == b) for b in range(len(sizes))]
        self.numbers = np.concatenate(order)
        self.groups = grouped([len(o) for o in order], [buckets.latent_shape(base, size) for size in sizes])
        self.size_of = {buckets.latent_shape(base, size): size for size in sizes}
        self.null = base.null_conditioning(1, self.size_of[self.shape]).to("cpu", torch.float32)
        self.captions: OrderedDict[str, Conditioning] = OrderedDict()
        self.bad: dict[int, str] = {}
        self.read: dict[int, tuple[int, Picture]] = {}  # of the last items: (number, picture)

    def __len__(self) -> int:
        return len(self.numbers)

    def latent(self, items: torch.Tensor) -> torch.Tensor:
        """Latents [B,C,h,w] fp32 of items of one shape, encoded now. Raises UserError naming an image that gives "
        "NaN."""
        read = self.pictures(items)
        return torch.from_numpy(self.encoder.latents(np.stack([p[0] for _, p in read]), [number for number, _ in read]))

    def conditioning(self, items: torch.Tensor, dropped: torch.Tensor | None = None) -> Conditioning:
        """Captions of the items [B]; where `dropped` [B] bool is set, the null prompt with the image's own time ids."""
        read = self.pictures(items)
        rows = [self.caption(self.source.caption(number)) for number, _ in read]
        told = functools.reduce(Conditioning.cat, rows).with_rows(**self.own_rows(read))
        return told if dropped is None else self.null_rows(items).where(dropped, told)

    def words(self, items: torch.Tensor) -> list[str]:
        """The captions of items [B] as text."""
        return [self.source.caption(number) for number, _ in self.pictures(items)]

    def own_words(self, items: torch.Tensor) -> list[str]:
        """The captions of items [B] as text, be their images readable or not."""
        return [self.source.caption(int(self.numbers[item])) for item in items.tolist()]

    def null_rows(self, items: torch.Tensor) -> Conditioning:
        """The null prompt [B] of items, with each image's own time ids where the family has them."""
        return self.null.select(torch.zeros_like(items)).with_rows(**self.own_rows(self.pictures(items)))

    def own_rows(self, read: list[tuple[int, Picture]]) -> dict[str, torch.Tensor]:
        """What belongs to each image itself: its size and crop, where the family has a row for it."""
        return {"time_ids": torch.tensor([p[1] for _, p in read], dtype=torch.float32)} if self.null.time_ids is not None else {}

    def caption(self, words: str) -> Conditioning:
        """One encoded caption [1], from the ones kept or encoded now."""
        if words not in self.captions:
            self.captions[words] = self.encoder.text([words])
            if len(self.captions) > CAPTIONS:
                self.captions.popitem(last=False)
        self.captions.move_to_end(words)
        return self.captions[words]

    def pictures(self, items: torch.Tensor) -> list[tuple[int, Picture]]:
        """(number, picture) of each item, decoded by several threads and kept until other items are asked for."""
        wanted = dict.fromkeys(items.tolist())
        fresh = [item for item in wanted if item not in self.read]
        size = self.size_of[self.group_of(items).shape]
        found = self.encoder.pool.map(lambda item: self.encoder.picture(int(self.numbers[item]), size), fresh)
        read = {item: self.read[item] for item in wanted if item in self.read}
        for item, picture in zip(fresh, found, strict=True):
            read[item] = self.stand_in(item, picture, size)
        self.read = read
        return [read[item] for item in items.tolist()]

    def stand_in(self, item: int, picture: Picture | str, size: buckets.Size) -> tuple[int, Picture]:
        """The item's own number and picture, or those of the next readable item of its group."""
        group, place = self.group_of(torch.tensor([item])), item
        while isinstance(picture, str):
            self.miss(int(self.numbers[place]), picture)
            place = group.first + (place + 1 - group.first) % group.count
            if place == item:
                raise UserError(
                    f"None of the {group.count} images of {self.source.place} at {size[1]}x{size[0]} can be read."
                )
            number = int(self.numbers[place])
            picture = self.bad[number] if number in self.bad else self.encoder.picture(number, size)
        return int(self.numbers[place]), picture

    def miss(self, number: int, reason: str) -> None:
        """Name an unreadable image once, and stop where there are more than the share that is allowed."""
        if number in self.bad:
            return
        self.bad[number] = reason
        name = self.source.key(number)
        print(
            printable(f"{name} of {self.source.place} cannot be read ({reason}); the next image stands in for it."),
            file=sys.stderr,
            flush=True,
        )
        if len(self.bad) > self.max_bad * len(self):
            raise UserError(
                f"{len(self.bad)} of {len(self)} images of {self.source.place} cannot be read, more than "
                f"data.max_bad_share = "
                f"{self.max_bad:g} allows (the last is {name}: {reason}). Mend them, or allow a larger share."
            )


def stream(settings: Data, base: Base) -> StreamDataset:
    """The data set that a recipe's [data] with source = 'stream' describes. Raises UserError."""
    resolution = settings.resolution or base.resolution
    sizes = buckets.table(base, resolution) if settings.buckets else [(resolution, resolution)]
    if not settings.path:
        raise UserError(
            "data.source = 'stream' needs data.path: a folder of images, tars or parquet files, or a dataset's name "
            "on the hub."
        )
    with one_at_first():
        source = open_source(
            settings.path,
            caption="" if settings.missing_captions == "empty" else None,
            image_column=settings.image_column,
            caption_column=settings.caption_column,
            split=settings.split,
            caption_lines=settings.caption_lines,
            shuffle_tags=settings.shuffle_tags,
            keep_tags=settings.keep_tags,
        )
        return StreamDataset(source, base, sizes, max_bad_share=settings.max_bad_share)


def scanned(source: Source, encoder: Encoder) -> np.ndarray:
    """(height, width) [n, 2] of all images from their headers, kept in the index folder."""
    name = hashlib.sha256(json.dumps([source.place, source.digest()]).encode()).hexdigest()
    kept = index_folder() / f"sizes-{name[:32]}.npy"
    with contextlib.suppress(OSError, ValueError):
        found = np.load(kept)
        if len(found) == len(source):
            return found
    parts = [range(first, min(first + 256, len(source))) for first in range(0, len(source), 256)]
    found = np.concatenate(list(encoder.pool.map(source.sizes, parts)))
    with contextlib.suppress(OSError):  # without the file they are read again next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        with written(kept, shared=True) as temporary, open(temporary, "wb") as file:
            file.write(npy(found))
    return found


@contextlib.contextmanager
def one_at_first() -> Iterator[None]:
    """One rank a machine goes first, so that the others find its index made."""
    ranks = dist.is_initialized() and dist.get_world_size() > 1
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if ranks and not first:
        barrier()
    try:
        yield
    finally:
        if ranks and first:
            barrier()
