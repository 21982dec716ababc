"""TOML as tables of plain values, with a sentence for every text that cannot be read or could not be written back."""

from __future__ import annotations

import pathlib
import re
import tomllib
from typing import Any

from reflow.errors import UserError, short

BYTES = 2**20  # of a recipe file; those that ship have some thousands
DEPTH = 8  # of tables and lists; a recipe has four
LARGEST = 2**63 - 1  # TOML's whole numbers have 64 bits
# Other control characters are written with escapes; a zero ends a path, and half a surrogate pair has no UTF-8.
UNWRITABLE = re.compile(r"[\x00\ud800-\udfff]")
# tomllib's time grows with the square of a dotted key's parts.
STRINGS = re.compile(r'"[^"\n]*"|\'[^\'\n]*\'')
LONG_KEY = re.compile(rf"(?<![\w.-])(?:[\w-]+[ \t]*\.[ \t]*){{{2 * DEPTH}}}")
NESTED = f"it nests tables or lists more than {DEPTH} deep, and a recipe has sections, stages and their values only"


def read(path: pathlib.Path) -> str:
    """The text of a recipe file, with or without a byte order mark. Raises UserError for other files."""
    try:
        with path.open("rb") as file:
            content = file.read(BYTES + 1)
        if len(content) > BYTES:
            raise UserError(f"The recipe file {path} has more than {BYTES:,} bytes, which no recipe needs; give a recipe.")
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"The recipe file {path} cannot be read (line {line} is not UTF-8); save it as text in UTF-8.") from error
    except OSError as error:
        raise UserError(f"The recipe file {path} cannot be read ({error.strerror or error}); give a file that this user may read.") from error


def parse(text: str, where: str) -> dict[str, Any]:
    """The tables of a TOML text. Raises UserError that begins with `where`."""
    if LONG_KEY.search(STRINGS.sub("q", text)):
        raise UserError(f"{where} cannot be read: {NESTED}. Write section.key = value.")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise UserError(f"{where} cannot be read: {NESTED}. Write section.key = value.") from error
    except ValueError as error:  # TOMLDecodeError is one, and so is what Python says of thousands of digits
        reason = short(str(error)) if isinstance(error, tomllib.TOMLDecodeError) else "a number in it has thousands of digits"
        raise UserError(f"{where} is not valid TOML: {reason}. Correct that line and start again.") from error


def check(raw: dict[str, Any], where: str) -> None:
    """Raises UserError for values that a written recipe could not hold: too large, too deep, or no text."""
    left: list[tuple[str, Any, int]] = [("", raw, 0)]
    while left:
        key, value, depth = left.pop()
        if depth > DEPTH:
            raise UserError(f"{where}: '{short(key)}' cannot be used: {NESTED}.")
        if isinstance(value, dict):
            left += [(f"{short(key)}.{name}" if key else name, sub, depth + 1) for name, sub in value.items()]
        elif isinstance(value, list | tuple):
            left += [(f"{short(key)}.{i}", sub, depth + 1) for i, sub in enumerate(value)]
        found = UNWRITABLE.search(value if isinstance(value, str) else "") or UNWRITABLE.search(key)
        if found:
            raise UserError(f"{where}: '{short(key)}' cannot be used: it holds the character U+{ord(found[0]):04X}, which no text has; leave it out.")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise UserError(f"{where}: '{short(key)}' cannot be used: the number has more than 64 bits; write a smaller one.")
