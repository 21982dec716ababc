"""One look for the experiments' pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reflow.evaluation.intervals import Interval
from reflow.outputs import written

# Okabe and Ito's colours, which people who see fewer colours can tell apart.
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#000000")


def canvas(rows: int, columns: int, *, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes, as a flat list."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "0.92"}
    with plt.rc_context({**style, "figure.dpi": 110, "legend.fontsize": 8, "axes.axisbelow": True}):
        figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
    return figure, list(axes.flat)


def line_over(
    axis: Any, places: Sequence[float], values: Sequence[Interval], label: str, colour: str, *, marker: str = "o", style: str = "-"
) -> None:
    """Means with their intervals as a band; at a single place as a bar."""
    means = [v.mean for v in values]
    if len(places) == 1 and values[0].half_width is not None:
        size = [values[0].half_width]
        axis.errorbar(places, means, yerr=size, color=colour, label=label, marker=marker, markersize=3.5, capsize=2, linestyle="none")
        return
    axis.plot(places, means, color=colour, label=label, marker=marker, markersize=3.5, linewidth=1.6, linestyle=style)
    if all(v.low is not None for v in values):
        axis.fill_between(places, [v.low for v in values], [v.high for v in values], color=colour, alpha=0.18, linewidth=0)


def plain_ticks(axis: Any) -> None:
    """Of one logarithmic axis (`axes.yaxis`): 1, 2 and 5 of every power of ten that is in sight, as plain numbers."""
    low, high = axis.get_view_interval()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    places = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    axis.set_ticks(places, [f"{place:g}" for place in places])
    axis.set_ticks([], minor=True)


def save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    with written(path) as place:
        figure.savefig(place, format="png")
    plt.close(figure)
