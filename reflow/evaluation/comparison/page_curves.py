"""Quality against steps: one small panel a measure as inline SVG, a line for every model and guidance, bars for the intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from reflow.evaluation.markup import escape

# Dark enough on white (3 to 1 and more) for lines, and told apart by people who see fewer colours together with the markers.
COLOURS = ("#1f6fb4", "#b4441f", "#1d7a52", "#7a4ea8", "#8a6500", "#a8325f", "#00717a", "#4d5663")
DASHES = ("", "6 3", "2 3", "8 3 2 3")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 210, 50, 10, 10, 34
Line = tuple[str, float]  # model and guidance


def styles(rows: Sequence[Mapping[str, Any]]) -> dict[Line, tuple[str, str, int]]:
    """(colour, dash, number of the marker) of every line: a colour a model, a dash a guidance."""
    models = list(dict.fromkeys(row["model"] for row in rows if not row["is_reference"]))
    scales = list(dict.fromkeys(row["guidance"] for row in rows if not row["is_reference"]))
    there = {(row["model"], row["guidance"]) for row in rows if not row["is_reference"]}
    return {
        (model, scale): (COLOURS[i % len(COLOURS)], DASHES[j % len(DASHES)], i)
        for (i, model), (j, scale) in product(enumerate(models), enumerate(scales))
        if (model, scale) in there
    }


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from at most low to at least high."""
    if high <= low:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    raw = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * f for f in (1, 2, 2.5, 5, 10) if unit * f >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def written(value: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0]
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) + (round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) == 2.5)
    return f"{value:.{digits}f}".replace("-", "−")


def marker(number: int, x: float, y: float, colour: str) -> str:
    """A filled point, of one of four shapes."""
    r = 3.4
    if number % 4 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" fill="{colour}"/>'
    shapes = {1: ((-1, -1), (1, -1), (1, 1), (-1, 1)), 2: ((0, -1.3), (1.2, 1), (-1.2, 1)), 3: ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0))}
    points = " ".join(f"{x + r * a:.1f},{y + r * b:.1f}" for a, b in shapes[number % 4])
    return f'<polygon points="{points}" fill="{colour}"/>'


def panel(rows: Sequence[Mapping[str, Any]], column: Mapping[str, Any], steps: Sequence[int], looks: Mapping[Line, tuple[str, str, int]]) -> str:
    """One measure. The reference of a guidance is a level line where it has the measure."""
    name = column["name"]
    there = [row for row in rows if name in row["measures"]]
    bounds = [bound for row in there for bound in (row["measures"][name][key] for key in ("low", "high", "mean")) if bound is not None]
    low, high = min(bounds), max(bounds)
    marks = ticks(0.0 if 0 < low < 0.5 * high else low, high)
    plot_w, plot_h = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x_of(count: int) -> float:
        return LEFT + plot_w * (steps.index(count) + 0.5) / len(steps)

    def y_of(value: float) -> float:
        return TOP + plot_h * (marks[-1] - value) / (marks[-1] - marks[0])

    parts = []
    for mark in marks:
        y = y_of(mark)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e3e7ec"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.8:.1f}" text-anchor="end">{written(mark, marks)}</text>')
    parts += [f'<text x="{x_of(count):.1f}" y="{HEIGHT - 19}" text-anchor="middle">{count}</text>' for count in steps]
    parts.append(f'<text x="{LEFT + plot_w / 2:.1f}" y="{HEIGHT - 4}" text-anchor="middle">steps</text>')
    for row in there:
        if row["is_reference"]:
            y, dash = y_of(row["measures"][name]["mean"]), next((d for (_, g), (_, d, _) in looks.items() if g == row["guidance"]), "")
            parts.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#1c2430" stroke-width="1.2"'
                f' stroke-dasharray="{dash or "none"}"/>'
            )
    for place, (line, (colour, dash, number)) in enumerate(looks.items()):
        own = sorted((row for row in there if (row["model"], row["guidance"]) == line and not row["is_reference"]), key=lambda row: row["steps"])
        aside = (place - (len(looks) - 1) / 2) * min(5.0, 0.6 * plot_w / len(steps) / len(looks))  # so that no interval hides another
        spots = [(x_of(row["steps"]) + aside, row["measures"][name]) for row in own]
        path = " ".join(f"{x:.1f},{y_of(m['mean']):.1f}" for x, m in spots)
        if len(spots) > 1:
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-dasharray="{dash or "none"}"/>')
        for x, m in spots:
            if m["low"] is not None:
                top, end = y_of(m["high"]), y_of(m["low"])
                parts.append(
                    f'<path d="M{x:.1f} {top:.1f}V{end:.1f}M{x - 2.5:.1f} {top:.1f}h5M{x - 2.5:.1f} {end:.1f}h5" stroke="{colour}" fill="none"/>'
                )
            parts.append(marker(number, x, y_of(m["mean"]), colour))
    arrow = "↓" if column["better"] == "lower" else "↑"
    label = f"{column['title']} against steps, {column['better']} is better; the numbers are in the table"
    return (
        f"<figure><figcaption>{escape(column['title'])} {arrow}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" font-size="11.5" fill="#4d5663">{"".join(parts)}</svg></figure>'
    )


def legend(looks: Mapping[Line, tuple[str, str, int]], references: Sequence[Mapping[str, Any]]) -> str:
    several = len({scale for _, scale in looks}) > 1
    items = []
    for (model, scale), (colour, dash, number) in looks.items():
        key = f'<line x1="0" x2="34" y1="6" y2="6" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dash or "none"}"/>'
        key += marker(number, 17, 6, colour)
        items.append(f'<li><svg viewBox="0 0 34 12" aria-hidden="true">{key}</svg>{escape(model)}{f", guidance {scale:g}" if several else ""}</li>')
    if references:
        line = '<line x1="0" x2="34" y1="6" y2="6" stroke="#1c2430" stroke-width="1.2"/>'
        steps = references[0]["steps"]
        items.append(
            f'<li><svg viewBox="0 0 34 12" aria-hidden="true">{line}</svg>the reference: {escape(references[0]["model"])}, {steps} steps</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def curves(report: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]) -> str:
    """All panels with their legend; "" where no row but the reference has a measure."""
    rows = report["rows"]
    steps = sorted({row["steps"] for row in rows if not row["is_reference"]})
    drawn = [c for c in columns if any(c["name"] in row["measures"] and not row["is_reference"] for row in rows)]
    if not steps or not drawn:
        return ""
    looks, names = styles(rows), {c["name"] for c in drawn}
    references = [row for row in rows if row["is_reference"] and names & row["measures"].keys()]
    return legend(looks, references) + f'<div class="panels">{"".join(panel(rows, c, steps, looks) for c in drawn)}</div>'
