"""Long prompts: what the text encoders' limit of tokens leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SHOWN = 3


def cut(tokenizers: Sequence[Any], prompt: str) -> tuple[int, int, str]:
    """(tokens the encoders read, tokens of this prompt that they do not, the text of those).

    With two tokenizers of the same words, as SDXL's, it is the one that loses more. The limit, 77 for CLIP, counts the
    start and end tokens.
    """
    worst = (0, 0, "")
    for tokenizer in tokenizers:
        limit = tokenizer.model_max_length
        ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
        lost = ids[limit - 1 : -1] if len(ids) > limit else []
        if len(lost) >= worst[1]:
            worst = (limit, len(lost), tokenizer.decode(lost) if lost else "")
    return worst


def cut_sentence(cuts: Sequence[tuple[str, tuple[int, int, str]]]) -> str | None:
    """One sentence on all prompts that were cut, from (name, :func:`cut`) pairs; None if none was."""
    found = [(name, *what) for name, what in cuts if what[1]]
    if not found:
        return None
    lines = [
        f"{name} loses its last {lost} token{'s' * (lost != 1)}, from {_start(text)!r} on"
        for name, _, lost, text in found[:SHOWN]
    ]
    more = f"; so do {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"Text beyond {found[0][1]} tokens is not read: {'; '.join(lines)}{more}."


def _start(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
