"""Captioned images where they lie: folders, webdataset tars, parquet and `datasets`, each as a numbered list."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from reflow.data.foreign import fault_of, kind_of, opened, parsed, shown, text_in
from reflow.data.pictures import SUFFIXES, open_picture
from reflow.data.source import Left, Source, said, stamp, why_left
from reflow.data.variants import Variants
from reflow.errors import UserError, printable
from reflow.lines import lines_of

TABLES = ("metadata.jsonl", "captions.jsonl")


class Folder(Source):
    """Images under a folder and the folders linked there, sorted by name.

    A caption is the `text` (or `caption`) of the image's line in a metadata.jsonl or captions.jsonl beside it or above
    it, else the .txt file of the same name. Raises UserError for a folder without images or a table that cannot be
    read.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.place, self.root = str(path), Path(path)
        noted: set[Path] = set()
        files = list(visible(self.root, self.left, noted))
        captions = {f: None for f in files if f.suffix.lower() in SUFFIXES}
        tables = sorted(f for f in files if f.name in TABLES)
        listed = set()
        for table in tables:
            for file, text in read_table(table):
                if file in listed:
                    self.left.note(self._name(file), "a further line of one image: the last one counts")
                listed.add(file)
                if file not in noted:
                    captions[file] = text
        texts = {f.with_suffix(""): f for f in sorted(files) if f.suffix.lower() == ".txt"}
        stems = {f.with_suffix("") for f in captions}
        used = {*captions, *tables, *(f for f in files if f.suffix.lower() == ".txt" and f.with_suffix("") in stems)}
        for file in sorted(set(files) - used):
            self.left.note(self._name(file), why_left(file.name))
        if not captions:
            raise UserError(
                f"There are no images under {self.root}; it takes files that Pillow opens, such as .png and .jpg, tars "
                f"or parquet files.{said(self.left)}"
            )
        self.files = sorted(captions, key=self._name)
        self.captions: list[str | None] = []
        self.faults: dict[int, str] = {}
        for number, file in enumerate(self.files):
            text, fault = captions[file], fault_of(captions[file])
            if text is None:
                text, fault = read_text(texts.get(file.with_suffix(""), file.with_suffix(".txt")))
            if fault:
                self.faults[number] = fault
            self.captions.append("" if fault else text)

    def _name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    def __len__(self) -> int:
        return len(self.files)

    def key(self, number: int) -> str:
        return shown(self._name(self.files[number]))

    def words(self, number: int) -> str | None:
        return self.captions[number]

    def fault(self, number: int) -> str:
        return self.faults.get(number, "")

    def open(self, number: int) -> Image.Image:
        opened(self.files[number]).close()  # Pillow, which opens it by name itself, would wait at a pipe
        return open_picture(self.files[number])

    def digest(self) -> str:
        total = hashlib.sha256()
        for number, file in enumerate(self.files):
            total.update(json.dumps([self._name(file), self.caption(number), *stamp(file)]).encode())
        return total.hexdigest()


def visible(root: Path, left: Left, noted: set[Path] | None = None) -> Iterator[Path]:
    """The files under a folder and the folders that are linked there, but for names that begin with a dot.

    Each folder is read once, by its own name before a link's; what cannot be followed is noted in `left`, and links that lead
    nowhere, pipes, sockets and devices by their paths in `noted`.
    """
    noted = set() if noted is None else noted
    folders, linked, seen = [root], [], set()
    while folders or linked:
        folder = folders.pop() if folders else linked.pop(0)
        name = folder.relative_to(root).as_posix()
        try:
            info = folder.stat()
            if (info.st_dev, info.st_ino) in seen:
                left.note(name, "its folder is read already")
                continue
            seen.add((info.st_dev, info.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            left.note(name, f"a folder that cannot be read: {error.strerror}")
            continue
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                if holds_pictures(path):
                    left.note(path.relative_to(root).as_posix(), "its name begins with a dot")
                continue
            try:
                mode = path.stat().st_mode  # of what a link leads to
            except OSError as error:
                left.note(path.relative_to(root).as_posix(), f"it cannot be read: {error.strerror}")
                noted.add(path)
                continue
            if stat.S_ISDIR(mode):
                (linked if entry.is_symlink() else folders).append(path)
            elif stat.S_ISREG(mode):
                yield path
            else:
                left.note(path.relative_to(root).as_posix(), kind_of(mode))
                noted.add(path)


def holds_pictures(path: Path) -> bool:
    """Whether a hidden entry is a picture, or a folder with one in it, that someone may miss."""
    try:
        names = [entry.name for entry in os.scandir(path)] if path.is_dir() else [path.name]
    except OSError:
        return False
    return any(os.path.splitext(name)[1].lower() in SUFFIXES for name in names)


def read_text(path: Path) -> tuple[str | None, str]:
    """A caption file's text without surrounding blanks, None where there is no such file; and why it cannot be used."""
    try:
        with opened(path) as stream:
            return text_in(stream).strip(), ""
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, f"its caption {path.name} cannot be read: {error}"


def table_lines(path: Path) -> list[str]:
    try:
        with opened(path) as stream:
            return lines_of(stream.read().decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The table {shown(str(path))} cannot be read ({error}); write it again as UTF-8 text.") from error


def read_table(path: Path) -> Iterator[tuple[Path, str | None]]:
    """(image, caption) of each line of a JSONL table whose file names are relative to its folder; null is no caption."""
    for number, line in enumerate(table_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = parsed(line)
            name = row["file_name"]
            captions = [row[key] for key in ("text", "caption") if key in row]
            text = next((words for words in captions if words is not None), None)
            if (
                not captions
                or not isinstance(name, str)
                or not (text is None or isinstance(text, str))
                or not Path(name).name
                or ".." in Path(name).parts
                or Path(name).is_absolute()
            ):
                raise ValueError(line)
            os.fsencode(name)
            if "\0" in name:
                raise ValueError("a name cannot hold a null")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{shown(str(path))}, line {number} is not like {{"file_name": "a.png", "text": "a caption"}} with a name inside '
                "that folder; correct it."
            ) from error
        yield path.parent / name, None if text is None else text.strip()


def open_source(
    path: str | Path,
    *,
    caption: str | None = None,
    image_column: str = "",
    caption_column: str = "",
    split: str = "train",
    caption_lines: bool = False,
    shuffle_tags: int = 1,
    keep_tags: int = 0,
) -> Source:
    """The source at a path.

    path: a folder of images, of tars or of parquet files, one such file, a pattern (`shards/*.tar`), a saved `datasets`
    folder, or the name of a dataset on the hub (from its local cache when offline). caption: of images that have none;
    None: that is an error. The columns are those of parquet and `datasets`; caption_column also names the entry of a
    tar's .json. caption_lines, shuffle_tags and keep_tags: several captions of an image, see `Variants`. Raises UserError.
    """
    if "\0" in str(path):
        raise UserError(f"There is nothing at {path}: a name cannot hold a null; correct it (--data, data.path).")
    if not str(path).strip():
        raise UserError("The place of the images is empty; write a folder, a file or a dataset's name (--data, data.path).")
    if fault_of(caption):
        raise UserError(f"--caption {caption} is no UTF-8 text; write it again.")
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
    if source.left:
        print(printable(f"reflow: of {path}:{said(source.left)}"), file=sys.stderr, flush=True)
    if caption_lines or shuffle_tags > 1:
        return Variants(source, lines=caption_lines, shuffles=shuffle_tags, keep=keep_tags)
    return source


def fitting(pattern: Path) -> list[Path]:
    """The files that fit a pattern, sorted. Its first parts are names where there are such folders, brackets and stars or not."""
    root, rest = Path(pattern.anchor), list(pattern.parts[1 if pattern.anchor else 0 :])
    while rest and (root / rest[0]).is_dir():
        root /= rest.pop(0)
    return sorted(Path(file) for file in glob.glob(os.path.join(glob.escape(str(root)), *rest), recursive=True))


def _open(path: str, image_column: str, caption_column: str, split: str) -> Source:
    from reflow.data.tables import Rows, from_hub, from_parquet, saved
    from reflow.data.tars import Tars

    place, left = Path(path).expanduser(), Left()
    if any(c in path for c in "*?[") and not place.exists():
        files = fitting(place)
        if not files:
            raise UserError(f"No file fits the pattern {path}; correct it, or give the folder.")
    elif place.is_file():
        files = [place]
    elif place.is_dir():
        if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
            return Rows(saved(place, split), path, image_column, caption_column, files=sorted(place.rglob("*.arrow")))
        found = sorted(visible(place, left))
        files = [f for f in found if f.suffix.lower() in (".tar", ".parquet")]
        if not files:
            return Folder(place)
        loose = next((f for f in found if f.suffix.lower() in SUFFIXES), None)
        for file in found:
            if file.suffix.lower() not in (".tar", ".parquet"):
                left.note(file.relative_to(place).as_posix(), "no .tar or .parquet file")
        if loose is not None:
            raise UserError(
                f"{path} holds {files[0].name} and loose images such as {loose.name}; give a folder with one kind of "
                f"them."
            )
    elif place.exists():
        raise UserError(f"{path} holds no images: {kind_of(place.stat().st_mode)}; give a folder, a file or a dataset's name on the hub.")
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        return Rows(from_hub(path, split), path, image_column, caption_column)
    else:
        raise UserError(
            f"There is nothing at {path}; give a folder of images, tars or parquet files, or a dataset's name on the "
            f"hub."
        )
    kinds = {f.suffix.lower() for f in files}
    if kinds in ({".tar"}, {".parquet"}):
        source = (
            Tars(files, path, caption_column)
            if kinds == {".tar"}
            else Rows(from_parquet(files), path, image_column, caption_column)
        )
        for reason, (count, first) in left.items():
            source.left.note(first, reason, count)
        return source
    found = ", ".join(sorted({f.suffix or f.name for f in files}))
    raise UserError(
        f"{path} is not one kind of data ({found}); give .tar files or .parquet files (compressed tars cannot be read "
        f"at "
        "random places: unpack them with gzip -d)."
    )
