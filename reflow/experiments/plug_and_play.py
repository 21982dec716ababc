"""Few steps for a custom model by adding weights: what the delta of the base's student gives a base that was fine-tuned elsewhere.

    reflow experiment plug-and-play --bed exact

PeRFlow (arXiv 2405.07510) adds dW = W_student - W_base to models that others fine-tuned from the same base, W_custom + dW, and shows pictures.
Here a first base is the teacher, whose network beside the exact output says nothing yet; custom models train that network by denoising on
digits of other contrast, of another place, or of one of two kinds a class. The custom model of other contrast is then a second base, whose
network carries weight, and from it custom models are tuned more gently, as fine-tuning is. Judged is the distance to the custom model's own
fine solve: of the custom itself at 32 and 4 DDIM steps, of the custom plus the delta, of both networks' answers added instead of their
weights, of a delta between other first weights, of the base's student alone, and of the custom model's own student at the same cost. Delta
and sum are the product's (`reflow.weights.delta`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reflow.evaluation.measures.frechet import distance_of_moments, moments
from reflow.evaluation.metrics import paired_error
from reflow.experiments import cells
from reflow.experiments.beds import custom as customs
from reflow.experiments.beds import methods, students
from reflow.experiments.beds.custom import Custom
from reflow.experiments.beds.exact import Model
from reflow.experiments.beds.fitting import Weights
from reflow.experiments.beds.measure import Reference
from reflow.experiments.beds.methods import METHODS
from reflow.experiments.beds.students import Student
from reflow.experiments.figures import COLOURS, canvas, save
from reflow.experiments.opened import Opened, opened
from reflow.flow import Windows
from reflow.weights import delta

METHOD, STEPS, BUDGET = "4 windows, near start", 4, 400_000
# Of the first base: three shifts. Of the second: two, and students at the usual rate and at that of the tuning.
TUNING, GENTLE = {"steps": 2000, "learning_rate": 2e-3}, {"steps": 1000, "learning_rate": 5e-4}
SETTINGS = [{"base": "first", "shift": shift, "rate": 2e-3} for shift in ("faded", "moved", "one kind")]
SETTINGS += [{"base": "second", "shift": shift, "rate": rate} for shift in ("moved", "one kind") for rate in (2e-3, 5e-4)]
WAYS = {
    "custom_32": "custom, 32 DDIM steps",
    "custom_4": "custom, 4 DDIM steps",
    "merged": "custom + delta, 4 steps",
    "added": "answers added, 4 steps",
    "other_base": "custom + delta between other first weights, 4 steps",
    "base_student": "the base's student, 4 steps",
    "distilled": "the custom's own student, 4 steps",
}


def run(out: Path, *, bed: str = "exact", data: str = "", seeds: int = 3, quick: bool = False, report: bool = False, device: str = "cpu") -> None:
    """Train, measure, tabulate and draw. quick: the seconds-long form of the tests. report: make nothing, tell what is there.
    device: where the bed computes. data: of --bed mnist."""
    at = opened("plug-and-play", out, bed=bed, data=data, quick=quick, report=report, device=device)
    ref = at.reference(samples=1000)
    asked = [{**setting, "budget": 18_000 if quick else BUDGET} for setting in (SETTINGS[:1] + SETTINGS[-1:] if quick else SETTINGS)]
    rows = at.make(cells.seeded(asked, seeds), lambda cell: of_cell(at, cell, ref, seeds), *methods.SOURCES, *customs.SOURCES)
    found = {"rows": gathered(rows)}
    draw(at.path("png"), found)
    at.finish(rows, text(found), found)


def student_of(cell: cells.Cell) -> Student:
    """The base's student; the custom's own has the same settings."""
    spec = METHODS[METHOD].at(cell["budget"], cell["seed"])
    assert isinstance(spec, Student)
    return replace(spec, learning_rate=cell["rate"])


def custom_of(at: Opened, cell: cells.Cell) -> Custom:
    """The custom model of a cell, with its base; tuned for a few steps in the quick form."""
    usual, gentle = ({**kind, "steps": kind["steps"] // (50 if at.quick else 1)} for kind in (TUNING, GENTLE))
    own = {"seed": cell["seed"], "scans": at.bed.scans, "device": at.bed.device}
    if cell["base"] == "first":
        return Custom(cell["shift"], **own, **usual)
    return Custom(cell["shift"], base=Custom("faded", **own, **usual), **own, **gentle)


def of_cell(at: Opened, cell: cells.Cell, ref: Reference, seeds: int) -> dict[str, Any]:
    place, every = at.bed, range(seeds)
    spec, custom = students.on(place, student_of(cell)), custom_of(at, cell)
    weights = customs.tuned(custom, at.store, every)
    begin, learnt = of_base(at, custom.base, spec, every)
    own, base, student = (customs.of_weights(place, one) for one in (weights, begin, learnt))
    fine = solved(at, custom, own, ref)
    merged, told = delta.merge(weights, delta.make_delta(begin, learnt))
    other = (spec.seed + 1) % max(seeds, 2)
    of_other = of_base(at, custom.base and custom.base.at(other), replace(spec, seed=other), every)

    def added(z: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        return own(z, timestep, labels) + (student(z, timestep, labels) - base(z, timestep, labels))

    four: dict[str, Model] = {
        "merged": customs.of_weights(place, merged),
        "added": added,
        "other_base": customs.of_weights(place, delta.merge(weights, delta.make_delta(*of_other))[0]),
        "base_student": student,
        "distilled": customs.of_weights(place, customs.distilled(custom, spec, at.store, every)),
    }
    steps_of = place.student_solver(spec.table())
    found = {key: judged(at, custom, place.sample(model, steps_of, ref.noise, ref.labels), fine) for key, model in four.items()}
    for steps in (32, STEPS):
        made = place.sample(own, place.solver(Windows.uniform(1), steps), ref.noise, ref.labels)
        found[f"custom_{steps}"] = judged(at, custom, made, fine)
    of_the_base = solved(at, custom.base, base, ref) if custom.base else ref.fine
    found.update(base=judged(at, custom, of_the_base, fine), fine=judged(at, custom, fine, fine))
    sizes = {"delta_size": told.size, "tuning_size": delta.merge(begin, delta.make_delta(begin, weights))[1].size}
    return {**found, **sizes, "training": spec.evaluations()}


def of_base(at: Opened, base: Custom | None, spec: Student, seeds: Sequence[int]) -> tuple[Weights, Weights]:
    """The base's weights and its student's."""
    if base is None:
        return customs.first(spec), students.weights(spec, at.store, seeds)
    return customs.tuned(base, at.store, seeds), customs.distilled(base, spec, at.store, seeds)


def solved(at: Opened, custom: Custom, own: Model, ref: Reference) -> Tensor:
    """The custom model's own fine solve [N, D] from the reference's noises, kept in the store."""
    steps = 40 if at.quick else 100
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
    for base, shift, rate in dict.fromkeys((row["cell"]["base"], row["cell"]["shift"], row["cell"]["rate"]) for row in rows):
        mine = cells.select(rows, base=base, shift=shift, rate=rate)
        line: dict[str, Any] = {"base_is": base, "shift": shift, "rate": rate, "training": mine[0]["result"]["training"]}
        for key in (*WAYS, "base", "fine"):
            line[key] = {kind: cells.over_seeds(mine, lambda r, k=key, m=kind: r[k][m]).as_dict() for kind in ("paired", "frechet")}
        for other in ("custom_4", "distilled", "added"):
            line[f"less_{other}"] = cells.over_seeds(mine, lambda r, o=other: r["merged"]["paired"] - r[o]["paired"]).as_dict()
        for key in ("delta_size", "tuning_size"):
            line[key] = cells.over_seeds(mine, lambda r, k=key: r[k]).as_dict()
        found.append(line)
    return found


def text(found: dict[str, Any]) -> str:
    def told(interval: dict[str, Any], digits: int = 3, sign: bool = False) -> str:
        return cells.told(cells.Interval(**interval), digits, sign)

    parts = []
    for kind, title in (("paired", "Paired error to the custom model's fine solve"), ("frechet", "Fréchet distance to the custom model's digits")):
        lines = []
        for line in found["rows"]:
            values = [line["base_is"], line["shift"], f"{line['rate']:g}", told(line["base"][kind]), *(told(line[key][kind]) for key in WAYS)]
            if kind == "paired":
                values += [told(line[f"less_{other}"], sign=True) for other in ("custom_4", "distilled", "added")]
            else:
                values.append(told(line["fine"][kind]))
            lines.append(values)
        heads = ["base", "digits", "student's learning rate", "the base's fine solve", *WAYS.values()]
        heads += (
            ["delta less 4 DDIM steps", "delta less own student", "delta less answers added"] if kind == "paired" else ["the custom's fine solve"]
        )
        parts.append(f"## {title}\n\n" + cells.table(heads, lines))
    sizes = [
        [line["base_is"], line["shift"], f"{line['rate']:g}", *(told(line[key], 2) for key in ("tuning_size", "delta_size"))]
        for line in found["rows"]
    ]
    heads = ["base", "digits", "student's learning rate", "change by tuning, over the base's weights", "delta, over the custom's weights"]
    parts.append("## Sizes in weights\n\n" + cells.table(heads, sizes))
    cost = f"{max(line['training'] for line in found['rows']):,}"
    return "\n".join(parts) + (
        f"\nStudents of base and custom cost up to {cost} network evaluations each. ± is half a 95 % interval over seeds, of fine-tuning and student "
        "together. The second base is the first's custom model of faded digits.\n"
    )


def draw(path: Path, found: dict[str, Any]) -> None:
    groups = list(dict.fromkeys((line["base_is"], line["shift"]) for line in found["rows"]))
    figure, axes = canvas(1, len(groups), width=3.2 + 2.6 * len(groups), height=3.8)
    rates = list(dict.fromkeys(line["rate"] for line in found["rows"]))
    for axis, group in zip(axes, groups, strict=True):
        mine = [x for x in found["rows"] if (x["base_is"], x["shift"]) == group]
        for line in mine:
            values = [cells.Interval(**line[key]["paired"]) for key in WAYS]
            colour, step = (COLOURS[0], -0.1) if line["rate"] == rates[0] else (COLOURS[4], 0.1)
            places, widths = [n + step for n in range(len(WAYS))], [v.half_width or 0.0 for v in values]
            axis.errorbar([v.mean for v in values], places, xerr=widths, fmt="o", color=colour, markersize=4, label=f"rate {line['rate']:g}")
        axis.axvline(mine[0]["base"]["paired"]["mean"], color="0.35", linestyle="--", linewidth=1, label="distance of base and custom")
        axis.set_yticks(range(len(WAYS)), list(WAYS.values()) if axis is axes[0] else [""] * len(WAYS))
        axis.invert_yaxis()
        axis.set_xlim(left=0.0)
        axis.set(xlabel="paired error to the custom's own", title=f"{group[0]} base: {group[1]}")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)
