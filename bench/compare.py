"""``python -m bench compare A B``: two runs or two revisions side by side.

A and B are .jsonl files or folders of them; FOLDER@REVISION takes only the rows of that revision. Times of two
processes are comparable only on the same machine in the same state; the table says where machines or versions differ.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench import record, tables
from reflow.errors import UserError

WATCHED = ("gpu", "cpu", "torch", "triton", "cuda", "driver")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", help="a .jsonl file or a folder, with @REVISION for rows of one revision")
    parser.add_argument("second", metavar="B", help="the same")
    parser.add_argument("--only", default="", metavar="TEXT", help="cells whose case or peer holds this text")


def main(arguments: argparse.Namespace) -> int:
    print(side_by_side(load(arguments.first), load(arguments.second), arguments.only))
    return 0


def load(name: str) -> tables.Rows:
    """The rows of a file or folder, perhaps of one revision. UserError where there are none."""
    path, _, revision = name.partition("@")
    if not Path(path).exists():
        raise UserError(f"bench compare: {path} is not there; write a .jsonl file or a folder of them.")
    rows = record.read(path)
    if revision:
        known = sorted({row["stamp"].get("revision") or "unknown" for row in rows})
        rows = [row for row in rows if str(row["stamp"].get("revision")).startswith(revision)]
        if not rows:
            raise UserError(f"bench compare: {path} has no rows of revision {revision}; it has {', '.join(known)}.")
    if not rows:
        raise UserError(f"bench compare: {path} holds no rows.")
    return tables.Rows(rows, quick=True)


def side_by_side(first: tables.Rows, second: tables.Rows, only: str = "") -> str:
    """A markdown table of the cells that both have, and what differs beside the times."""
    left, right = ({record.identity(row): row for row in rows.all} for rows in (first, second))
    shared = [key for key in left if key in right and only in f"{left[key]['case']} {left[key]['peer']}"]
    lines = ["| cell | A | B | B / A | |", "|---|---|---|---|---|"]
    for key in shared:
        a, b = left[key], right[key]
        shape = "x".join(str(size) for size in a["shape"] or ())
        cell = f"{a['bench']} {a['case']} {a['dtype']} {shape} {a['mode']}/{a['cache']} {a['peer']}"
        lines.append(f"| {cell} | {_shown(a)} | {_shown(b)} | {_quotient(a, b)} | {_remark(a, b)} |")
    apart = [f"{len(left) - len(shared)} cells only in A", f"{len(right) - len(shared)} only in B"]
    differing = []
    for name in WATCHED:
        one, other = ({row["stamp"].get(name) for row in rows.all} for rows in (first, second))
        if one != other:
            differing.append(f"{name}: {_names(one)} against {_names(other)}")
    said = f"The runs differ in {'; '.join(differing)}." if differing else "Same machine and versions."
    return "\n".join([*lines, "", f"{'; '.join(apart)}. {said}"])


def _names(values: set[Any]) -> str:
    return ", ".join(sorted(str(value) for value in values))


def _shown(row: tables.Row) -> str:
    if row["median_us"] is not None:
        return f"{row['median_us']:.1f} us"
    if row["bench"] == "solver":
        return f"error {row['error']:.3g}"
    return f"{row['launches']} launches" if row["launches"] is not None else row["note"][:40]


def _quotient(a: tables.Row, b: tables.Row) -> str:
    field = "median_us" if a["median_us"] is not None else "error" if a["bench"] == "solver" else "launches"
    return f"{b[field] / a[field]:.3f}" if a[field] and b[field] is not None else "-"


def _remark(a: tables.Row, b: tables.Row) -> str:
    """Whether the ranges from p20 to p80 overlap, and unstable clocks."""
    remarks = []
    if a["median_us"] is not None and b["median_us"] is not None:
        apart = b["p20_us"] > a["p80_us"] or b["p80_us"] < a["p20_us"]
        remarks.append("" if apart else "within p20-p80")
    remarks += ["unstable clocks"] if a["unstable"] or b["unstable"] else []
    return ", ".join(remark for remark in remarks if remark)
