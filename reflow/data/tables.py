"""Parquet files and every source of the `datasets` library: rows with an image and a caption, memory-mapped."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image

from reflow.data.foreign import opened, shown
from reflow.data.pictures import open_picture
from reflow.data.source import Source, stamp
from reflow.errors import UserError

IMAGES, CAPTIONS = ("image", "img", "jpg", "png", "picture"), ("text", "caption", "prompt")


def from_parquet(files: list[Path]) -> Any:
    """Parquet files as one dataset (`datasets` keeps an Arrow copy in its cache). Raises UserError naming a damaged "
    "file."""
    import datasets
    import pyarrow.parquet

    for file in files:
        try:
            pyarrow.parquet.read_metadata(file)
        except Exception as error:
            raise UserError(
                f"The parquet file {file} is cut short or damaged ({first_line(error)}); copy it again, or take it "
                f"away."
            ) from error
    return loaded(
        lambda: datasets.load_dataset("parquet", data_files=[glob.escape(str(f)) for f in files], split="train"),
        str(files[0].parent),
    )


def saved(folder: Path, split: str) -> Any:
    """What `save_to_disk` of the `datasets` library wrote. Raises UserError."""
    import datasets

    return chosen(loaded(lambda: datasets.load_from_disk(str(folder)), str(folder)), split, str(folder))


def from_hub(name: str, split: str) -> Any:
    """A dataset of the hub, or of the local cache when HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set. Raises "
    "UserError."""
    import datasets

    return chosen(loaded(lambda: datasets.load_dataset(name), name), split, name)


def loaded(load: Any, place: str) -> Any:
    try:
        return load()
    except Exception as error:
        raise UserError(
            f"There is no folder {place} that can be read, and `datasets` cannot load it either "
            f"({first_line(error)}). Give a folder, "
            f"a dataset's name on the hub, or look at the connection."
        ) from error


def chosen(data: Any, split: str, place: str) -> Any:
    import datasets

    if not isinstance(data, datasets.DatasetDict):
        return data
    if split not in data:
        raise UserError(
            f"{place} has no split '{split}'; write --split {' or --split '.join(data)} (data.split in a recipe)."
        )
    return data[split]


def first_line(error: Exception) -> str:
    return textwrap.shorten(shown((str(error).splitlines() or [type(error).__name__])[0]), 160, placeholder=" ...")


class Rows(Source):
    """The rows of a dataset. Columns are found by their usual names where none is given, or UserError is raised.

    files: what to look at for changes, where the dataset's own fingerprint does not.
    """

    def __init__(
        self, data: Any, place: str, image_column: str = "", caption_column: str = "", files: list[Path] = ()
    ) -> None:
        import datasets

        super().__init__()
        self.place, self.stamps = place, [(f.name, *stamp(f)) for f in files]
        kinds = data.features
        images = [n for n, f in kinds.items() if isinstance(f, datasets.Image)] + [n for n in IMAGES if n in kinds]
        self.column = column(image_column, images, kinds, "image", place)
        self.text = column(caption_column, [n for n in CAPTIONS if n in kinds], kinds, "caption", place)
        if getattr(kinds[self.text], "dtype", None) not in ("string", "large_string"):
            raise UserError(
                f"The column {self.text} of {place} is no text ({kinds[self.text]}); name another with "
                f"--caption-column."
            )
        try:
            data = data.select_columns([self.column, self.text]).cast_column(self.column, datasets.Image(decode=False))
        except Exception as error:
            raise UserError(
                f"The column {self.column} of {place} holds no images ({first_line(error)}); name another with "
                f"--image-column."
            ) from error
        self.data, self.captions = data, data.select_columns([self.text])
        if not len(data):
            raise UserError(f"{place} has no rows.")

    def __len__(self) -> int:
        return len(self.data)

    def key(self, number: int) -> str:
        return f"row {number} of {self.place}"

    def words(self, number: int) -> str | None:
        try:
            return self.captions[number][self.text]
        except UnicodeDecodeError:
            return ""

    def fault(self, number: int) -> str:
        try:
            self.captions[number]
        except UnicodeDecodeError as error:
            return f"its caption is no UTF-8 text ({error.reason} at byte {error.start})"
        return ""

    def uncaptioned(self) -> tuple[int, int]:
        if self.captions._indices is None and not self.captions.data.column(self.text).null_count:
            return 0, 0
        return super().uncaptioned()

    def open(self, number: int) -> Image.Image:
        cell = self.data[number][self.column]
        if cell is None:
            raise ValueError("there is no image")
        if cell["bytes"] is not None:
            return open_picture(io.BytesIO(cell["bytes"]))
        opened(Path(cell["path"])).close()  # Pillow, which opens it by name itself, would wait at a pipe
        return open_picture(cell["path"])

    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.data._fingerprint, self.stamps, self.default]).encode()).hexdigest()


def column(asked: str, found: list[str], kinds: Any, what: str, place: str) -> str:
    if asked and asked in kinds:
        return asked
    if asked or not found:
        lacking = f"no column '{asked}'" if asked else f"no {what} column with a usual name"
        raise UserError(
            f"{place} has {lacking}; its columns are {', '.join(kinds)}: name one with --{what}-column "
            f"(data.{what}_column in a recipe)."
        )
    return found[0]
