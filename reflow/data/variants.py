"""Several captions of one image: the lines of its text, and other orders of its tags.

Each of them is an item of its own, so that which caption a sample has is decided as which image it has: by (seed, stage, sample index) alone.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
from PIL import Image

from reflow.data.source import Source


class Variants(Source):
    """A source whose images come once with each of their captions, in the order of the images.

    lines: every line of a caption that is not blank is a caption. shuffles: N orders of a caption's comma-separated tags, the first as it
    stands; the `keep` first tags stay in front. An order is a function of the caption and its number. Captions that repeat count once, so
    an image with more captions is seen more often.
    """

    def __init__(self, source: Source, *, lines: bool = False, shuffles: int = 1, keep: int = 0) -> None:
        super().__init__()
        self.source, self.place, self.default, self.left = source, source.place, source.default, source.left
        self.settings = (lines, shuffles, keep)
        self.items = [
            (number, variant, text)
            for number in range(len(source))
            for variant, text in enumerate(captions(source.caption(number), lines, shuffles, keep), 1)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def key(self, number: int) -> str:
        place, variant, _ = self.items[number]
        return self.source.key(place) + (f"#{variant}" if variant > 1 else "")

    def words(self, number: int) -> str | None:
        return self.items[number][2]

    def fault(self, number: int) -> str:
        return self.source.fault(self.items[number][0])

    def open(self, number: int) -> Image.Image:
        return self.source.open(self.items[number][0])

    def image(self, number: int) -> Image.Image:
        return self.source.image(self.items[number][0])

    def sizes(self, numbers: range) -> np.ndarray:
        places = [self.items[number][0] for number in numbers]
        if not places:
            return np.full((0, 2), -1, np.int32)
        found = self.source.sizes(range(places[0], places[-1] + 1))  # items are in the order of their images
        return found[np.array(places) - places[0]]

    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.source.digest(), self.settings]).encode()).hexdigest()


def captions(text: str, lines: bool, shuffles: int, keep: int) -> list[str]:
    """The captions that one text stands for, at least one, each once."""
    whole = [line.strip() for line in text.split("\n") if line.strip()] if lines else [text]
    found = [shuffled(line, number, keep) for line in whole or [""] for number in range(shuffles)]
    return list(dict.fromkeys(found))


def shuffled(text: str, number: int, keep: int) -> str:
    """Order `number` of a caption's comma-separated tags; 0: the caption as it stands."""
    if number == 0:
        return text
    tags = [tag.strip() for tag in text.split(",") if tag.strip()]
    # By a hash of text, number and place: the same in every process and every version of Python.
    order = sorted(range(keep, len(tags)), key=lambda place: hashlib.sha256(f"{number} {place} {text}".encode()).digest())
    return ", ".join([*tags[:keep], *(tags[place] for place in order)])
