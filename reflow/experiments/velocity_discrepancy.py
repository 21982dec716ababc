"""How far velocities of different times lie apart, on the teacher's paths and after every stage.

    reflow experiment velocity-discrepancy --bed exact

Figure 1a of ProReflow (arXiv 2503.04824) says that velocities differ the more the further their times lie apart, so that narrow windows are
the easier lesson. Velocities are those of 32 Euler steps from one set of noises: the teacher's, and those of a student after each of the
stages 8, 4 and 2 windows, asked at the same 32 times. Discrepancy: RMS over samples and pixels of v_i - v_j. Before and after a stage, also
its mean over the pairs of times that lie in one window of that stage, over the RMS velocity: what the stage is meant to take away. Windows'
times near the starts or uniform: the former teaches steps, the latter straightness. z lies on the table's own scale and, for the teacher,
also in z / (alpha + sigma) over sigma / (alpha + sigma), where straight means other things.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reflow.experiments import cells
from reflow.experiments.beds import measure
from reflow.experiments.beds.exact import ExactBed, untrained
from reflow.experiments.beds.students import Stage, Student
from reflow.experiments.figures import COLOURS, canvas, save
from reflow.experiments.opened import opened
from reflow.flow import Windows, WindowSolver

STEPS = 32
STAGES = (8, 4, 2)
DENSITIES: dict[str, dict[str, Any]] = {"near start": {}, "uniform": {"time_density": "uniform"}}


def run(out: Path, *, bed: str = "exact", data: str = "", seeds: int = 3, quick: bool = False, report: bool = False, device: str = "cpu") -> None:
    """Train, measure, tabulate and draw. quick: the seconds-long form of the tests. report: make nothing, tell what is there.
    device: where the bed computes. data: of --bed mnist."""
    at = opened("velocity-discrepancy", out, bed=bed, data=data, quick=quick, report=report, device=device)
    steps, place = 12 if quick else 600, at.bed
    ref = at.reference()
    asked = cells.seeded([{"density": density, "steps": steps} for density in DENSITIES], seeds)
    own = velocities(place.path(place.teacher, place.solver(Windows.uniform(STEPS), 1), ref.noise, ref.labels), Windows.uniform(STEPS))
    teacher = of_velocities(own)

    def work(cell: cells.Cell) -> dict[str, Any]:
        found = {}
        for i in range(len(STAGES)):
            keys = tuple(sorted(DENSITIES[cell["density"]].items()))
            spec = Student(tuple(Stage(k, cell["steps"], keys) for k in STAGES[: i + 1]), seed=cell["seed"])
            model, table = at.trained(spec, range(seeds))
            states = place.path(model, WindowSolver.from_student(table, Windows.uniform(STEPS), 1), ref.noise, ref.labels)
            found[str(STAGES[i])] = of_velocities(velocities(states, Windows.uniform(STEPS)), kept=cell["seed"] == 0)
        return found

    rows = at.make(asked, work)
    found = {
        "teacher": teacher,
        "teacher_flow": of_velocities(velocities(own_scale(place, ref), flow_times(place))),
        "stages": gathered(rows, teacher),
        "untrained": {str(k): of_velocities(velocities(untrained_path(place, k, ref), Windows.uniform(STEPS)), kept=False) for k in STAGES},
    }
    draw(at.path("png"), rows, found)
    at.finish(rows, text(found), found)


def untrained_path(bed: ExactBed, windows: int, ref: measure.Reference) -> list[Tensor]:
    """The same of the teacher itself, its output read on the chords of so many windows: what the reading does without any training."""
    solver = WindowSolver.from_student(bed.table(Windows.uniform(windows)), Windows.uniform(STEPS), 1)
    return bed.path(untrained(bed), solver, ref.noise, ref.labels)


def velocities(states: list[Tensor], times: Windows) -> Tensor:
    """[S, B, D] of a path at the boundaries of `times`."""
    lengths = torch.tensor([end - start for start, end in zip(times.t_start, times.t_end, strict=True)])
    return torch.stack(states).diff(dim=0) / lengths[:, None, None].to(states[0])


def flow_times(bed: ExactBed) -> Windows:
    """sigma / (alpha + sigma) at the 33 times."""
    alpha, sigma = bed.schedule.alpha_sigma(torch.tensor(Windows.uniform(STEPS).boundaries, dtype=torch.float64))
    return Windows(tuple((sigma / (alpha + sigma)).tolist()))


def own_scale(bed: ExactBed, ref: measure.Reference) -> list[Tensor]:
    """The teacher's path as z / (alpha + sigma)."""
    times = Windows.uniform(STEPS)
    alpha, sigma = bed.schedule.alpha_sigma(torch.tensor(times.boundaries, dtype=torch.float64))
    states = bed.path(bed.teacher, bed.solver(times, 1), ref.noise, ref.labels)
    return [z / float(a + s) for z, a, s in zip(states, alpha, sigma, strict=True)]


def of_velocities(v: Tensor, kept: bool = True) -> dict[str, Any]:
    """distance, cosine [S][S] (where kept); by_lag [S]: mean distance of times so many steps apart; within: {windows: mean distance of times
    in one window}; all over the RMS velocity."""
    flat = v.cpu().double().transpose(0, 1)  # [B, S, D]
    inner = torch.einsum("bid,bjd->bij", flat, flat)
    square = inner.diagonal(dim1=1, dim2=2)
    distance = ((square[:, :, None] + square[:, None, :] - 2.0 * inner).clamp(min=0).mean(0) / flat.shape[2]).sqrt()
    distance = distance / (square.mean() / flat.shape[2]).sqrt()
    cosine = (inner / (square[:, :, None] * square[:, None, :]).sqrt().clamp(min=1e-12)).mean(0)
    count = len(distance)
    within = {}
    for windows in STAGES:
        size = count // windows
        block = torch.arange(count) // size
        pairs = (block[:, None] == block[None, :]) & ~torch.eye(count, dtype=torch.bool)
        within[str(windows)] = float(distance[pairs].mean())
    found: dict[str, Any] = {"by_lag": [round(float(distance.diagonal(lag).mean()), 4) for lag in range(count)], "within": within,
                             "cosine_by_lag": [round(float(cosine.diagonal(lag).mean()), 4) for lag in range(count)]}  # fmt: skip
    if kept:
        found["distance"] = [[round(x, 3) for x in row] for row in distance.tolist()]
    return found


def gathered(rows: list[cells.Row], teacher: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each stage and density the discrepancy within its windows before and after it, and the paired change."""
    found = []
    for density in DENSITIES:
        mine = cells.select(rows, density=density)
        for i, k in enumerate(STAGES):

            def before(result: dict[str, Any], i: int = i, k: int = k) -> float:
                return (teacher if i == 0 else result[str(STAGES[i - 1])])["within"][str(k)]

            def change(result: dict[str, Any], k: int = k, before: Any = before) -> float:
                return result[str(k)]["within"][str(k)] - before(result)

            after = cells.over_seeds(mine, lambda r, k=k: r[str(k)]["within"][str(k)]).as_dict()
            found.append({"density": density, "windows": k, "teacher": teacher["within"][str(k)], "before": cells.over_seeds(mine, before).as_dict(),
                          "after": after, "change": cells.over_seeds(mine, change).as_dict()})  # fmt: skip
    return found


def text(found: dict[str, Any]) -> str:
    lines = []
    for line in found["stages"]:
        each = [cells.told(cells.Interval(**line[key]), 3, key == "change") for key in ("before", "after", "change")]
        lines.append(
            [
                line["density"],
                line["windows"],
                f"{line['teacher']:.3f}",
                f"{found['untrained'][str(line['windows'])]['within'][str(line['windows'])]:.3f}",
                *each,
            ]
        )
    first = cells.table(["times", "windows", "the teacher's", "the same read on chords, untrained", "before the stage", "after it", "change"], lines)
    lags = (1, 2, 4, 8, 16, 24, 31)
    lines = [
        [name, *(f"{found[key]['by_lag'][lag]:.3f}" for lag in lags)] for name, key in (("z", "teacher"), ("z / (alpha + sigma)", "teacher_flow"))
    ]
    second = cells.table(["the teacher's discrepancy, steps apart", *lags], lines)
    return f"Discrepancy of velocities within a window, over the RMS velocity:\n\n{first}\n{second}\n± is half a 95 % interval over training seeds.\n"


def draw(path: Path, rows: list[cells.Row], found: dict[str, Any]) -> None:
    pictures = [("the teacher", found["teacher"]["distance"], 1)]
    for density in reversed(DENSITIES):
        first = cells.select(rows, density=density, seed=0)[0]["result"]
        pictures += [(f"after {k} windows, {density}", first[str(k)]["distance"], k) for k in STAGES]
    figure, axes = canvas(2, 4, width=13.0, height=6.6)
    top = max(max(map(max, values)) for _, values, _ in pictures[:1])
    places = [0, 1, 2, 3, 5, 6, 7]
    for place, (title, values, windows) in zip(places, pictures, strict=True):
        axis = axes[place]
        axis.grid(False)
        shown = axis.imshow(values, cmap="magma", vmin=0.0, vmax=top, extent=(1, 0, 0, 1))
        for edge in Windows.uniform(windows).boundaries[1:-1]:
            axis.axvline(edge, color="white", linewidth=0.7, alpha=0.8)
            axis.axhline(edge, color="white", linewidth=0.7, alpha=0.8)
        axis.set(title=title, xlabel="t", ylabel="t")
    figure.colorbar(shown, ax=[axes[3], axes[7]], label="velocity discrepancy over RMS velocity", shrink=0.8)
    lag = axes[4]
    for name, key, colour in (("z", "teacher", COLOURS[0]), ("z / (alpha + sigma)", "teacher_flow", COLOURS[4])):
        lag.plot([i / STEPS for i in range(STEPS)], found[key]["by_lag"], color=colour, label=name)
    lag.set(xlabel="distance of the times", ylabel="discrepancy", title="the teacher, by distance")
    lag.legend(frameon=False)
    save(figure, path)
