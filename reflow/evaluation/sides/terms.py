"""Which numbers of several results may stand in one column: those of the same protocol, prompts, precision and networks; others are marked."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reflow.evaluation.comparison.verdicts import to_reference
from reflow.evaluation.sides.opened import Result, Side

ALWAYS = ("protocol", "prompts", "samples", "dtype")
TIME = {"name": "seconds", "title": "seconds an image"}
Entry = tuple[Side, Result]


@dataclass(frozen=True)
class Marked:
    """marks: a letter for every result that has the column, "" where all of them may be compared. said: what differs, "" for nothing."""

    marks: tuple[str, ...]
    said: str


def entries(sides: Sequence[Side]) -> list[Entry]:
    return [(side, result) for side in sides for result in side.results]


def all_columns(found: Sequence[Entry]) -> list[Mapping[str, Any]]:
    """Every column that some result has, each once, in the order of the first that has it."""
    columns: dict[str, Mapping[str, Any]] = {}
    for _, result in found:
        for column in result.columns:
            columns.setdefault(column["name"], column)
    return list(columns.values())


def relevant(column: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Of all terms those that a column depends on. A report that does not say which network a measure takes is compared by all of them."""
    if column["name"] == TIME["name"]:
        return ["device", "dtype", "timing"]
    found = list(ALWAYS)
    if to_reference(column["name"]):
        found.append("reference")
    if column.get("real", not to_reference(column["name"])):
        found.append("real images")
    network = column.get("network")
    found += [name for name in names if name.startswith("features of ") and (network is None or name == f"features of {network}")]
    return [name for name in found if name in names]


def marked(found: Sequence[Entry], column: Mapping[str, Any]) -> Marked:
    """The marks of one column over all results, in their order."""
    has = [column is TIME or any(column["name"] in row["measures"] for row in result.rows) for _, result in found]
    own = [result.terms for (_, result), there in zip(found, has, strict=True) if there]
    names = list(dict.fromkeys(name for terms in own for name in terms))
    wanted = relevant(column, names)
    keys = [tuple(terms.get(name, "none") for name in wanted) for terms in own]
    kinds = list(dict.fromkeys(keys))
    if len(kinds) < 2:
        return Marked(("",) * len(found), "")
    letter = {key: letter_of(i) for i, key in enumerate(kinds)}
    given = iter(keys)
    marks = tuple(letter[next(given)] if there else "" for there in has)
    differing = []
    for place, name in enumerate(wanted):
        letters: dict[str, list[str]] = {}
        for key in kinds:
            letters.setdefault(key[place], []).append(letter[key])
        if len(letters) > 1:
            values = "; ".join(f"{' '.join(own)}: {value}" for value, own in letters.items())
            differing.append(f"{name} ({values})")
    return Marked(marks, f"differ in {' and in '.join(differing)}")


def letter_of(number: int) -> str:
    """a, b, ..., z, a1, ..."""
    return string.ascii_lowercase[number % 26] + (str(number // 26) if number >= 26 else "")


def warnings(found: Sequence[Entry], columns: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for every way in which columns are not comparable, with the columns that it is true of."""
    said: dict[str, list[str]] = {}
    for column in (*columns, TIME):
        if why := marked(found, column).said:
            said.setdefault(why, []).append(column["title"])
    return [f"Numbers with different letters may not be compared: {'; '.join(titles)}. They {why}." for why, titles in said.items()]
