"""The tables that `reflow compare` prints."""

from __future__ import annotations

from collections.abc import Sequence

from reflow.errors import printable, short
from reflow.evaluation import table
from reflow.evaluation.comparison.text import MOST
from reflow.evaluation.comparison.verdicts import to_reference
from reflow.evaluation.sides import rows, terms
from reflow.evaluation.sides.opened import Side

WIDTH = 44  # characters of a recipe's value


def described(sides: Sequence[Side]) -> str:
    """Recipes key by key, cost, and quality with the marks of what may not be compared."""
    return "\n\n".join(filter(None, (recipes(sides), costs(sides), quality(sides))))


def recipes(sides: Sequence[Side]) -> str:
    named = [side.label for side in sides if side.recipe is not None]
    if len(named) < 2:
        return ""
    found = rows.differences(sides)
    if not found:
        return f"The recipes of {' and '.join(map(printable, named))} are the same, key by key."
    lines = [(key, *(short(printable(value), WIDTH) for value in values), "" if learnt else "no") for key, values, learnt in found]
    return "Recipe keys that differ\n" + table.columns([("key", *map(printable, named), "changes what is learnt"), *lines])


def costs(sides: Sequence[Side]) -> str:
    return "Cost\n" + table.columns([rows.COST, *(tuple(map(printable, row)) for row in rows.cost_rows(sides))])


def quality(sides: Sequence[Side]) -> str:
    found = terms.entries(sides)
    if not found:
        return "None of them holds an evaluation; `reflow evaluate` makes one."
    columns = terms.all_columns(found)
    shown = columns[:MOST]
    head = ("side", "model", "steps", "guidance", "evaluations", *(column["title"] for column in shown), "s/image + VAE")
    marks = {column["name"]: terms.marked(found, column).marks for column in (*shown, terms.TIME)}
    lines: list[tuple[str, ...]] = []
    for i, (side, result) in enumerate(found):
        for row in result.rows:
            values = []
            for column in shown:
                value, mark = row["measures"].get(column["name"]), marks[column["name"]][i]
                missing = "reference" if row["is_reference"] and to_reference(column["name"]) else "-"
                values.append(missing if value is None else f"{table.with_interval(value, column['digits'])}{f' [{mark}]' if mark else ''}")
            seconds, mark = row.get("seconds"), marks[terms.TIME["name"]][i]
            decode = "" if not seconds or seconds["decode"] is None else f" + {seconds['decode']:.3f}"
            time = f"{seconds['denoise']:.3f}{decode}{f' [{mark}]' if mark else ''}" if seconds else "-"
            named = (printable(side.label), printable(row["model"]), str(row["steps"]), f"{row['guidance']:g}", str(row["evaluations"]))
            lines.append((*named, *values, time))
    told = ["Quality", table.columns([head, *lines]), ""]
    if len(columns) > MOST:
        told.append(f"On the page there are also: {'; '.join(column['title'] for column in columns[MOST:])}.")
    told.append("± is half a 95 % interval.")
    return "\n".join([*told, *(printable(line) for line in terms.warnings(found, columns))])
