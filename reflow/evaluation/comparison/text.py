"""The table that `reflow evaluate` prints for a comparison, made from its report alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reflow.evaluation.table import columns as under_each_other
from reflow.evaluation.table import with_interval

MOST = 6  # measures side by side in a terminal


def shown(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The columns that some row has, those that the protocol wants first."""
    there = [column for column in report["columns"] if any(column["name"] in row["measures"] for row in report["rows"])]
    wanted = report["protocol"]["measures"]["wanted"]
    return sorted(there, key=lambda column: wanted.index(column["name"]) if column["name"] in wanted else len(wanted))


def cells(report: Mapping[str, Any], columns: list[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row of text for each row of the report."""
    found = []
    for row in report["rows"]:
        seconds = row.get("seconds")
        time = "-" if not seconds else f"{seconds['denoise']:.3f} + {seconds['decode']:.3f}"
        values = [
            "reference" if row["is_reference"] and c["name"] not in row["measures"] else with_interval(row["measures"].get(c["name"]), c["digits"])
            for c in columns
        ]
        found.append((row["model"], str(row["steps"]), f"{row['guidance']:g}", str(row["evaluations"]), *values, time))
    return found


def table_of(report: Mapping[str, Any], columns: list[Mapping[str, Any]]) -> str:
    head = ("model", "steps", "guidance", "evaluations", *(c["title"] for c in columns), "s/image + VAE")
    return under_each_other([head, *cells(report, columns)])



def described(report: Mapping[str, Any]) -> str:
    """The table and the sentences needed to read it."""
    columns, protocol, reference = shown(report), report["protocol"], report["reference"]
    lines = [table_of(report, columns[:MOST]), ""]
    if len(columns) > MOST:
        lines.append(f"{len(columns) - MOST} more measures are on the page and in report.json: {', '.join(c['title'] for c in columns[MOST:])}.")
    lines.append(
        f"Protocol {protocol['title']} ({protocol['digest']}): {report['prompts']['count']} prompts, {protocol['samples']['per_prompt']} images"
        f" each, noise of seed {protocol['samples']['seed']} on; ± is half a 95 % interval by bootstrap."
    )
    if reference is not None:
        guidance = "the same guidance" if reference["guidance"] is None else f"guidance {reference['guidance']:g}"
        lines.append(f"Paired with {reference['model']} at {reference['steps']} steps and {guidance}, from the same noises; pixels from -1 to 1.")
    lacking = [name for name in protocol["measures"]["wanted"] if name in report["not_measured"]]
    lines += [f"Not measured, though the protocol wants it: {name} {report['not_measured'][name]}." for name in lacking]
    lines += report["notes"]
    cost = report["cost"]
    lines.append(f"Cost: {cost['network_evaluations']:,} network evaluations, {cost['device_hours']:.2f} device hours of drawing.")
    return "\n".join(lines)
