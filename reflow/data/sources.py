"""Captioned images where they lie: folders, webdataset tars, parquet and `datasets`, each as a numbered list."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from reflow.data.pictures import stored_size, upright
from reflow.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLES = ("metadata.jsonl", "captions.jsonl")


class Source:
    """Captioned images by number, in an order that does not change. Subclasses know where they lie.

    place: what the user wrote. default: the caption of images that have none.
    """

    place: str
    default: str = ""

    def __len__(self) -> int:
        raise NotImplementedError

    def key(self, number: int) -> str:
        """A name for messages and lists."""
        raise NotImplementedError

    def words(self, number: int) -> str | None:
        """The caption as it is stored, None where there is none."""
        raise NotImplementedError

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
            except Exception:  # noqa: S110 - decoding it later says what is wrong
                pass
        return rows


class Folder(Source):
    """Images under a folder, sorted by name.

    A caption is the `text` (or `caption`) of the image's line in a metadata.jsonl or captions.jsonl beside it or above
    it, else the .txt file of the same name. Raises UserError for a folder without images or a table that cannot be
    read.
    """

    def __init__(self, path: str | Path) -> None:
        self.place, self.root = str(path), Path(path)
        files = list(visible(self.root))
        captions = {f: None for f in files if f.suffix.lower() in SUFFIXES and f.is_file()}
        for table in sorted(f for f in files if f.name in TABLES):
            captions |= dict(read_table(table))
        if not captions:
            raise UserError(
                f"There are no images under {self.root}; it takes files that end in {', '.join(SUFFIXES)}, tars or "
                f"parquet files."
            )
        self.files = sorted(captions, key=lambda f: f.relative_to(self.root).as_posix())
        self.captions = [
            captions[f] if captions[f] is not None else read_text(f.with_suffix(".txt")) for f in self.files
        ]

    def __len__(self) -> int:
        return len(self.files)

    def key(self, number: int) -> str:
        return self.files[number].relative_to(self.root).as_posix()

    def words(self, number: int) -> str | None:
        return self.captions[number]

    def open(self, number: int) -> Image.Image:
        return Image.open(self.files[number])

    def digest(self) -> str:
        total = hashlib.sha256()
        for number, file in enumerate(self.files):
            total.update(json.dumps([self.key(number), self.caption(number), *stamp(file)]).encode())
        return total.hexdigest()


def visible(root: Path) -> Iterator[Path]:
    """What lies under a folder, but for names that begin with a dot."""
    return (f for f in root.rglob("*") if not any(part.startswith(".") for part in f.relative_to(root).parts))


def stamp(file: Path) -> tuple[int, int]:
    """(bytes, nanoseconds of the last change) of a file, (-1, -1) where it is missing: an edit changes it, its "
    "content is not read."""
    try:
        info = file.stat()
    except OSError:
        return -1, -1
    return info.st_size, info.st_mtime_ns


def read_text(path: Path) -> str | None:
    """A caption file's text without surrounding blanks; None where there is no such file."""
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The caption file {path} cannot be read ({error}); write it again as UTF-8 text.") from error


def read_table(path: Path) -> Iterator[tuple[Path, str]]:
    """(image, caption) of each line of a JSONL table whose file names are relative to its folder."""
    for number, line in enumerate((read_text(path) or "").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"] if "text" in row else row["caption"]
            if (
                not isinstance(name, str)
                or not isinstance(text, str)
                or ".." in Path(name).parts
                or Path(name).is_absolute()
            ):
                raise ValueError(line)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{path}, line {number} is not like {{"file_name": "a.png", "text": "a caption"}} with a name inside '
                "that folder; correct it."
            ) from error
        yield path.parent / name, text.strip()


def open_source(
    path: str | Path,
    *,
    caption: str | None = None,
    image_column: str = "",
    caption_column: str = "",
    split: str = "train",
) -> Source:
    """The source at a path.

    path: a folder of images, of tars or of parquet files, one such file, a pattern (`shards/*.tar`), a saved `datasets`
    folder, or the name of a dataset on the hub (from its local cache when offline). caption: of images that have none;
    None: that is an error. The columns are those of parquet and `datasets`; caption_column also names the entry of a
    tar's .json. Raises UserError.
    """
    source = _open(str(path), image_column, caption_column, split)
    missing, first = source.uncaptioned()
    if missing and caption is None:
        raise UserError(
            f"{missing} of {len(source)} images of {path} have no caption, the first is {source.key(first)}: write "
            f"{Path(source.key(first)).stem}.txt beside "
            f"it, a line in metadata.jsonl or its row's caption, or give all of them one with --caption TEXT "
            f"(\"\" for none; data.missing_captions = 'empty' in a recipe that streams)."
        )
    source.default = (caption or "").strip()
    return source


def _open(path: str, image_column: str, caption_column: str, split: str) -> Source:
    from reflow.data.tables import Rows, from_hub, from_parquet, saved
    from reflow.data.tars import Tars

    place = Path(path).expanduser()
    if any(c in path for c in "*?["):
        files = sorted(Path(f) for f in glob.glob(str(place), recursive=True))
        if not files:
            raise UserError(f"No file fits the pattern {path}; correct it, or give the folder.")
    elif place.is_file():
        files = [place]
    elif place.is_dir():
        if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
            return Rows(saved(place, split), path, image_column, caption_column, files=sorted(place.rglob("*.arrow")))
        files = sorted(f for f in visible(place) if f.suffix in (".tar", ".parquet"))
        if not files:
            return Folder(place)
        loose = next((f for f in visible(place) if f.suffix.lower() in SUFFIXES), None)
        if loose is not None:
            raise UserError(
                f"{path} holds {files[0].name} and loose images such as {loose.name}; give a folder with one kind of "
                f"them."
            )
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        return Rows(from_hub(path, split), path, image_column, caption_column)
    else:
        raise UserError(
            f"There is nothing at {path}; give a folder of images, tars or parquet files, or a dataset's name on the "
            f"hub."
        )
    kinds = {f.suffix for f in files}
    if kinds == {".tar"}:
        return Tars(files, path, caption_column)
    if kinds == {".parquet"}:
        return Rows(from_parquet(files), path, image_column, caption_column)
    found = ", ".join(sorted({f.suffix or f.name for f in files}))
    raise UserError(
        f"{path} is not one kind of data ({found}); give .tar files or .parquet files (compressed tars cannot be read "
        f"at "
        "random places: unpack them with gzip -d)."
    )
