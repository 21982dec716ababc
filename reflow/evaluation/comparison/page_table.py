"""The table of all models, steps and guidance of a comparison's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reflow.evaluation import table
from reflow.evaluation.comparison import verdicts
from reflow.evaluation.markup import escape, number, plain_table

Row = Mapping[str, Any]
Column = Mapping[str, Any]
COSTS = ("evaluations", "seconds an image", "VAE, seconds")
PAPER = 8  # columns beside the names that fit a sheet of paper


def head(title: str, better: str = "", narrow: bool = False, name: bool = False) -> str:
    """A head that sorts. better: "lower" or "higher" gives its arrow and which is first after a click; name: of a column of names."""
    first, sign = ("descending", "↑") if better == "higher" else ("ascending", "↓")
    arrow = f'&nbsp;<span aria-hidden="true">{sign}</span><span class="hidden">, {better} is better</span>' if better else ""
    kind = " class=narrow" if narrow else " class=name" if name else ""
    return f'<th scope="col" aria-sort="none" data-first="{first}"{kind}>{escape(title)}{arrow}</th>'


def measure_cell(row: Row, column: Column, best: Sequence[Row], mark: str = "") -> str:
    """A measure with its interval in a quieter hand, the best one marked; mark: behind the number, of what it may not be compared with."""
    found = row["measures"].get(column["name"])
    if found is None:
        return f'<td data-v="" class="pm">{"reference" if row["is_reference"] and verdicts.to_reference(column["name"]) else "−"}</td>'
    first = any(row is one for one in best)
    shown = number(table.with_interval(found, column["digits"]))
    marked = f'<sup class="mark">{escape(mark)}</sup>' if mark else ""
    return f'<td data-v="{found["mean"]!r}"{" class=best" if first else ""}>{shown}{marked}{"<span class=hidden> best</span>" if first else ""}</td>'


def cost_cells(row: Row, mark: str = "") -> list[str]:
    """Evaluations, seconds an image and those of the VAE; mark: of seconds that may not be compared."""
    marked, seconds = f'<sup class="mark">{escape(mark)}</sup>' if mark else "", row.get("seconds") or {}
    parts = [seconds.get(part) for part in ("denoise", "decode")]
    times = ['<td data-v="" class="pm">−</td>' if s is None else f'<td data-v="{s!r}">{significant(s)}{marked}</td>' for s in parts]
    return [f'<td data-v="{row["evaluations"]}">{row["evaluations"]}</td>', *times]


def significant(seconds: float) -> str:
    """Three digits that mean something, and no more than a tenth of a millisecond."""
    return f"{seconds:.4f}" if seconds < 0.1 else f"{seconds:.3f}" if seconds < 10 else f"{seconds:.1f}"


def whole(report: Mapping[str, Any], columns: Sequence[Column]) -> str:
    """All rows with all measured columns."""
    rows = report["rows"]
    fixed = [head("model"), head("steps", narrow=True), head("guidance", narrow=True)]
    heads = [head(column["title"], column["better"]) for column in columns]
    heads += [head(title, narrow=True) for title in COSTS]
    best = {column["name"]: verdicts.best(rows, column) for column in columns}
    lines = []
    for row in rows:
        cells = [measure_cell(row, column, best[column["name"]]) for column in columns] + [*cost_cells(row)]
        lines.append((row["is_reference"], [name_cell(row["model"], tag(row)), *setting_cells(row)], cells))
    return sortable("All models, steps and guidance", fixed, heads, lines)


def name_cell(name: str, tag: str = "") -> str:
    return f'<th scope="row" data-v="{escape(name)}">{escape(name)}{tag}</th>'


def tag(row: Row) -> str:
    return '<span class="tag">reference</span>' if row["is_reference"] else ""


def setting_cells(row: Row) -> list[str]:
    return [f'<td data-v="{row["steps"]}">{row["steps"]}</td>', f'<td data-v="{row["guidance"]!r}">{row["guidance"]:g}</td>']


def sortable(label: str, fixed: Sequence[str], heads: Sequence[str], lines: Sequence[tuple[bool, list[str], list[str]]]) -> str:
    """A table that scripts make sortable; lines: (whether it is a reference, the cells that say which row it is, the others). One that is too
    wide for paper is printed in parts."""

    def table_of(first: int, last: int) -> str:
        body = "".join(f"<tr{' class=reference' if marked else ''}>{''.join([*own, *cells[first:last]])}</tr>" for marked, own, cells in lines)
        return f'<table class="all"><thead><tr>{"".join([*fixed, *heads[first:last]])}</tr></thead><tbody>{body}</tbody></table>'

    several = len(heads) > PAPER
    size = -(-len(heads) // -(-len(heads) // PAPER))  # parts of equal width
    parts = [f'<div class="paper">{table_of(first, first + size)}</div>' for first in range(0, len(heads), size)] if several else []
    hidden = " screen" if several else ""
    return f'<div class="wide{hidden}" tabindex="0" role="region" aria-label="{escape(label)}">{table_of(0, len(heads))}</div>{"".join(parts)}'


def note(report: Mapping[str, Any], device: str) -> str:
    """What the table's numbers are."""
    reference, replicates = report["reference"], report["replicates"]
    told = (
        "± is half a 95 % interval by bootstrap, over prompts for measures of single images and over images for measures of sets"
        f"{f' ({replicates} resamplings)' if replicates > 1 else ' (none for sets: no resampling was asked for)'}; a number without ± has none."
        f" Bold green: the best"
        " of its column, only where its interval is apart from those of all others; the reference is left out of that"
    )
    if reference is not None:
        told += ", and measures against it rank rows of the same reference alone"
        guidance = "the same guidance" if reference["guidance"] is None else f"guidance {reference['guidance']:g}"
        told += f". The reference is {reference['model']} at {reference['steps']} steps and {guidance}, from the same noises; pixels are from -1 to 1"
    return (
        f"{told}. Evaluations: network rows an image, both halves of guidance counted. Seconds: warm, one image at a time, median of several, on"
        f" {device}; the VAE's decoding"
        " apart, text encoding in neither."
    )


def over_seeds(report: Mapping[str, Any], columns: Sequence[Column]) -> str:
    """The same measures with intervals over noises, where there are several images a prompt; "" for none."""
    there = [c for c in columns if any("over_seeds" in row["measures"].get(c["name"], ()) for row in report["rows"])]
    if not there:
        return ""
    rows = [
        (row["model"], str(row["steps"]), f"{row['guidance']:g}",
         *(table.with_interval((row["measures"].get(c["name"]) or {}).get("over_seeds"), c["digits"]) for c in there))
        for row in report["rows"] if any("over_seeds" in m for m in row["measures"].values())
    ]  # fmt: skip
    told = (
        "The measure of each seed's images alone, and Student's interval over seeds: what other noises of the same prompts would have changed. A"
        " measure of a smaller set has"
        " another bias, so its mean may differ from that above."
    )
    return (
        f"<details><summary>The same with intervals over"
        f" seeds</summary>{plain_table(('model', 'steps', 'guidance', *(c['title'] for c in there)), rows)}"
        f'<p class="note">{told}</p></details>'
    )


def straightness(report: Mapping[str, Any]) -> str:
    """The straightness of the sampled paths; "" where it was not measured."""
    if not report["straightness"]:
        return ""
    rows = []
    for s in report["straightness"]:
        inside = [w["mean"] for w in s["window_deviation"]]
        mean = f"{sum(inside) / len(inside):.3g}" if inside else "-"
        rows.append(
            (
                s["model"],
                f"{s['guidance']:g}",
                str(s["windows"]),
                str(s["steps"]),
                table.with_interval(s["path"], 3),
                mean,
                ", ".join(f"{m:.3g}" for m in inside),
            )
        )
    told = (
        "Mean over steps and dimensions of (v − (noise − data))² along the sampled latent path, and the same inside each window against that"
        " window's own chord; 0 is straight."
        " Every network is sampled in many small steps, so a student that was only taught its window starts shows that here. ± is half a 95 %"
        " interval over samples."
    )
    shown = plain_table(("model", "guidance", "windows", "steps", "whole path", "inside a window", "window by window, noise to data"), rows)
    return f'{shown}<p class="note">{told}</p>'
