"""Webdataset tars: `a.jpg` with `a.txt` or `a.json`. Where every member lies is written down once, so any image is "
"one read away."""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow
from PIL import Image

from reflow.data.foreign import fault_of, json_in, opened, shown, text_in
from reflow.data.pictures import SUFFIXES, open_picture
from reflow.data.source import Left, Source, said, stamp, why_left
from reflow.errors import UserError
from reflow.outputs import written

TEXT, NUMBER = pyarrow.string(), pyarrow.int64()
SCHEMA = pyarrow.schema([("key", TEXT), ("offset", NUMBER), ("size", NUMBER), ("caption", TEXT), ("fault", TEXT)])
NAMES = ("caption", "text")
Words = tuple[str | None, str]  # (caption, why it cannot be used)
LEFT = b"left"  # an index's note of what is no item
RULES = 3  # of which members are items; another number makes indices anew


def index_folder() -> Path:
    """Where indices are kept: $REFLOW_CACHE, or `reflow` in the user's cache folder."""
    return Path(
        os.environ.get("REFLOW_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reflow"
    )


class Tars(Source):
    """The images of tars, in the tars' order and then as they lie in each.

    A caption is the .txt member of the same name; else, or where caption_column is given, that entry of its .json
    (`caption` or `text` by default). Raises UserError naming the tar that is cut short or cannot be read.
    """

    def __init__(self, files: list[Path], place: str, caption_column: str = "") -> None:
        super().__init__()
        self.place, self.files, self.column = place, files, caption_column
        tables = [self._index(file) for file in files]
        self.ends = np.cumsum([len(t) for t in tables])
        for file, table in zip(files, tables, strict=True):
            for reason, (count, first) in json.loads(table.schema.metadata[LEFT]).items():
                self.left.note(f"{file.name}/{first}", reason, count)
        self.table = pyarrow.concat_tables([table.replace_schema_metadata() for table in tables])
        if not len(self.table):
            raise UserError(
                f"There are no images in the tars of {place}; members that Pillow opens are taken, such as .png and "
                f".jpg.{said(self.left)}"
            )

    def _index(self, file: Path) -> pyarrow.Table:
        """The members of one tar, from the index written earlier for this very file, else from the tar."""
        told = [str(file.resolve()), *stamp(file), self.column, RULES, SUFFIXES]
        name = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        kept = index_folder() / f"tar-{name[:32]}.arrow"
        try:
            with pyarrow.memory_map(str(kept)) as source:
                return pyarrow.ipc.open_file(source).read_all()
        except (OSError, pyarrow.ArrowInvalid):
            table = read_members(file, self.column)
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with (
                written(kept, shared=True) as temporary,
                pyarrow.OSFile(str(temporary), "wb") as sink,
                pyarrow.ipc.new_file(sink, table.schema) as writer,
            ):
                writer.write_table(table)
        except OSError:
            pass  # a folder that cannot be written costs reading the members again, nothing else
        return table

    def __len__(self) -> int:
        return len(self.table)

    def _file(self, number: int) -> Path:
        return self.files[int(np.searchsorted(self.ends, number, side="right"))]

    def _cell(self, column: str, number: int) -> Any:
        return self.table.column(column)[number].as_py()

    def key(self, number: int) -> str:
        return f"{shown(self._file(number).name)}/{self._cell('key', number)}"

    def words(self, number: int) -> str | None:
        return self._cell("caption", number)

    def fault(self, number: int) -> str:
        return self._cell("fault", number)

    def uncaptioned(self) -> tuple[int, int]:
        column = self.table.column("caption")
        return column.null_count, column.is_null().index(True).as_py() if column.null_count else 0

    def open(self, number: int) -> Image.Image:
        with opened(self._file(number)) as stream:
            stream.seek(self._cell("offset", number))
            return open_picture(io.BytesIO(stream.read(self._cell("size", number))))

    def digest(self) -> str:
        listed = [(f.name, *stamp(f)) for f in self.files]
        return hashlib.sha256(json.dumps([listed, self.column, self.default]).encode()).hexdigest()


def read_members(file: Path, caption_column: str) -> pyarrow.Table:
    """Images of one tar with their captions: a table of SCHEMA, with a Left in its metadata. Raises UserError naming
    the tar.

    A name's key ends at its first dot, as in webdataset. `22.05.png`, whose rest is no image suffix, is an image of its
    own with the key `22.05` where that has a caption or where the key `22` has no image; else (`a.seg.png` beside
    `a.png`) it is left out.
    """
    left, images, dotted, end = Left(), {}, {}, 0
    words: dict[str, dict[str, Words]] = {}
    try:
        with opened(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            members = [member for member in forwards(tar) if not member.isdir()]
            end = max((m.offset_data + -(-m.size // 512) * 512 for m in members if m.isfile()), default=0)
            contents = {posixpath.normpath(m.name): m for m in members if m.isfile()}
            for member in members:
                content, name = target(member, contents), posixpath.basename(member.name)
                if name.startswith("."):
                    if posixpath.splitext(name)[1].lower() in SUFFIXES:
                        left.note(member.name, "its name begins with a dot")
                    continue
                if content is None:
                    left.note(member.name, "a link out of the tar" if member.islnk() or member.issym() else "no file")
                    continue
                if content.issparse():
                    left.note(member.name, "a sparse file: its bytes do not lie in one piece")
                    continue
                _, dot, kind = name.partition(".")
                whole, suffix = posixpath.splitext(member.name)
                place = (member.name, content.offset_data, content.size)
                if dot + kind.lower() in SUFFIXES:
                    add(images, key_of(member.name), place, file)
                elif suffix.lower() in SUFFIXES:
                    add(dotted, whole, place, file)
                elif suffix.lower() in (".txt", ".json"):
                    kinds, kind = words.setdefault(whole, {}), suffix.lower()[1:]
                    if kind in kinds:
                        left.note(member.name, "a further text of one key: the last one counts")
                    kinds[kind] = words_in(tar.extractfile(content), kind, caption_column, member.name)
                else:
                    left.note(member.name, why_left(name))
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        why = shown(str(error) or type(error).__name__)
        raise UserError(f"The tar {file} is cut short or damaged ({why}); copy it again, or take it away.") from error
    if file.stat().st_size < end + 512:  # a whole tar ends in a block of zeros
        raise UserError(f"The tar {file} is cut short: its end is missing; copy it again, or take it away.")
    for key, place in dotted.items():
        short = key_of(key)
        if key in words or short not in images:
            images[key] = place
            if key not in words and short in words:
                words[key] = words[short]
        else:
            left.note(place[0], "a further image of one key")
    used = {*images, *map(key_of, dotted)}
    for key, kinds in words.items():
        if key not in used:
            left.note(f"{key}.{min(kinds)}", why_left(".txt"))
    ordered = sorted(images.items(), key=lambda item: item[1][1])
    rows = [(shown(name), *place, *caption_of(words.get(key, {}), caption_column)) for key, (name, *place) in ordered]
    schema = SCHEMA.with_metadata({LEFT: json.dumps(left)})
    return pyarrow.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], schema=schema)


def forwards(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar. Raises ReadError for one of a negative size, which would lead back to an earlier one for ever."""
    for member in tar:
        if member.size < 0:
            raise tarfile.ReadError(f"{shown(member.name)} has a negative size")
        yield member


def key_of(path: str) -> str:
    """A member's key as webdataset takes it: its path up to the first dot of its name."""
    folder, name = posixpath.split(path)
    return posixpath.join(folder, name.partition(".")[0])


def target(member: tarfile.TarInfo, contents: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The member that holds a member's bytes: of a link what it leads to; None where there is none."""
    if member.isfile():
        return member
    if member.islnk():
        return contents.get(posixpath.normpath(member.linkname))
    if member.issym():
        return contents.get(posixpath.normpath(posixpath.join(posixpath.dirname(member.name), member.linkname)))
    return None


def add(images: dict[str, tuple[str, int, int]], key: str, place: tuple[str, int, int], file: Path) -> None:
    if key in images:
        raise UserError(
            f"{file} holds two images called {shown(key)} ({shown(images[key][0])} and {shown(place[0])}); give each a name of "
            "its own."
        )
    images[key] = place


def words_in(stream: IO[bytes], kind: str, column: str, name: str) -> Words:
    """The caption of one .txt or .json member, and why it cannot be used. Only the caption is kept of a .json."""
    try:
        if kind == "txt":
            return text_in(stream), ""
        row = json_in(stream)
        if not isinstance(row, dict):
            raise ValueError("it is no object with names")
        found = next((row[key] for key in ([column] if column else NAMES) if row.get(key) is not None), None)
        if found is not None and not isinstance(found, str):
            raise ValueError("the caption in it is no text")
    except ValueError as error:
        return None, shown(f"its caption {posixpath.basename(name)} cannot be read: {error}")
    fault = fault_of(found)
    return ("" if fault else found), fault


def caption_of(words: dict[str, Words], column: str) -> tuple[str | None, str]:
    """The caption among a key's .txt and .json, None where there is none; and why it cannot be used."""
    text, fault = words.get("txt" if "txt" in words and not column else "json", (None, ""))
    return ("" if fault else text), fault
