"""Few steps for a custom model by adding weights: what the delta of the base's student gives a base that was fine-tuned elsewhere.

    reflow experiment plug-and-play --bed exact

PeRFlow (arXiv 2405.07510) adds dW = W_student - W_base to models that others fine-tuned from the same base, W_custom + dW, and shows pictures.
Here the base is the teacher, whose network beside the exact output says nothing yet; custom models train that network by denoising on digits
of other contrast, of another place, or of one of two kinds a class. Judged is the distance to the custom model's own fine solve: of the custom
itself at 32 and 4 DDIM steps, of the custom plus the delta, of both networks' answers added instead of their weights, of a delta between other
first weights, of the base's student alone, and of the custom model's own student at the same cost. Delta and sum are the product's
(`reflow.weights.delta`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reflow.evaluation.frechet import distance_of_moments, moments
from reflow.evaluation.metrics import paired_error
from reflow.experiments import cells
from reflow.experiments.beds import custom as customs
from reflow.experiments.beds import methods, students
from reflow.experiments.beds.custom import SHIFTS, Custom
from reflow.experiments.beds.exact import Model
from reflow.experiments.beds.measure import Reference
from reflow.experiments.beds.methods import METHODS
from reflow.experiments.beds.students import Student
from reflow.experiments.figures import COLOURS, canvas, save
from reflow.experiments.opened import Opened, opened
from reflow.flow import Windows
from reflow.weights import delta

STUDENTS = ("4 windows, near start", "PeRFlow")
BUDGET, TUNING, STEPS = 400_000, 3000, 4
WAYS = {
    "custom_32": "custom, 32 DDIM steps",
    "custom_4": "custom, 4 DDIM steps",
    "merged": "custom + delta, 4 steps",
    "added": "answers added, 4 steps",
    "other_base": "custom + delta between other first weights, 4 steps",
    "base_student": "the base's student, 4 steps",
    "distilled": "the custom's own student, 4 steps",
}


def run(out: Path, *, bed: str = "exact", data: str = "", seeds: int = 3, quick: bool = False, report: bool = False) -> None:
    """Train, measure, tabulate and draw. quick: the seconds-long form of the tests. report: make nothing, tell what is there.
    data: of --bed mnist."""
    at = opened("plug-and-play", out, bed=bed, data=data, quick=quick, report=report)
    shifts, names, budget, tuning = (("faded",), STUDENTS[:1], 18_000, 40) if quick else (tuple(SHIFTS), STUDENTS, BUDGET, TUNING)
    ref = at.reference()
    settings = [{"student": name, "shift": shift, "budget": budget, "tuning": tuning} for shift in shifts for name in names]
    rows = at.make(cells.seeded(settings, seeds), lambda cell: of_cell(at, cell, ref, seeds), *methods.SOURCES, *customs.SOURCES)
    found = {"rows": gathered(rows)}
    draw(at.path("png"), found)
    at.finish(rows, text(found), found)


def student_of(cell: cells.Cell) -> Student:
    """The base's student; the custom's own has the same settings."""
    spec = METHODS[cell["student"]].at(cell["budget"], cell["seed"])
    assert isinstance(spec, Student) and len(spec.stages) == 1, f"{cell['student']} is no student of one stage"
    return spec


def of_cell(at: Opened, cell: cells.Cell, ref: Reference, seeds: int) -> dict[str, Any]:
    place, every = at.bed, range(seeds)
    spec, custom = students.on(place, student_of(cell)), Custom(cell["shift"], cell["tuning"], cell["seed"], scans=place.scans)
    weights = customs.tuned(custom, at.store, every)
    own, table = customs.of_weights(place, weights), spec.table()
    fine = solved(at, custom, own, ref)
    learnt = students.weights(spec, at.store, every)
    other = replace(spec, seed=(spec.seed + 1) % max(seeds, 2))
    delta_of_other = delta.make_delta(customs.first(other), students.weights(other, at.store, every))
    merged, told = delta.merge(weights, delta.make_delta(customs.first(spec), learnt))
    student = customs.of_weights(place, learnt)

    def added(z: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        return own(z, timestep, labels) + (student(z, timestep, labels) - place.teacher(z, timestep, labels))

    four: dict[str, Model] = {
        "merged": customs.of_weights(place, merged),
        "added": added,
        "other_base": customs.of_weights(place, delta.merge(weights, delta_of_other)[0]),
        "base_student": student,
        "distilled": customs.of_weights(place, customs.distilled(custom, spec, at.store, every)),
    }
    found = {key: judged(at, custom, place.sample(model, place.student_solver(table), ref.noise, ref.labels), fine) for key, model in four.items()}
    for steps in (32, STEPS):
        made = place.sample(own, place.solver(Windows.uniform(1), steps), ref.noise, ref.labels)
        found[f"custom_{steps}"] = judged(at, custom, made, fine)
    away = {"base": judged(at, custom, ref.fine, fine), "fine": judged(at, custom, fine, fine)}
    return {**found, **away, "delta_size": told.size, "training": spec.evaluations()}


def solved(at: Opened, custom: Custom, own: Model, ref: Reference) -> Tensor:
    """The custom model's own fine solve [N, D] from the reference's noises, kept in the store."""
    steps = 40 if at.quick else 150
    solver = at.bed.solver(Windows.uniform(1), steps, method="heun")
    name = custom.name("fine", steps, len(ref.noise))
    return at.store.tensors(name, lambda: {"fine": at.bed.sample(own, solver, ref.noise, ref.labels).cpu()})["fine"].to(ref.noise)


def judged(at: Opened, custom: Custom, found: Tensor, fine: Tensor) -> dict[str, float]:
    """Paired error to the custom's fine solve, and the Fréchet distance of pixels to the digits that it was tuned on."""
    alpha, sigma = at.bed.clean()
    mean, covariance = custom.data().to(torch.float64).moments()
    covariance = alpha**2 * covariance + sigma**2 * torch.eye(len(mean), dtype=torch.float64)
    distance = distance_of_moments(*moments(found.double()), alpha * mean, covariance)
    return {"paired": float(paired_error(found, fine).mean()), "frechet": distance}


def gathered(rows: list[cells.Row]) -> list[dict[str, Any]]:
    """Each way's errors over seeds; the merged model's less those of the custom's own four steps, of its own student and of answers added."""
    found = []
    for shift, name in dict.fromkeys((row["cell"]["shift"], row["cell"]["student"]) for row in rows):
        mine = cells.select(rows, shift=shift, student=name)
        line: dict[str, Any] = {"shift": shift, "student": name, "training": mine[0]["result"]["training"]}
        for key in (*WAYS, "base", "fine"):
            line[key] = {kind: cells.over_seeds(mine, lambda r, k=key, m=kind: r[k][m]).as_dict() for kind in ("paired", "frechet")}
        for other in ("custom_4", "distilled", "added"):
            line[f"less_{other}"] = cells.over_seeds(mine, lambda r, o=other: r["merged"]["paired"] - r[o]["paired"]).as_dict()
        line["delta_size"] = cells.over_seeds(mine, lambda r: r["delta_size"]).as_dict()
        found.append(line)
    return found


def text(found: dict[str, Any]) -> str:
    def told(interval: dict[str, Any], digits: int = 3, sign: bool = False) -> str:
        return cells.told(cells.Interval(**interval), digits, sign)

    parts = []
    for kind, title in (("paired", "Paired error to the custom model's fine solve"), ("frechet", "Fréchet distance to the custom model's digits")):
        lines = []
        for line in found["rows"]:
            cellsof = [line["shift"], line["student"], told(line["base"][kind]), *(told(line[key][kind]) for key in WAYS)]
            if kind == "paired":
                cellsof += [told(line[f"less_{other}"], sign=True) for other in ("custom_4", "distilled", "added")]
            else:
                cellsof.append(told(line["fine"][kind]))
            lines.append(cellsof)
        heads = ["digits", "student", "the base's fine solve", *WAYS.values()]
        heads += (
            ["delta less 4 DDIM steps", "delta less own student", "delta less answers added"] if kind == "paired" else ["the custom's fine solve"]
        )
        parts.append(f"## {title}\n\n" + cells.table(heads, lines))
    sizes = ", ".join(f"{line['student']} on {line['shift']} {told(line['delta_size'], 2)}" for line in found["rows"])
    cost = f"{max(line['training'] for line in found['rows']):,}"
    return "\n".join(parts) + (
        f"\nStudents of base and custom cost up to {cost} network evaluations each. ± is half a 95 % interval over seeds, of fine-tuning and student "
        f"together. Size of the delta over that of the custom's weights: {sizes}.\n"
    )


def draw(path: Path, found: dict[str, Any]) -> None:
    shifts = list(dict.fromkeys(line["shift"] for line in found["rows"]))
    figure, axes = canvas(1, len(shifts), width=3.2 + 3.6 * len(shifts), height=3.8)
    names = list(dict.fromkeys(line["student"] for line in found["rows"]))
    for axis, shift in zip(axes, shifts, strict=True):
        for name, colour, step in zip(names, (COLOURS[0], COLOURS[4]), (-0.12, 0.12), strict=False):
            line = next(x for x in found["rows"] if (x["shift"], x["student"]) == (shift, name))
            values = [cells.Interval(**line[key]["paired"]) for key in WAYS]
            places = [n + (step if len(names) > 1 else 0.0) for n in range(len(WAYS))]
            axis.errorbar(
                [v.mean for v in values], places, xerr=[v.half_width or 0.0 for v in values], fmt="o", color=colour, markersize=4, label=name
            )
            base = line["base"]["paired"]["mean"]
        axis.axvline(base, color="0.35", linestyle="--", linewidth=1, label="distance of base and custom")
        axis.set_yticks(range(len(WAYS)), list(WAYS.values()) if axis is axes[0] else [""] * len(WAYS))
        axis.invert_yaxis()
        axis.set(xlabel="paired error to the custom's fine solve", title=f"Tuned on digits: {shift}")
    axes[-1].legend(frameon=False, loc="best")
    save(figure, path)
