"""What few-step students keep of the data's variety, class by class, with the exact answer beside them.

    reflow experiment diversity --bed exact

PeRFlow (arXiv 2405.07510) claims to keep the diversity of its base, against other few-step models, and more so with guidance at inference
("sync") than learnt ("fixed"). On the exact bed each class's covariance, components and weights are known. Every method is trained for
400,000 network evaluations (`beds/methods.py`) and sampled at scales 1, 3 and 7 at as few steps as it has windows, and at four steps where
it has fewer; beside it the fine solve guided alike, which is what a perfect student of that scale would give, and the teacher's DDIM of as many
steps. Trace of the covariance over the exact one's is 1 for the data; recall and precision are of five nearest neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from reflow.experiments import cells
from reflow.experiments.beds import measure, methods, spread
from reflow.experiments.beds.consistency import Consistency
from reflow.experiments.beds.methods import METHODS, Method
from reflow.experiments.beds.students import Student
from reflow.experiments.figures import COLOURS, canvas, line_over, save
from reflow.experiments.opened import opened
from reflow.flow import Windows

SCALES = (1, 3, 7)
BUDGET = 400_000
SYNC = ("PeRFlow", "PeRFlow, near start", "ProReflow-I", "ProReflow-II", "2-rectified flow", "PCM, 4 phases", "consistency (1 phase)")
FIXED = ("PeRFlow", "PeRFlow, near start", "ProReflow-I", "ProReflow-II", "2-rectified flow")
MEASURES = {"trace": 3, "logdet": 2, "vendi": 1, "components": 3, "rarest": 2, "recall": 2, "precision": 2}
FINE = "the fine solve"


def run(out: Path, *, bed: str = "exact", data: str = "", seeds: int = 3, quick: bool = False, report: bool = False, device: str = "cpu") -> None:
    """Train, measure, tabulate and draw. quick: the seconds-long form of the tests. report: make nothing, tell what is there.
    device: where the bed computes. data: of --bed mnist."""
    at = opened("diversity", out, bed=bed, data=data, quick=quick, report=report, device=device)
    scales, budget, sync, fixed = ((1, 3), 18_000, ("PeRFlow", "PCM, 4 phases"), ("PeRFlow",)) if quick else (SCALES, BUDGET, SYNC, FIXED)
    references = {w: at.reference(samples=4000, guidance=guided(w), steps=100) for w in scales}
    asked: list[cells.Cell] = [{"teacher": "DDIM", "steps": n, "scale": w} for w in scales for n in (1, 2, 4, 32)]
    asked += [{"teacher": FINE, "steps": 0, "scale": w} for w in scales]
    settings = [{"method": name, "mode": "sync", "scale": w, "budget": budget} for name in sync for w in scales]
    settings += [{"method": name, "mode": "fixed", "scale": w, "budget": budget} for name in fixed for w in scales if w > 1]
    asked += cells.seeded(settings, seeds)

    def work(cell: cells.Cell) -> dict[str, Any]:
        ref = references[cell["scale"]]
        if "teacher" in cell:
            made = ref.fine
            if cell["steps"]:
                solver = at.bed.solver(Windows.uniform(1), cell["steps"], guidance=ref.guidance)
                made = at.bed.sample(at.bed.teacher, solver, ref.noise, ref.labels)
            return {**spread.of_samples(at.bed, made, ref.labels), "paired": measure.of_samples(at.bed, made, ref)["paired"]}
        spec = student_of(cell)
        model, table = methods.trained(spec, at.bed, at.store, range(seeds))
        found = {}
        for steps in sorted({len(table), max(4, len(table))}) if len(table) != 2 else (2,):
            guidance = ref.guidance if cell["mode"] == "sync" else None
            made = methods.sample(at.bed, spec, model, steps // len(table), ref.noise, ref.labels, guidance=guidance)
            found[str(steps)] = {**spread.of_samples(at.bed, made, ref.labels), "paired": measure.of_samples(at.bed, made, ref)["paired"]}
        return found

    rows = at.make(asked, work, *methods.SOURCES, "experiments/beds/spread.py")
    found = gathered(rows)
    draw(at.path("png"), found, scales)
    at.finish(rows, text(found, scales), found)


def guided(scale: float) -> float | None:
    return None if scale == 1 else float(scale)


def student_of(cell: cells.Cell) -> Student | Consistency:
    method = METHODS[cell["method"]]
    if cell["mode"] == "fixed":
        assert isinstance(method, Method), f"{cell['method']} learns no guidance"
        method = replace(method, settings={**method.settings, "guidance": float(cell["scale"])})
    return method.at(cell["budget"], cell["seed"])


def gathered(rows: list[cells.Row]) -> dict[str, list[dict[str, Any]]]:
    """Of the "teacher" what needs no training; of "students" each measure over seeds by method, mode, scale and steps, and what trace and recall
    are beyond the fine solve's and, seed by seed, beyond PeRFlow's of the same mode and scale, and learnt beyond guided at inference."""
    teacher = [{**row["cell"], **row["result"]} for row in rows if "teacher" in row["cell"]]
    fine = {line["scale"]: line for line in teacher if line["teacher"] == FINE}
    students = []
    for method, mode, scale in dict.fromkeys(kinds(rows)):
        mine = cells.select(rows, method=method, mode=mode, scale=scale)
        perflow, sync = (cells.select(rows, method=name, mode=kind, scale=scale) for name, kind in (("PeRFlow", mode), (method, "sync")))
        for steps in mine[0]["result"]:
            own, first, guided = (at_steps(group, n) for group, n in ((mine, steps), (perflow, "4"), (sync, steps)))
            line: dict[str, Any] = {"method": method, "mode": mode, "scale": scale, "steps": int(steps)}
            for key in (*MEASURES, "paired"):
                line[key] = cells.over_seeds(mine, lambda r, s=steps, k=key: r[s][k]).as_dict()
            for key in ("trace", "recall"):
                line[f"{key}_less_fine"] = cells.over_seeds(mine, lambda r, s=steps, k=key, w=scale: r[s][k] - fine[w][k]).as_dict()
                line[f"{key}_less_perflow"] = cells.paired(own, first, lambda r, k=key: r[k]).as_dict()
                if mode == "fixed":
                    line[f"{key}_less_sync"] = cells.paired(own, guided, lambda r, k=key: r[k]).as_dict()
            students.append(line)
    return {"teacher": teacher, "students": students}


def at_steps(rows: list[cells.Row], steps: str) -> list[cells.Row]:
    return [{"cell": row["cell"], "result": row["result"][steps]} for row in rows]


def kinds(rows: list[cells.Row]) -> Iterable[tuple[str, str, int]]:
    return ((row["cell"]["method"], row["cell"]["mode"], row["cell"]["scale"]) for row in rows if "method" in row["cell"])


def text(found: dict[str, Any], scales: tuple[int, ...]) -> str:
    def told(line: dict[str, Any], key: str, digits: int, sign: bool = False) -> str:
        return cells.told(cells.Interval(**line[key]), digits, sign)

    heads = ["samples", "steps", "trace", "log det a dimension", "Vendi score", "components off by", "rarest component", "recall", "precision"]
    heads += ["paired error", "trace less the fine solve's", "trace less PeRFlow's", "recall less PeRFlow's", "trace less at inference"]
    heads.append("recall less at inference")
    parts = []
    for w in scales:
        lines = []
        for one in (line for line in found["teacher"] if line["scale"] == w):
            name = FINE if one["teacher"] == FINE else "teacher, DDIM"
            values = [f"{one[key]:.{digits}f}" for key, digits in MEASURES.items()]
            lines.append([name, one["steps"] or "", *values, f"{one['paired']:.3f}", *[""] * 5])
        for one in (line for line in found["students"] if line["scale"] == w):
            name = one["method"] + ("" if w == 1 else ", at inference" if one["mode"] == "sync" else ", learnt")
            values = [told(one, key, digits) for key, digits in (*MEASURES.items(), ("paired", 3))]
            keys = (("trace_less_fine", 3), ("trace_less_perflow", 3), ("recall_less_perflow", 2), ("trace_less_sync", 3), ("recall_less_sync", 2))
            less = [told(one, key, digits, True) if key in one else "" for key, digits in keys]
            lines.append([name, one["steps"], *values, *less])
        parts.append(f"## Guidance {w}\n\n" + cells.table(heads, lines))
    return (
        "\n".join(parts)
        + "\nMeans over the ten classes; of the data, trace is 1, log det 0, components 0, rarest 1. ± is half a 95 % interval over training seeds, "
        "of differences where they are differences; nothing is trained for the teacher's rows.\n"
    )


def draw(path: Path, found: dict[str, Any], scales: tuple[int, ...]) -> None:
    figure, axes = canvas(1, 4, width=17.0, height=4.4)
    names = list(dict.fromkeys(line["method"] for line in found["students"]))
    places = range(len(scales))
    # Single seeds run far out of the data at scale 7: what is told there is that they do, so axes end where the flow's own values are in sight.
    shown = {"trace": ("trace over the exact one's", 1.5), "vendi": ("Vendi score", 40.0), "recall": ("recall", 1.0),
             "components": ("components' shares off by", 0.6)}  # fmt: skip
    for axis, (key, (said, top)) in zip(axes, shown.items(), strict=True):
        for name, colour in zip(names, COLOURS, strict=False):
            mine = [line for line in found["students"] if line["method"] == name]
            fewest = min(line["steps"] for line in mine)
            own = [line for line in mine if line["steps"] == fewest and line["mode"] == "sync"]
            line_over(axis, list(places), [cells.Interval(**line[key]) for line in own], f"{name}, {fewest} step{'s' * (fewest > 1)}", colour)
            learnt = [line for line in mine if line["steps"] == fewest and line["mode"] == "fixed"]
            axis.plot([scales.index(x["scale"]) + 0.06 for x in learnt], [x[key]["mean"] for x in learnt], "s", color=colour, markerfacecolor="none")
        own_steps = [next(x[key] for x in found["teacher"] if (x["teacher"], x["steps"], x["scale"]) == ("DDIM", 4, w)) for w in scales]
        axis.plot(places, own_steps, color="0.35", linestyle=":", linewidth=1.4, label="teacher's DDIM, 4 steps")
        fine = [next(x[key] for x in found["teacher"] if (x["teacher"], x["scale"]) == (FINE, w)) for w in scales]
        axis.plot(places, fine, color="0.35", linestyle="--", linewidth=1.2, label="the flow itself")
        axis.set_xticks(list(places), [str(w) for w in scales])
        axis.set(xlabel="guidance scale", ylabel=said, ylim=(0.0, top))
    axes[0].plot([], [], "s", color="0.35", markerfacecolor="none", label="squares: guidance learnt")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    for axis, title in zip(axes, ("Variance", "Different samples", "What of the data is met", "Kinds within a class"), strict=True):
        axis.set_title(title)
    save(figure, path)
