"""More steps than windows: what a student of four windows does with 4 to 32 of them, before and after it is trained.

    reflow experiment steps --bed exact

PeRFlow (arXiv 2405.07510) says that quality rises with steps; its repository's own figures rise against samples of the teacher (FID 9.46 at 4,
5.05 at 8 steps) and fall against real images (11.31, 14.16). Here both references are exact: the mixture's moments, and the teacher's own 32
steps from other noises; and the paired error to the flow. Extra steps go where the product's scheduler puts them. Uniform times are PeRFlow's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reflow.evaluation.measures.frechet import distance_of_moments, moments
from reflow.experiments import cells
from reflow.experiments.beds import measure
from reflow.experiments.beds.exact import ExactBed, Model, untrained
from reflow.experiments.beds.students import Stage, Student
from reflow.experiments.figures import COLOURS, canvas, line_over, plain_ticks, save
from reflow.experiments.opened import opened
from reflow.flow import ChordTable, Windows, WindowSolver
from reflow.sampling import PiecewiseFlowScheduler

WINDOWS = 4
COUNTS = (4, 5, 6, 8, 12, 16, 32)
ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    "untrained": (0, {}),
    "times near the start": (600, {}),
    "uniform times": (600, {"time_density": "uniform"}),
}
KEYS = ("paired", "frechet", "frechet_teacher")
SAID = {"paired": "paired error", "frechet": "Fréchet distance to the data", "frechet_teacher": "Fréchet distance to the teacher's 32 steps"}


def run(out: Path, *, bed: str = "exact", data: str = "", seeds: int = 3, quick: bool = False, report: bool = False, device: str = "cpu") -> None:
    """Train, measure, tabulate and draw. quick: the seconds-long form of the tests. report: make nothing, tell what is there.
    device: where the bed computes. data: of --bed mnist."""
    at = opened("steps", out, bed=bed, data=data, quick=quick, report=report, device=device)
    counts, place, ref = (4, 5, 8) if quick else COUNTS, at.bed, at.reference()
    noise = torch.randn(ref.noise.shape, generator=torch.Generator().manual_seed(8)).to(ref.noise)
    drawn = moments(place.sample(place.teacher, place.solver(Windows.uniform(1), 32), noise, ref.labels).double())

    def of(z: Tensor) -> dict[str, float]:
        known = measure.of_samples(place, z, ref)
        return {"paired": known["paired"], "frechet": known["frechet"], "frechet_teacher": distance_of_moments(*moments(z.double()), *drawn)}

    def work(cell: cells.Cell) -> dict[str, Any]:
        steps, objective = ARMS[cell["arm"]]
        if steps:
            spec = Student((Stage(WINDOWS, 12 if quick else steps, tuple(sorted(objective.items()))),), seed=cell["seed"])
            model, table = at.trained(spec, range(seeds))
        else:
            model, table = untrained(place), place.table(Windows.uniform(WINDOWS))
        return {str(n): of(sampled(place, model, table, split(n), ref.noise, ref.labels)) for n in counts}

    rows = at.make(cells.seeded([{"arm": arm} for arm in ARMS], seeds), work)
    solvers = {str(n): place.solver(Windows.uniform(1), n) for n in counts}
    found = {"teacher": {n: of(place.sample(place.teacher, solver, ref.noise, ref.labels)) for n, solver in solvers.items()}}
    found["arms"] = gathered(rows)
    draw(at.path("png"), found)
    at.finish(rows, text(found), found)


def split(steps: int) -> list[int]:
    """Of so many steps, each window's: as the product's scheduler gives them."""
    return PiecewiseFlowScheduler(num_time_windows=WINDOWS).counts(steps)


def sampled(bed: ExactBed, model: Model, table: ChordTable, counts: Sequence[int], noise: Tensor, labels: Tensor) -> Tensor:
    """z at t = 0 [B, D] by counts[k] Euler steps of the student's velocity in window k."""
    z = noise
    for start, end, count in zip(table.windows.t_start, table.windows.t_end, counts, strict=True):
        z = bed.sample(model, WindowSolver.from_student(table, Windows((start, end)), count), z, labels)
    return z


def value(steps: int, key: str) -> Callable[[dict[str, Any]], float]:
    return lambda result: result[str(steps)][key]


def gathered(rows: list[cells.Row]) -> list[dict[str, Any]]:
    """Of each arm and number of steps the measures over seeds, and what they lose against four steps."""
    found = []
    for arm in dict.fromkeys(row["cell"]["arm"] for row in rows):
        mine = cells.select(rows, arm=arm)
        for n in map(int, mine[0]["result"]):
            line: dict[str, Any] = {"arm": arm, "steps": n}
            for key in KEYS:
                line[key] = cells.over_seeds(mine, value(n, key)).as_dict()
                line[f"{key}_less_4"] = cells.over_seeds(mine, lambda r, n=n, key=key: value(n, key)(r) - value(WINDOWS, key)(r)).as_dict()
            found.append(line)
    return found


def text(found: dict[str, Any]) -> str:
    lines = [["the teacher's DDIM", n, *(f"{v[key]:.4f}" for key in KEYS), *[""] * len(KEYS)] for n, v in found["teacher"].items()]
    for line in found["arms"]:
        told = [cells.told(cells.Interval(**line[key])) for key in KEYS]
        lost = [cells.told(cells.Interval(**line[f"{key}_less_4"]), sign=True) if line["steps"] != WINDOWS else "" for key in KEYS]
        lines.append([f"student of 4 windows, {line['arm']}", line["steps"], *told, *lost])
    heads = ["sampler", "steps", *(SAID[key] for key in KEYS), *(f"{SAID[key]}, less at 4 steps" for key in KEYS)]
    return cells.table(heads, lines) + "\n± is half a 95 % interval over training seeds.\n"


def draw(path: Path, found: dict[str, Any]) -> None:
    figure, axes = canvas(1, 3, width=13.5, height=4.2)
    for axis, key in zip(axes, KEYS, strict=True):
        counts = [int(n) for n in found["teacher"]]
        axis.plot(counts, [v[key] for v in found["teacher"].values()], color="0.35", linestyle="--", linewidth=1.2, label="the teacher's DDIM")
        for arm, colour in zip(ARMS, (COLOURS[6], COLOURS[0], COLOURS[4]), strict=True):
            mine = [line for line in found["arms"] if line["arm"] == arm]
            line_over(axis, counts, [cells.Interval(**line[key]) for line in mine], f"4 windows, {arm}", colour)
        axis.set(xscale="log", yscale="log", xlabel="steps", ylabel=SAID[key])
        axis.set_xticks(counts, [str(n) for n in counts], minor=False)
        axis.minorticks_off()
        plain_ticks(axis.yaxis)
    axes[0].set_title("To the flow from the same noise")
    axes[1].set_title("To the data")
    axes[2].set_title("To the teacher's samples")
    axes[1].legend(frameon=False)
    save(figure, path)
