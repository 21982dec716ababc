"""Where windows end: equal times against windows of equal velocity discrepancy.

    reflow experiment windows --bed exact

PeRFlow (arXiv 2405.07510) cuts time evenly and leaves other cuts open. The velocity of the teacher's path changes unevenly over time, so equal
times are lessons of unequal difficulty. Cuts: equal times; equal discrepancy, the path length of the velocity itself (RMS over samples) on the
table's own scale, and in z / (alpha + sigma) over sigma / (alpha + sigma); equal steps of log(sigma / alpha). K windows sampled at K steps,
before and after training.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reflow.experiments import cells
from reflow.experiments.beds import measure
from reflow.experiments.beds.exact import ExactBed, untrained
from reflow.experiments.beds.students import TEACHER_STEPS, Stage, Student
from reflow.experiments.figures import COLOURS, canvas, line_over, plain_ticks, save
from reflow.experiments.opened import opened
from reflow.flow import Windows

CUTS = ("equal times", "equal discrepancy", "equal discrepancy, flow scale", "equal log-SNR")
COUNTS = (2, 4, 8)
GRID = 200  # intervals of time that a cut is found on
STEPS = 600


def run(out: Path, *, bed: str = "exact", data: str = "", seeds: int = 3, quick: bool = False, report: bool = False, device: str = "cpu") -> None:
    """Train, measure, tabulate and draw. quick: the seconds-long form of the tests. report: make nothing, tell what is there.
    device: where the bed computes. data: of --bed mnist."""
    at = opened("windows", out, bed=bed, data=data, quick=quick, report=report, device=device)
    counts, steps, place, ref = (2,) if quick else COUNTS, 12 if quick else STEPS, at.bed, at.reference()
    densities = {cut: density(place, cut, ref) for cut in CUTS}
    edges = {(cut, k): edges_of(densities[cut], k) for cut in CUTS for k in counts}
    asked = [{"cut": cut, "windows": k, "edges": list(edges[cut, k]), "steps": n} for k in counts for cut in CUTS for n in (0, steps)]

    def work(cell: cells.Cell) -> dict[str, Any]:
        if not cell["steps"]:
            return measure.of_student(place, untrained(place), place.table(Windows(tuple(cell["edges"]))), ref)[str(cell["windows"])]
        spec = Student((Stage(tuple(cell["edges"]), cell["steps"]),), seed=cell["seed"])
        return measure.of_student(place, *at.trained(spec, range(seeds)), ref)[str(cell["windows"])]

    rows = at.make(cells.seeded(asked, seeds), work)
    found = {"densities": {cut: [round(x, 5) for x in densities[cut].tolist()] for cut in CUTS}, "cuts": gathered(rows)}
    draw(at.path("png"), found)
    at.finish(rows, text(found), found)


def density(bed: ExactBed, cut: str, ref: measure.Reference) -> Tensor:
    """[GRID] share of the whole that lies in each interval of t, from 1 to 0."""
    times = Windows.uniform(GRID)
    t = torch.tensor(times.boundaries, dtype=torch.float64)
    if cut == "equal times":
        return torch.full((GRID,), 1.0 / GRID, dtype=torch.float64)
    alpha, sigma = (x.to(torch.float64) for x in bed.schedule.alpha_sigma(t))
    if cut == "equal log-SNR":
        return shares((sigma / alpha).log().diff().abs())
    states = torch.stack(bed.path(bed.teacher, bed.solver(times, 1), ref.noise[:400], ref.labels[:400])).cpu().double()
    place = t
    if cut != "equal discrepancy":
        states, place = states / (alpha + sigma)[:, None, None], sigma / (alpha + sigma)
    velocity = states.diff(dim=0) / place.diff()[:, None, None]
    change = velocity.diff(dim=0).square().mean((1, 2)).sqrt()  # between the middles of neighbouring intervals
    return shares(torch.cat([change[:1], (change[1:] + change[:-1]) / 2, change[-1:]]))


def shares(amounts: Tensor) -> Tensor:
    return amounts / amounts.sum()


def edges_of(density: Tensor, count: int) -> tuple[float, ...]:
    """Windows that hold equal shares, on the grid of 1/1000, each wide enough for the teacher's steps in it."""
    least = (-(-TEACHER_STEPS // count) + 2) / 1000  # the last window has two indices of the table less than its width says
    whole = torch.cat([torch.zeros(1, dtype=torch.float64), density.cumsum(0)])
    t = torch.linspace(1.0, 0.0, len(whole), dtype=torch.float64)
    edges = [1.0]
    for k in range(1, count):
        i = min(int(torch.searchsorted(whole, k / count)), len(whole) - 1)
        share = float((k / count - whole[i - 1]) / (whole[i] - whole[i - 1]))
        found = round(float(t[i - 1] + share * (t[i] - t[i - 1])), 3)
        edges.append(round(max(min(found, edges[-1] - least), (count - k) * least), 3))
    return (*edges, 0.0)


def error(key: str = "paired") -> Callable[[dict[str, Any]], float]:
    return lambda result: result[key]


def gathered(rows: list[cells.Row]) -> list[dict[str, Any]]:
    """Each cut's measures over seeds, and its paired error less that of equal times."""
    found = []
    for cut, windows, steps in dict.fromkeys(tuple(row["cell"][key] for key in ("cut", "windows", "steps")) for row in rows):
        mine = cells.select(rows, cut=cut, windows=windows, steps=steps)
        equal = cells.select(rows, cut=CUTS[0], windows=windows, steps=steps)
        line = {"cut": cut, "windows": windows, "steps": steps, "edges": mine[0]["cell"]["edges"]}
        line.update({key: cells.over_seeds(mine, error(key)).as_dict() for key in ("paired", "frechet")})
        line["less_equal"] = {key: cells.paired(mine, equal, error(key)).as_dict() for key in ("paired", "frechet")}
        found.append(line)
    return found


def text(found: dict[str, Any]) -> str:
    lines = []
    for line in found["cuts"]:
        told = [cells.told(cells.Interval(**line["paired"])), cells.told(cells.Interval(**line["frechet"]), 3)]
        less = [cells.told(cells.Interval(**line["less_equal"][key]), digits, True) for key, digits in (("paired", 4), ("frechet", 3))]
        less = ["", ""] if line["cut"] == CUTS[0] else less
        edges = ", ".join(f"{edge:g}" for edge in line["edges"][1:-1])
        lines.append([line["windows"], line["cut"], edges, line["steps"] or "untrained", *told, *less])
    heads = ["windows and steps", "cut by", "inner edges", "optimizer steps", "paired error", "Fréchet distance"]
    return cells.table([*heads, "paired, less equal times", "Fréchet, less equal times"], lines) + (
        "\n± is half a 95 % interval over training seeds, of paired differences.\n"
    )


def draw(path: Path, found: dict[str, Any]) -> None:
    figure, axes = canvas(1, 3, width=13.5, height=4.2)
    for cut, colour in zip(CUTS, COLOURS[::2], strict=False):
        middles = [1 - (i + 0.5) / GRID for i in range(GRID)]
        axes[0].plot(middles, [GRID * x for x in found["densities"][cut]], color=colour, label=cut, linewidth=1.4)
        for axis, trained in zip(axes[1:], (False, True), strict=True):
            mine = [line for line in found["cuts"] if line["cut"] == cut and bool(line["steps"]) == trained]
            line_over(axis, [line["windows"] for line in mine], [cells.Interval(**line["paired"]) for line in mine], cut, colour)
    axes[0].set(xlabel="t (noise is 1)", ylabel="share of a window an interval of time", yscale="log", title="What the cuts make equal")
    axes[0].invert_xaxis()
    plain_ticks(axes[0].yaxis)
    for axis, title in zip(axes[1:], ("Untrained", f"After {max(line['steps'] for line in found['cuts'])} steps"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="windows and steps", ylabel="paired error", title=title)
        counts = sorted({line["windows"] for line in found["cuts"]})
        axis.set_xticks(counts, [str(k) for k in counts], minor=False)
        axis.minorticks_off()
        plain_ticks(axis.yaxis)
    axes[0].legend(frameon=False)
    save(figure, path)
