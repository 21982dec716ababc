"""The one exception that a user's own mistake raises: a sentence that says what was wrong, where, and what to do."""

from __future__ import annotations

from typing import Any

WIDTH = 100  # characters of one quoted piece of input
LONGEST = 2000  # characters of a whole sentence


class UserError(Exception):
    """Bad input. The command line prints the sentence and leaves with exit code 2, earlier outputs untouched."""

    exit_code = 2

    def __str__(self) -> str:
        return short(printable(super().__str__()), LONGEST)


def printable(text: str) -> str:
    """The text on one line, its control characters written out: a file's name or contents must not steer a terminal."""
    return "".join(c if c.isprintable() or c == "\xa0" else c.encode("unicode_escape").decode() for c in text)


def short(text: str, width: int = WIDTH) -> str:
    """The text, or its beginning and end with " ... " between them where it is longer than `width` characters."""
    return text if len(text) <= width else f"{text[: width * 2 // 3]} ... {text[len(text) - width // 4 :]}"


def quote(value: Any) -> str:
    """Any value of an input as Python writes it, at most a line of it."""
    if isinstance(value, str):
        return repr(short(value))
    try:
        return short(repr(value))
    except (RecursionError, ValueError):  # nested without end; a number of thousands of digits
        return f"a {type(value).__name__} too large to show"
