"""What others wrote, read so that it cannot block, use up the memory, steer a terminal or end in a traceback."""

from __future__ import annotations

import codecs
import json
import os
import stat
from pathlib import Path
from typing import IO, Any

from reflow.errors import printable

TEXT = 16 * 2**20  # bytes of a text that are read: a tokenizer sees a few hundred of them
JSON = 256 * 2**20  # bytes of a JSON file that is read; a part of one is none
LINE = 400  # characters of a foreign name or message that are quoted
KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFDIR: "a folder"}


def kind_of(mode: int) -> str:
    """What a thing that is no file is, by its mode."""
    return f"it is {KINDS.get(stat.S_IFMT(mode), 'something else')}, no file"


def opened(path: Path) -> IO[bytes]:
    """A regular file, opened to be read. Raises OSError, at once and unopened for a pipe, a socket or a device."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(kind_of(mode))
    return open(path, "rb")


def shown(text: str, most: int = LINE) -> str:
    """A foreign name or message as part of one line: control characters and what is no UTF-8 written out, the middle of a long one left out."""
    if len(text) > most:
        text = f"{text[: most - most // 4]} ... {text[-most // 4 :]}"
    return printable(text).replace("\n", "\\n")


def text_in(stream: IO[bytes]) -> str:
    """The first TEXT bytes as UTF-8, without a byte order mark. Raises ValueError that says what is wrong."""
    content = stream.read(TEXT)
    try:
        return codecs.getincrementaldecoder("utf-8-sig")().decode(content, final=len(content) < TEXT)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 text ({error.reason} at byte {error.start})") from error


def json_in(stream: IO[bytes]) -> Any:
    """What a JSON file says. Raises ValueError that says what is wrong."""
    content = stream.read(JSON + 1)
    if len(content) > JSON:
        raise ValueError(f"it has more than {JSON // 2**20} MiB")
    try:
        return parsed(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 text ({error.reason} at byte {error.start})") from error


def parsed(text: str) -> Any:
    """JSON. Raises ValueError, for brackets as deep as Python's stack too."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its brackets are nested too deep") from error


def fault_of(caption: str | None) -> str:
    """Why a caption cannot be encoded, "" where it can."""
    try:
        (caption or "").encode()
    except UnicodeEncodeError as error:
        return f"its caption is no text: half a character (\\u{ord(caption[error.start]):04x}) at place {error.start + 1}"
    return ""
