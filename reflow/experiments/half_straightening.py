"""Which half of time is worth straightening, and where further steps help: four trainings by four allocations of steps.

    reflow experiment half-straightening --bed exact

The 6.s978 project "Straightening Flows" (Qian and Kim) straightens neither half of a flow, the noisy one, the clean one or both, samples with
1 or 9 steps in each and concludes that the noisy half matters more; its own FID table says the opposite, and no number of it can be used
(its middle point is misplaced, its targets are squeezed). Time is cut where sigma / (alpha + sigma) = .5, as there, or at t = .5. In a
straightened half n Euler steps of the student's chord velocity, in the other n DDIM steps: of the student itself (which drifts where nothing
trains it), of a student that is held to the teacher's velocity there (the project's remedy), or of the teacher. "a student each": the two
students of one half, each in its own. Times near the starts (what steps ask for) or uniform (as there). One row a split, times, training and
seed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reflow.experiments import cells
from reflow.experiments.beds import measure
from reflow.experiments.beds.exact import ExactBed, Model
from reflow.experiments.beds.students import Stage, Student
from reflow.experiments.figures import COLOURS, canvas, save
from reflow.experiments.opened import opened
from reflow.flow import ChordTable, Windows, WindowSolver

ALLOCATIONS = ((1, 1), (1, 9), (9, 1), (9, 9))
HALVES = {"noisy": (0,), "clean": (1,), "both": (0, 1)}
TIMES: dict[str, tuple[tuple[str, Any], ...]] = {"near start": (), "uniform": (("time_density", "uniform"),)}
# training -> the half that is straightened, and what answers in the other
TRAININGS = {
    "both": ("both", ""),
    "noisy": ("noisy", "student"),
    "clean": ("clean", "student"),
    "noisy, held to the teacher": ("noisy", "held"),
    "clean, held to the teacher": ("clean", "held"),
    "noisy, teacher elsewhere": ("noisy", "teacher"),
    "clean, teacher elsewhere": ("clean", "teacher"),
    "a student each": ("both", "each"),
}
PIXELS = (13, 35, 50)  # of the trajectories that are kept: the first noise's
MEASURES = ("paired", "frechet")
Piece = tuple[Model, WindowSolver]


def run(out: Path, *, bed: str = "exact", data: str = "", seeds: int = 3, quick: bool = False, report: bool = False, device: str = "cpu") -> None:
    """Train, measure, tabulate and draw. quick: the seconds-long form of the tests. report: make nothing, tell what is there.
    device: where the bed computes. data: of --bed mnist."""
    at = opened("half-straightening", out, bed=bed, data=data, quick=quick, report=report, device=device)
    place, steps = at.bed, 12 if quick else 600
    ref = at.reference()
    splits = {"alpha = sigma": middle(place), "t = .5": 0.5}
    kept = {name: splits[name] for name in (("t = .5",) if quick else splits)}
    asked = cells.seeded([{"split": split, "times": times, "training": training, "steps": steps}
                          for split in kept for times in (("near start",) if quick else TIMES) for training in TRAININGS], seeds)  # fmt: skip

    def work(cell: cells.Cell) -> dict[str, Any]:
        half, elsewhere = TRAININGS[cell["training"]]
        split, model = splits[cell["split"]], {}
        for name in ("noisy", "clean") if elsewhere == "each" else (half,):
            spec = student_of(name, split, cell, held=elsewhere == "held")
            trained, table = at.trained(spec, range(seeds))
            model.update(dict.fromkeys(HALVES[name], trained))
        other = place.teacher if elsewhere == "teacher" else trained
        found = {}
        for counts in ALLOCATIONS:
            states = path(place, [piece(place, table, i, n, model.get(i), other) for i, n in enumerate(counts)], ref.noise, ref.labels)
            found[named(counts)] = measure.of_samples(place, states[-1], ref)
            if cell["seed"] == 0 and counts == ALLOCATIONS[-1]:
                found["pixels"] = pixels(states)
        return found

    rows = at.make(asked, work)
    none, chorded, fine = {}, {}, {}
    for name, split in kept.items():
        for chords in (False, True):
            bare = [path(place, untrained(place, split, counts, chords=chords), ref.noise, ref.labels) for counts in ALLOCATIONS]
            own = {named(c): measure.of_samples(place, states[-1], ref) for c, states in zip(ALLOCATIONS, bare, strict=True)}
            (chorded if chords else none)[name] = {**own, "pixels": pixels(bare[-1])}
        whole = place.path(place.teacher, place.solver(windows_of(split, (9, 9)), 8, method="heun"), ref.noise[:1], ref.labels[:1])
        fine[name] = pixels(whole)
    found = {"splits": splits, "none": none, "none_on_chords": chorded, "fine": fine, "trainings": gathered(rows, none), "halves": compared(rows)}
    draw(at.path("png"), rows, found)
    at.finish(rows, text(found), found)


def middle(bed: ExactBed) -> float:
    """The time of the table's entry nearest to alpha = sigma, where the flow's own time sigma / (alpha + sigma) is .5."""
    alpha, sigma = bed.schedule.at(torch.arange(len(bed.schedule)))
    return (int((alpha - sigma).abs().argmin()) + 1) / len(bed.schedule)


def student_of(half: str, split: float, cell: cells.Cell, *, held: bool = False) -> Student:
    active = () if half == "both" else HALVES[half]
    stage = Stage((1.0, split, 0.0), cell["steps"], TIMES[cell["times"]], active=active, rest="teacher" if held else "")
    return Student((stage,), seed=cell["seed"])


def windows_of(split: float, counts: tuple[int, int]) -> Windows:
    """Each half in so many steps."""
    first, second = Windows.uniform(counts[0], 1.0, split), Windows.uniform(counts[1], split, 0.0)
    return Windows((*first.boundaries, *second.boundaries[1:]))


def piece(bed: ExactBed, table: ChordTable, half: int, steps: int, straightened: Model | None, other: Model) -> Piece:
    """Half 0 (noisy) or 1 in so many steps, a window each: Euler steps of the chord's velocity where a student is straightened, else DDIM."""
    windows = Windows.uniform(steps, table.windows.t_start[half], table.windows.t_end[half])
    if straightened is None:
        return other, bed.solver(windows, 1)
    return straightened, WindowSolver.from_student(table, windows, 1)


def untrained(bed: ExactBed, split: float, counts: tuple[int, int], *, chords: bool = False) -> list[Piece]:
    """The teacher in both halves, its steps DDIM's or read on the halves' chords, which is what a student does before its first step."""
    table = bed.table(Windows((1.0, split, 0.0)))
    return [piece(bed, table, half, n, bed.teacher if chords else None, bed.teacher) for half, n in enumerate(counts)]


def path(bed: ExactBed, pieces: list[Piece], noise: Tensor, labels: Tensor) -> list[Tensor]:
    """z at every step's end, noise first; each piece of time has a model and a solver of its own."""
    states = [noise]
    for model, solver in pieces:
        states += bed.path(model, solver, states[-1], labels)[1:]
    return states


def pixels(states: list[Tensor]) -> list[list[float]]:
    """A few pixels of the first sample at every state: [len(PIXELS)][S + 1]."""
    return [[round(float(z[0, p]), 4) for z in states] for p in PIXELS]


def named(counts: tuple[int, int]) -> str:
    return f"{counts[0]},{counts[1]}"


def value(counts: tuple[int, int], key: str = "paired") -> Callable[[dict[str, Any]], float]:
    return lambda result: result[named(counts)][key]


def gathered(rows: list[cells.Row], none: dict[str, Any]) -> list[dict[str, Any]]:
    """Each training's measures at each allocation, less no training at all; and (1, 9) less (9, 1)."""
    found = []
    for split, times, training in dict.fromkeys(tuple(r["cell"][key] for key in ("split", "times", "training")) for r in rows):
        mine = cells.select(rows, split=split, times=times, training=training)
        line: dict[str, Any] = {"split": split, "times": times, "training": training}
        for counts in ALLOCATIONS:
            own = none[split][named(counts)]["paired"]
            line[named(counts)] = {key: cells.over_seeds(mine, value(counts, key)).as_dict() for key in MEASURES}
            line[named(counts)]["less_none"] = cells.over_seeds(mine, lambda r, c=counts, own=own: value(c)(r) - own).as_dict()
        line["clean_less_noisy_steps"] = {
            key: cells.over_seeds(mine, lambda r, key=key: value((1, 9), key)(r) - value((9, 1), key)(r)).as_dict() for key in MEASURES
        }
        found.append(line)
    return found


def compared(rows: list[cells.Row]) -> list[dict[str, Any]]:
    """The noisy half's student less the clean half's, seed by seed: above zero where the clean half is the better one to straighten."""
    found = []
    for split, times in dict.fromkeys((r["cell"]["split"], r["cell"]["times"]) for r in rows):
        for clean in (name for name in TRAININGS if name.startswith("clean")):
            pair = [cells.select(rows, split=split, times=times, training=name) for name in (clean.replace("clean", "noisy"), clean)]
            for counts in ALLOCATIONS:
                line = {"split": split, "times": times, "elsewhere": TRAININGS[clean][1], "allocation": named(counts)}
                found.append({**line, **{key: cells.paired(*pair, value(counts, key)).as_dict() for key in MEASURES}})
    return found


def text(found: dict[str, Any]) -> str:
    def told(one: dict[str, Any], sign: bool = False) -> str:
        return cells.told(cells.Interval(**one), 3, sign)

    blocks = []
    for split, times in dict.fromkeys((line["split"], line["times"]) for line in found["trainings"]):
        lines = []
        for name, none in (("none", found["none"][split]), ("none, read on chords", found["none_on_chords"][split])):
            gain = [f"{none['1,9'][key] - none['9,1'][key]:+.3f}" for key in MEASURES]
            lines.append([name, *(f"{none[named(c)][key]:.3f}" for key in MEASURES for c in ALLOCATIONS), *gain])
        for line in (x for x in found["trainings"] if (x["split"], x["times"]) == (split, times)):
            each = [told(line[named(c)][key]) for key in MEASURES for c in ALLOCATIONS]
            lines.append([line["training"], *each, *(told(line["clean_less_noisy_steps"][key], True) for key in MEASURES)])
        heads = ["straightened", *(f"{said} ({named(c)})" for said in ("paired", "Fréchet") for c in ALLOCATIONS)]
        heads += ["paired (1,9) less (9,1)", "Fréchet (1,9) less (9,1)"]
        blocks.append(f"Split at {split} (t = {found['splits'][split]:g}), times {times}:\n\n{cells.table(heads, lines)}")
    lines = []
    for line in found["halves"]:
        lines.append([line["split"], line["times"], line["elsewhere"], line["allocation"], *(told(line[key], True) for key in MEASURES)])
    heads = ["split", "times", "the other half is", "steps", "paired: noisy less clean", "Fréchet: noisy less clean"]
    blocks.append("The noisy half straightened, less the clean half:\n\n" + cells.table(heads, lines))
    end = "(n, m): n steps in the noisy half, m in the clean one. ± is half a 95 % interval over training seeds, of paired differences where they are"
    return "\n".join(blocks) + f"\n{end} differences.\n"


def draw(file: Path, rows: list[cells.Row], found: dict[str, Any]) -> None:
    kept = list(found["none"])
    figure, axes = canvas(2, 4, width=15.0, height=8.0)
    names = ["none", *TRAININGS]
    panels = [(split, times) for split in kept for times in TIMES if any((x["split"], x["times"]) == (split, times) for x in found["trainings"])]
    for axis, (split, times) in zip(axes, panels, strict=False):
        for j, counts in enumerate(ALLOCATIONS):
            each = {x["training"]: x[named(counts)]["paired"] for x in found["trainings"] if (x["split"], x["times"]) == (split, times)}
            means = [found["none"][split][named(counts)]["paired"], *(each[name]["mean"] for name in TRAININGS)]
            errors = [0.0, *(((each[n]["high"] - each[n]["low"]) / 2 if each[n]["low"] is not None else 0.0) for n in TRAININGS)]
            places = [i + 0.15 * (j - 1.5) for i in range(len(names))]
            axis.errorbar(means, places, xerr=errors, fmt="o", color=COLOURS[(0, 2, 3, 4)[j]], markersize=4, label=f"({named(counts)})")
        axis.set(xscale="log", xlabel="paired error", title=f"split at {split}, times {times}")
        axis.set_xticks([0.05, 0.1, 0.2, 0.4, 0.8], [".05", ".1", ".2", ".4", ".8"])
        axis.minorticks_off()
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names))
        axis.invert_yaxis()
    for axis in axes[len(panels) : 4]:
        axis.set_visible(False)
    title = "steps in the (noisy, clean) half"
    figure.legend(*axes[0].get_legend_handles_labels(), title=title, loc="outside upper center", ncols=4, frameon=False)
    split = kept[0]
    for axis, training in zip(axes[4:], ("none", "noisy", "clean", "both"), strict=True):
        if training == "none":
            lines = found["none"][split]["pixels"]
        else:
            lines = cells.select(rows, split=split, times="near start", training=training, seed=0)[0]["result"]["pixels"]
        coarse = windows_of(found["splits"][split], (9, 9)).boundaries
        for line, whole, colour in zip(lines, found["fine"][split], COLOURS[::2], strict=False):
            axis.plot(coarse, whole, color=colour, linewidth=1, linestyle=":")
            axis.plot(coarse, line, color=colour, marker="o", markersize=3, linewidth=1.3)
        axis.axvline(found["splits"][split], color="0.5", linewidth=0.8)
        axis.set(xlabel="t", title=f"straightened: {training}; (9,9) steps", xlim=(1, 0))
    axes[4].set_ylabel("three pixels of one z; dotted: the flow")
    save(figure, file)
