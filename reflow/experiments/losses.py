"""What to add to the loss of a one-step student: the ladder of "2-rectified flow++", and other losses in four windows.

    reflow experiment losses --bed exact

Improving the Training of Rectified Flows (arXiv 2405.20320) trains a 2-rectified flow with U-shaped times, pseudo-Huber, LPIPS and real data,
each of which lowers the Fréchet distance of one step there (CIFAR-10: 12.21 -> 7.14 -> 5.17 -> 5.24 -> 3.38 -> 3.07). Here one window is learnt
from the teacher's own trajectories with each of them added in that order, with each alone, and with the times that are this project's; then
four windows from noised data with each loss a recipe can have. LPIPS has no meaning for 8x8 digits; the layers of the classifier that
judges the digits model stand for it. "forward": real data, inverted by the teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reflow.experiments import cells
from reflow.experiments.beds import features, measure, students
from reflow.experiments.beds.exact import Correction, student
from reflow.experiments.beds.students import Stage, Student
from reflow.experiments.figures import COLOURS, canvas, plain_ticks, save
from reflow.experiments.opened import Opened, opened

HUBER = {"loss": "pseudo_huber", "huber_norm": "sample", "huber_c": 5.4e-4}
U = {"time_density": "u_shaped"}
FORWARD = {"forward_share": 0.2}
# name -> windows, [objective] beyond the bed's own, and whether features are added
ARMS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "uniform times": (1, {"time_density": "uniform"}, False),
    "+ U-shaped times": (1, U, False),
    "+ pseudo-Huber": (1, {**U, **HUBER}, False),
    "+ features": (1, {**U, **HUBER}, True),
    "+ real data": (1, {**U, **HUBER, **FORWARD}, True),
    "pseudo-Huber alone": (1, {"time_density": "uniform", **HUBER}, False),
    "real data alone": (1, {"time_density": "uniform", **FORWARD}, False),
    "times near the start": (1, {}, False),
    "times near the start, features": (1, {}, True),
    "times near the start, pseudo-Huber": (1, HUBER, False),
    "times near the start, real data": (1, FORWARD, False),
    "the start alone": (1, {"time_share": 1.0}, False),
    "4 windows, squared error": (4, {}, False),
    "4 windows, pseudo-Huber, an element": (4, {"loss": "pseudo_huber"}, False),
    "4 windows, pseudo-Huber, a sample": (4, HUBER, False),
    "4 windows, aligned": (4, {"loss": "aligned_v"}, False),
    "4 windows, each sample by its own loss": (4, {"normalize": "loss"}, False),
    "4 windows, each window by its speed": (4, {"window_weight": "speed"}, False),
    "4 windows, error in eps": (4, {"space": "eps"}, False),
}
LADDER = ("uniform times", "+ U-shaped times", "+ pseudo-Huber", "+ features", "+ real data")
FIRST = {1: "uniform times", 4: "4 windows, squared error"}
STEPS = 600


def run(out: Path, *, bed: str = "exact", data: str = "", seeds: int = 3, quick: bool = False, report: bool = False, device: str = "cpu") -> None:
    """Train, measure, tabulate and draw. quick: the seconds-long form of the tests. report: make nothing, tell what is there.
    device: where the bed computes. data: of --bed mnist, where no features are to be had."""
    at = opened("losses", out, bed=bed, data=data, quick=quick, report=report, device=device)
    names = ("uniform times", "+ features", FIRST[4], "4 windows, each sample by its own loss") if quick else tuple(ARMS)
    names = names if at.kind == "exact" else tuple(name for name in names if not ARMS[name][2])
    steps, ref = 12 if quick else STEPS, at.reference()
    asked = cells.seeded([{"arm": name, "steps": steps} for name in names], seeds)
    rows = at.make(asked, lambda cell: measured(at, cell, ref, range(seeds)), *features.SOURCES)
    found = {"teacher": {str(k): measure.of_teacher(at.bed, k, ref) for k in (1, 2, 4, 8)}, "arms": gathered(rows)}
    draw(at.path("png"), found)
    at.finish(rows, text(found), found)


def student_of(cell: cells.Cell) -> Student:
    windows, objective, _ = ARMS[cell["arm"]]
    keys = {**objective, **({"starts": "noise"} if windows == 1 else {})}
    return Student((Stage(windows, cell["steps"], tuple(sorted(keys.items()))),), seed=cell["seed"])


def measured(at: Opened, cell: cells.Cell, ref: measure.Reference, seeds: range) -> dict[str, Any]:
    spec = students.on(at.bed, student_of(cell))
    if ARMS[cell["arm"]][2]:
        correction = Correction(at.bed.mixture.means.shape[1], spec.width, spec.sees_output)
        correction.load_state_dict(features.weights(spec, at.store))
        model, table = student(at.bed, correction.to(at.bed.device, at.bed.dtype).requires_grad_(False)), spec.table()
    else:
        model, table = at.trained(spec, seeds)
    return measure.of_student(at.bed, model, table, ref, (1, 2))


def value(steps: int, key: str = "paired") -> Callable[[dict[str, Any]], float]:
    return lambda result: result[str(steps)][key]


def gathered(rows: list[cells.Row]) -> list[dict[str, Any]]:
    """Of each arm the measures over seeds, and less the first arm's of as many windows; of the ladder also less the rung before."""
    found = []
    there = list(dict.fromkeys(row["cell"]["arm"] for row in rows))
    for name in there:
        windows, mine = ARMS[name][0], cells.select(rows, arm=name)
        line: dict[str, Any] = {"arm": name, "windows": windows}
        for steps in (windows, 2 * windows):
            line[str(steps)] = {key: cells.over_seeds(mine, value(steps, key)).as_dict() for key in ("paired", "frechet")}
        first = cells.select(rows, arm=FIRST[windows])
        line["less_first"] = {key: cells.paired(mine, first, value(windows, key)).as_dict() for key in ("paired", "frechet")}
        if name in LADDER[1:] and LADDER[LADDER.index(name) - 1] in there:
            before = cells.select(rows, arm=LADDER[LADDER.index(name) - 1])
            line["less_before"] = {key: cells.paired(mine, before, value(windows, key)).as_dict() for key in ("paired", "frechet")}
        found.append(line)
    return found


def text(found: dict[str, Any]) -> str:
    def told(line: dict[str, Any], key: str, measure_: str, sign: bool = True) -> str:
        return cells.told(cells.Interval(**line[key][measure_]), 4 if measure_ == "paired" else 3, sign) if key in line else ""

    lines = []
    for line in found["arms"]:
        once, twice = str(line["windows"]), str(2 * line["windows"])
        row = [line["arm"], once, told(line, once, "paired", False), told(line, once, "frechet", False), told(line, twice, "paired", False)]
        lines.append([*row, *(told(line, key, m) for key in ("less_first", "less_before") for m in ("paired", "frechet"))])
    heads = ["loss", "windows and steps", "paired error", "Fréchet distance", "paired error, twice the steps"]
    heads += [f"{m}, less {what}" for what in ("the first of these windows", "the rung before") for m in ("paired", "Fréchet")]
    own = ", ".join(f"{v['paired']:.4f} and {v['frechet']:.3f} at {k}" for k, v in found["teacher"].items())
    return cells.table(heads, lines) + f"\nThe teacher's own steps: {own}. ± is half a 95 % interval over training seeds, of paired differences.\n"


def draw(path: Path, found: dict[str, Any]) -> None:
    figure, axes = canvas(1, 2, width=12.5, height=5.0)
    for axis, key, title in zip(axes, ("paired", "frechet"), ("Distance to the flow", "Distance to the data"), strict=True):
        for windows, colour in ((1, COLOURS[0]), (4, COLOURS[4])):
            lines = [line for line in found["arms"] if line["windows"] == windows]
            spans = [cells.Interval(**line[str(windows)][key]) for line in lines]
            places = [i for i, line in enumerate(found["arms"]) if line["windows"] == windows]
            own = found["teacher"][str(windows)][key]
            errors = [0.0 if s.half_width is None else s.half_width for s in spans]
            label = f"{windows} window{'s' if windows > 1 else ''}, {windows} step{'s' if windows > 1 else ''}"
            axis.errorbar([s.mean for s in spans], places, xerr=errors, fmt="o", color=colour, markersize=4, label=label)
            axis.axvline(own, color=colour, linestyle="--", linewidth=1, label=f"the teacher's own, {windows}")
        axis.set_yticks(range(len(found["arms"])), [line["arm"] for line in found["arms"]] if axis is axes[0] else [""] * len(found["arms"]))
        axis.set(xscale="log", xlabel={"paired": "paired error", "frechet": "Fréchet distance"}[key], title=title)
        axis.invert_yaxis()
        plain_ticks(axis.xaxis)
    axes[1].legend(frameon=False, loc="lower right")
    save(figure, path)
