"""What every source of captioned images is, and what tars, tables and folders share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from reflow.data.foreign import shown
from reflow.data.pictures import stored_size, upright

REASONS = 12  # that one sentence tells


class Left(dict[str, tuple[int, str]]):
    """What is not taken: for each reason how many and the name of the first."""

    def note(self, name: str, reason: str, count: int = 1) -> None:
        before, first = self.get(reason := shown(reason), (0, shown(name)))
        self[reason] = before + count, first

    def sentence(self) -> str:
        """All of it in words, "" where there is nothing; of a great many reasons the first ones."""
        told = [
            f"{count} left out ({reason}), the first is {first}" if count > 1 else f"{first} left out ({reason})"
            for reason, (count, first) in list(self.items())[:REASONS]
        ]
        rest = [count for count, _ in list(self.values())[REASONS:]]
        return "; ".join([*told, f"{sum(rest)} more for {len(rest)} other reasons"] if rest else told)


class Source:
    """Captioned images by number, in an order that does not change. Subclasses know where they lie.

    place: what the user wrote. default: the caption of images that have none. left: what lies there and is no item.
    """

    place: str
    default: str = ""

    def __init__(self) -> None:
        self.left = Left()

    def __len__(self) -> int:
        raise NotImplementedError

    def key(self, number: int) -> str:
        """A name for messages and lists, safe to print."""
        raise NotImplementedError

    def words(self, number: int) -> str | None:
        """The caption as it is stored, None where there is none, "" where `fault` says why it cannot be used."""
        raise NotImplementedError

    def fault(self, number: int) -> str:
        """Why an item cannot be used for what its caption is, "" where it can."""
        return ""

    def open(self, number: int) -> Image.Image:
        """The image, opened and not yet decoded. Raises OSError or what else PIL raises."""
        raise NotImplementedError

    def digest(self) -> str:
        """Changes with the images' names, captions, and the stored bytes as far as size and time tell."""
        raise NotImplementedError

    def uncaptioned(self) -> tuple[int, int]:
        """How many images have no caption, and the number of the first of them."""
        missing = [number for number in range(len(self)) if self.words(number) is None]
        return len(missing), missing[0] if missing else 0

    def caption(self, number: int) -> str:
        words = self.words(number)
        return self.default if words is None else words.strip()

    def image(self, number: int) -> Image.Image:
        """The decoded image, turned as its EXIF data says. Raises OSError or what else PIL raises."""
        with self.open(number) as image:
            return upright(image)

    def sizes(self, numbers: range) -> np.ndarray:
        """(height, width) [n, 2] int32 from the images' headers; -1 where one cannot be read."""
        rows = np.full((len(numbers), 2), -1, np.int32)
        for row, number in enumerate(numbers):
            try:
                with self.open(number) as image:
                    rows[row] = stored_size(image)
            except Exception:  # noqa: BLE001, S110 - decoding it later says what is wrong
                pass
        return rows


def why_left(name: str) -> str:
    """Why a file of this name is no item."""
    if name.lower().endswith(".txt"):
        return "a caption without an image"
    return f"{Path(name).suffix or 'a name without a suffix'} is no image format that is read"


def said(left: Left) -> str:
    return f" {left.sentence()}." if left else ""


def stamp(file: Path) -> tuple[int, int]:
    """(bytes, nanoseconds of the last change) of a file, (-1, -1) where it is missing: an edit changes it, its content is not read."""
    try:
        info = file.stat()
    except OSError:
        return -1, -1
    return info.st_size, info.st_mtime_ns
