"""Lines of text that people write: they end at \\n or \\r\\n, and nowhere else as str.splitlines has it (U+2028, form feeds, ...)."""

from __future__ import annotations

from pathlib import Path


def lines_of(text: str) -> list[str]:
    """The lines of a text without their ends; what follows the last end counts where it is not empty."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, with or without a byte order mark. Raises OSError and UnicodeDecodeError."""
    return lines_of(path.read_bytes().decode("utf-8-sig"))
