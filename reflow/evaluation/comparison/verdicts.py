"""What the intervals of a comparison allow to be said: which row of a column is the best, and the sentence of what came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reflow.evaluation import table
from reflow.evaluation.comparison.text import shown

Row = Mapping[str, Any]


def to_reference(name: str) -> bool:
    """Whether a measure compares with the reference's samples, so that rows of different references stand apart."""
    return name.startswith("paired_") or name.endswith("_to_teacher")


def value(row: Row, name: str) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = row["measures"].get(name)
    return found


def apart(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two intervals do not touch; False where one of them has no interval."""
    if any(bound is None for bound in (a["low"], a["high"], b["low"], b["high"])):
        return False
    return bool(a["high"] < b["low"] or b["high"] < a["low"])


def groups(rows: Sequence[Row], name: str) -> list[list[Row]]:
    """The rows that a measure ranks against each other: those that have it and are no reference, by reference where it compares with one."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if value(row, name) is not None and not row["is_reference"]:
            reference = row["reference"]
            key = f"{reference['model']}\n{reference['steps']}\n{reference['guidance']:g}" if reference and to_reference(name) else ""
            found.setdefault(key, []).append(row)
    return list(found.values())


def ranked(rows: Sequence[Row], column: Mapping[str, Any]) -> list[Row]:
    """Best first."""
    return sorted(rows, key=lambda row: row["measures"][column["name"]]["mean"], reverse=column["better"] == "higher")


def leads(rows: Sequence[Row], column: Mapping[str, Any]) -> bool:
    """Whether the first of ranked rows is apart from all others; False for a single one."""
    first, *others = (row["measures"][column["name"]] for row in rows)
    return bool(others) and all(apart(first, other) for other in others)


def best(rows: Sequence[Row], column: Mapping[str, Any]) -> list[Row]:
    """The rows that may be marked as a column's best: one of each group at most, and none where intervals touch."""
    found = [ranked(group, column) for group in groups(rows, column["name"])]
    return [group[0] for group in found if leads(group, column)]


def name_of(row: Row) -> str:
    return f"{row['model']} at {row['steps']} step{'s' * (row['steps'] != 1)}, guidance {row['guidance']:g}"


def main_column(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first measure, in the protocol's order, that a row other than the reference has; None for none."""
    there = [column for column in shown(report) if groups(report["rows"], column["name"])]
    return there[0] if there else None


def summary(report: Mapping[str, Any]) -> str:
    """What came out, in a sentence that follows the intervals."""
    column = main_column(report)
    if column is None:
        return "Nothing was measured that compares the models; the table has what was drawn and what it cost."
    return (
        f"By {column['title']} ({column['better']} is better) "
        + "; ".join(told(group, column) for group in groups(report["rows"], column["name"]))
        + "."
    )


def told(group: Sequence[Row], column: Mapping[str, Any]) -> str:
    """The outcome among rows that are ranked together."""
    rows = ranked(group, column)
    first, value_of = rows[0], lambda row: table.with_interval(row["measures"][column["name"]], column["digits"])
    if len(rows) == 1:
        return f"{name_of(first)} is at {value_of(first)}, with no other to rank it against"
    beside = f"{name_of(rows[1])} ({value_of(rows[1])})"
    if leads(rows, column):
        return f"{name_of(first)} is the best of {len(rows)} ({value_of(first)}), its interval apart from that of the next, {beside}"
    known = [row for row in rows[1:] if not apart(first["measures"][column["name"]], row["measures"][column["name"]])]
    if any(row["measures"][column["name"]]["low"] is None for row in rows):
        return f"{name_of(first)} has the best mean of {len(rows)} ({value_of(first)}), next {beside}; without intervals that says no more"
    what = f"those of {len(known)} others, among them" if len(known) > 1 else "that of"
    start = f"no best of {len(rows)} can be told: the interval of {name_of(first)} ({value_of(first)})"
    return f"{start} touches {what} {beside_of(known, column)}"


def beside_of(rows: Sequence[Row], column: Mapping[str, Any]) -> str:
    return f"{name_of(rows[0])} ({table.with_interval(rows[0]['measures'][column['name']], column['digits'])})"


def at_equal_steps(report: Mapping[str, Any]) -> list[str]:
    """Of every number of steps and guidance that several models were drawn at, which of them is ahead by the main measure."""
    column = main_column(report)
    if column is None:
        return []
    found: dict[tuple[int, float], list[Row]] = {}
    for group in groups(report["rows"], column["name"]):
        for row in group:
            found.setdefault((row["steps"], row["guidance"]), []).append(row)
    lines = []
    for (steps, guidance), group in sorted(found.items()):
        rows = ranked(group, column)
        if len(rows) > 1:
            ahead = f"{rows[0]['model']} is ahead of {listed_all([row['model'] for row in rows[1:]])}"
            said = ahead if leads(rows, column) else f"intervals of {rows[0]['model']} and {touching(rows, column)} touch"
            lines.append(f"{steps} step{'s' * (steps != 1)}, guidance {guidance:g}: {said}.")
    return lines


def touching(rows: Sequence[Row], column: Mapping[str, Any]) -> str:
    first = rows[0]["measures"][column["name"]]
    return listed_all([row["model"] for row in rows[1:] if not apart(first, row["measures"][column["name"]])])


def listed_all(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
