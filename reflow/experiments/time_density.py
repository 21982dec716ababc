"""Where in a window a student should be trained: densities of times by windows and budget, and why uniform times lose.

    reflow experiment time-density --bed exact

A K-step sampler asks a student at the windows' starts alone; PeRFlow (arXiv 2405.07510) trains it at times uniform in the window. One row
a density, number of windows, budget and seed: paired error to the fine solve at one and two steps a window. For four windows also the
velocity error by place in the window, what the second half's gradient does to that of the start, and controls: uniform times cut off
earlier, half of the samples at the start with the rest everywhere or not, errors counted as shares, a network without the teacher's
output, a wider one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from reflow.experiments import cells
from reflow.experiments.beds import measure, pressure
from reflow.experiments.beds.exact import ExactBed, untrained
from reflow.experiments.beds.students import Stage, Student
from reflow.experiments.figures import COLOURS, canvas, line_over, save
from reflow.experiments.opened import opened
from reflow.flow import Windows

DENSITIES: dict[str, dict[str, Any]] = {
    "start": {"time_density": "window_start", "time_share": 1.0},
    "near start": {"time_density": "window_start", "time_share": 0.8, "time_upper": 0.5},
    "exponential": {"time_density": "exponential", "time_sharpness": 4.0},
    "u-shaped": {"time_density": "u_shaped", "time_sharpness": 4.0},
    "uniform": {"time_density": "uniform"},
}
# Of four windows at the middle budget: objective keys, and what differs in the student.
CONTROLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{f"uniform below {upper}": ({"time_density": "window_start", "time_share": 0.0, "time_upper": upper}, {}) for upper in (0.25, 0.5)},
    "half start, half below 0.5": ({"time_density": "window_start", "time_share": 0.5, "time_upper": 0.5}, {}),
    "half start, half everywhere": ({"time_density": "window_start", "time_share": 0.5, "time_upper": 1.0}, {}),
    "uniform, errors as shares": ({"time_density": "uniform", "normalize": "loss"}, {}),
    "uniform, twice as wide": ({"time_density": "uniform"}, {"width": 256}),
    "near start, twice as wide": (DENSITIES["near start"], {"width": 256}),
    "uniform, z alone": ({"time_density": "uniform"}, {"sees_output": False}),
    "near start, z alone": (DENSITIES["near start"], {"sees_output": False}),
}
PLACES = tuple(i / 10 for i in range(11))
MIDDLE = 600  # optimizer steps: every number of windows, and what is measured inside of windows


def run(out: Path, *, bed: str = "exact", data: str = "", seeds: int = 3, quick: bool = False, report: bool = False, device: str = "cpu") -> None:
    """Train, measure, tabulate and draw. quick: the seconds-long form of the tests. report: make nothing, tell what is there.
    device: where the bed computes. data: of --bed mnist."""
    at = opened("time-density", out, bed=bed, data=data, quick=quick, report=report, device=device)
    counts, budgets, densities = (
        ((1, 2, 4, 8), (200, MIDDLE, 2000), DENSITIES) if not quick else ((4,), (20, 60), {k: DENSITIES[k] for k in ("start", "uniform")})
    )
    middle = MIDDLE if not quick else budgets[-1]
    place = at.bed
    ref = at.reference()
    # what explains comes first, the longest last
    asked = [{"windows": 4, "density": name, "steps": middle} for name in (*densities, *(() if quick else CONTROLS))]
    asked += [{"windows": k, "density": name, "steps": middle} for k in counts if k != 4 for name in densities]
    asked += [{"windows": 4, "density": name, "steps": steps} for steps in budgets if steps != middle for name in densities]
    exact_chords = {k: measure.chords(place, Windows.uniform(k), per_window=20 if quick else 400) for k in counts}

    def work(cell: cells.Cell) -> dict[str, Any]:
        objective, more = CONTROLS[cell["density"]] if cell["density"] in CONTROLS else (DENSITIES[cell["density"]], {})
        spec = Student((Stage(cell["windows"], cell["steps"], tuple(sorted(objective.items()))),), seed=cell["seed"], **more)
        model, table = at.trained(spec, range(seeds))
        found: dict[str, Any] = {"at": measure.of_student(place, model, table, ref, (1, 2)), "evaluations": spec.evaluations()}
        if cell["windows"] == 4 and cell["steps"] == middle:
            found["profile"] = measure.profile(place, model, table, exact_chords[cell["windows"]], PLACES)
            found["pressure"] = pressure.of_student(place, at.correction(spec), table, exact_chords[cell["windows"]])
        return found

    rows = at.make(cells.seeded(asked, seeds), work, "experiments/beds/pressure.py")
    teacher = {k: measure.of_teacher(place, k, ref) for k in counts}
    own = {k: measure.profile(place, untrained(place), place.table(Windows.uniform(k)), exact_chords[k], PLACES) for k in counts}
    found = {
        "teacher": teacher,
        "teacher_8": measure.of_teacher(place, 8, ref),
        "teacher_32": measure.of_teacher(place, 32, ref),
        "untrained_profile": own,
        "untrained": {k: measure.of_student(place, untrained(place), place.table(Windows.uniform(k)), ref, (1, 2)) for k in counts},
        "steepness": steepness(place, counts),
        "rows": gathered(rows, teacher),
    }
    draw(at.path("png"), rows, found, counts, budgets, middle)
    at.finish(rows, text(rows, found, counts, budgets, middle), found)


def steepness(bed: ExactBed, counts: tuple[int, ...]) -> dict[int, list[float]]:
    """Of each window how many times as steep the exact chord velocity is in z at the window's end as at its start, in the directions that the
    data hardly vary in: 1/ratio of their standard deviations at the two ends (`GaussianData.chord_velocity`)."""
    found = {}
    for k in counts:
        table = bed.table(Windows.uniform(k))
        start, end = (
            torch.sqrt(a**2 * bed.mixture.floor + s**2) for a, s in ((table.alpha_start, table.sigma_start), (table.alpha_end, table.sigma_end))
        )
        found[k] = (start / end).tolist()
    return found


def paired_of(windows: int, per_window: int = 1) -> Any:
    return lambda result: result["at"][str(windows * per_window)]["paired"]


def gathered(rows: list[cells.Row], teacher: dict[int, dict[str, float]]) -> list[dict[str, Any]]:
    """Of each setting the paired error over seeds, and its difference to the teacher's own step a window from the same noises."""
    found = []
    for windows, density, steps in dict.fromkeys((r["cell"]["windows"], r["cell"]["density"], r["cell"]["steps"]) for r in rows):
        mine = cells.select(rows, windows=windows, density=density, steps=steps)
        error = cells.over_seeds(mine, paired_of(windows))
        own = cells.over_seeds(mine, lambda r, k=windows: r["at"][str(k)]["paired"] - teacher[k]["paired"])
        more = {key: cells.over_seeds(mine, lambda r, key=key, k=windows: r["at"][str(k)][key]).as_dict() for key in ("frechet", "nll", "agreement")}
        found.append({"windows": windows, "density": density, "steps": steps, "paired": error.as_dict(), "less_teacher": own.as_dict(),
                      "twice": cells.over_seeds(mine, paired_of(windows, 2)).as_dict(), **more})  # fmt: skip
    return found


def text(rows: list[cells.Row], found: dict[str, Any], counts: tuple[int, ...], budgets: tuple[int, ...], middle: int) -> str:
    names = [name for name in DENSITIES if cells.select(rows, density=name)]

    def error(**setting: Any) -> str:
        mine = cells.select(rows, **setting)
        return cells.told(cells.over_seeds(mine, paired_of(setting["windows"]))) if mine else ""

    blocks = []
    for k in counts:
        each = budgets if k == 4 else (middle,)
        if not cells.select(rows, windows=k):
            continue
        lines = [[name, *(error(windows=k, density=name, steps=s) for s in each)] for name in names]
        own = f"{k} windows, {k} steps; the teacher's own {k} steps: {found['teacher'][k]['paired']:.4f}"
        blocks.append(f"{own}\n\n" + cells.table(["times", *(f"{s} optimizer steps" for s in each)], lines))
    controls = [name for name in CONTROLS if cells.select(rows, density=name)]
    lines = []
    for name in (*names, *controls):
        mine = cells.select(rows, windows=4, density=name, steps=middle)
        own = found["teacher"][4]["paired"]
        numbers = [cells.over_seeds(mine, paired_of(4)), cells.over_seeds(mine, lambda r, own=own: paired_of(4)(r) - own)]
        numbers.append(cells.over_seeds(mine, paired_of(4, 2)))
        numbers += [cells.over_seeds(mine, lambda r, i=i: sum(w[i] for w in r["profile"]) / len(r["profile"])) for i in (0, -1)]
        numbers += [cells.over_seeds(mine, lambda r, key=key: r["pressure"][key]) for key in ("ratio", "cosine")]
        digits = ((4, False), (4, True), (4, False), (3, False), (3, False), (1, False), (2, True))
        lines.append([name, *(cells.told(number, *form) for number, form in zip(numbers, digits, strict=True))])
    own = found["untrained_profile"][4]
    lines.append(
        [
            "untrained",
            f"{found['teacher'][4]['paired']:.4f}",
            "0",
            f"{found['untrained'][4]['8']['paired']:.4f}",
            *(f"{sum(w[i] for w in own) / 4:.3f}" for i in (0, -1)),
            "",
            "",
        ]
    )
    heads = [
        "4 windows, times",
        f"paired error, 4 steps, after {middle}",
        "less the teacher's",
        "two steps a window",
        "velocity error at the starts",
        "at the ends",
    ]
    heads += ["gradient, second half over start", "their cosine"]
    lines.append(["the teacher's DDIM of 8 steps", "", "", f"{found['teacher_8']['paired']:.4f}", "", "", "", ""])
    means = "Paired error: RMS pixel distance (pixels -1 to 1) to the fine solve from the same noises. ± is half a 95 % interval over training seeds."
    return "\n".join([*blocks, cells.table(heads, lines)]) + f"\n{means}\n"


def draw(path: Path, rows: list[cells.Row], found: dict[str, Any], counts: tuple[int, ...], budgets: tuple[int, ...], middle: int) -> None:
    figure, axes = canvas(1, 3, width=13.5, height=4.2)
    names = [name for name in DENSITIES if cells.select(rows, density=name)]
    for name, colour in zip(names, COLOURS, strict=False):
        there = {s: cells.select(rows, windows=4, density=name, steps=s) for s in budgets}
        there = {s: mine for s, mine in there.items() if mine}
        line_over(axes[0], list(there), [cells.over_seeds(mine, paired_of(4)) for mine in there.values()], name, colour)
        ratio = {}
        for k in counts:
            mine, own = cells.select(rows, windows=k, density=name, steps=middle), found["teacher"][k]["paired"]
            if mine:
                ratio[k] = cells.over_seeds(mine, lambda r, k=k, own=own: paired_of(k)(r) / own)
        line_over(axes[1], list(ratio), list(ratio.values()), name, colour)
        mine = cells.select(rows, windows=4, density=name, steps=middle)
        each = [cells.over_seeds(mine, lambda r, i=i: sum(w[i] for w in r["profile"]) / 4) for i in range(len(PLACES))]
        line_over(axes[2], PLACES, each, name, colour, marker="")
    own = found["teacher"][4]["paired"]
    axes[0].axhline(own, color="0.35", linestyle="--", linewidth=1)
    axes[0].annotate("the teacher's own 4 steps", (budgets[0], own), xytext=(0, 4), textcoords="offset points", color="0.35")
    axes[0].set(xlabel="optimizer steps of 128 samples", ylabel="paired error, 4 windows, 4 steps", title="Four windows, by budget")
    axes[1].axhline(1.0, color="0.35", linestyle="--", linewidth=1)
    axes[1].set(xlabel="windows, one step each", ylabel="paired error over the teacher's own", title=f"After {middle} steps, by windows")
    for axis, places in ((axes[0], budgets), (axes[1], counts)):
        axis.set_xscale("log")
        axis.set_xticks(places, [str(p) for p in places], minor=False)
        axis.minorticks_off()
    own = [sum(w[i] for w in found["untrained_profile"][4]) / 4 for i in range(len(PLACES))]
    axes[2].plot(PLACES, own, color="0.35", linestyle="--", linewidth=1, label="untrained")
    axes[2].axvline(0.0, color="0.8", linewidth=6, zorder=0)
    axes[2].set(
        xlabel="place in the window: 0 its start (all that 4 steps use), 1 its end",
        ylabel="relative velocity error, 4 windows",
        title="Where the error lies",
    )
    axes[2].legend(frameon=False)
    save(figure, path)
