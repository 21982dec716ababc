"""ProReflow's ablation: one stage or progressive windows, plain or aligned velocity error, at equal cost.

    reflow experiment ablation --bed exact

Table 4 of arXiv 2503.04824 takes progression and alignment out of the 4-step student, one at a time and both. Here the four trainings are
compared at equal optimizer steps, where both progressive stages together have as many as the single one, and at equal network evaluations
(solves of the pairs, and three for each sample of a step), from under-trained to long; then the weight of the direction from .1 to 10, with
and without the window's own speed in it; all crossed with the density of times, which otherwise is what is compared. The same seed gives
all arms the same first weights, and single and progressive the same pairs of four windows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reflow.experiments import cells
from reflow.experiments.beds.students import Stage, Student
from reflow.experiments.figures import COLOURS, canvas, line_over, save
from reflow.experiments.opened import BEDS, opened

DENSITIES = {
    "near start": {},
    "uniform": {"time_density": "uniform"},
}
WEIGHTS = (0.1, 0.3, 1.0, 3.0, 10.0)
NORMS = ("window_speed", "none")
BUDGETS, MIDDLE = (150, 500, 1500, 5000), 500
ON_DIGITS = 200
ERROR: Callable[[dict[str, Any]], float] = lambda result: result["at"]["4"]["paired"]  # noqa: E731


def run(out: Path, *, bed: str = "exact", data: str = "", seeds: int = 5, quick: bool = False, report: bool = False, device: str = "cpu") -> None:
    """Train, measure, tabulate and draw. quick: the seconds-long form of the tests. report: make nothing, tell what is there.
    device: where the bed computes. data: of --bed mnist. On --bed digits a student is a run of the trainer."""
    at = opened("ablation", out, bed=bed, data=data, quick=quick, report=report, device=device, beds=BEDS)
    budgets, middle, weights = ((12,), 12, (0.1,)) if quick else (BUDGETS, MIDDLE, WEIGHTS)
    if at.digits:  # minutes a student: one budget and weight
        budgets, middle, weights = (middle if quick else ON_DIGITS,), middle if quick else ON_DIGITS, ()
    arms = [{"arm": arm, "loss": loss} for loss in ("mse", "aligned_v") for arm in ("single", "progressive", "single, equal evaluations")]
    usual = {"weight": 1.0, "norm": "window_speed", **({"pairs": 8192} if at.digits else {})}
    asked = [{**arm, "density": density, "steps": middle, **usual} for density in DENSITIES for arm in arms]
    asked += [{"arm": "single", "loss": "aligned_v", "density": density, "steps": middle, "weight": w, "norm": norm}
              for density in DENSITIES for norm in NORMS for w in weights
              if (w, norm) != (1.0, "window_speed") and (density == "near start" or (w > 1.0 and norm == "window_speed"))]  # fmt: skip
    asked += [{**arm, "density": "near start", "steps": steps, **usual} for steps in budgets if steps != middle for arm in arms]

    def work(cell: cells.Cell) -> dict[str, Any]:
        spec = student_of(cell)
        found = at.of_student(spec, (1, 2), seeds=range(seeds))
        return {"at": found, "evaluations": spec.evaluations(), "steps": sum(stage.steps for stage in spec.stages)}

    rows = at.make(cells.seeded(asked, seeds), work)
    found = {"teacher_4": at.of_teacher(4), "differences": differences(rows), "weights": by_weight(rows)}
    draw(at.path("png"), rows, found, budgets, middle)
    at.finish(rows, text(rows, found), found)


def student_of(cell: cells.Cell) -> Student:
    """The student of a cell; at equal evaluations the single stage takes the steps that the progressive one's solves leave it."""
    objective = {**DENSITIES[cell["density"]], "loss": cell["loss"]}
    if cell["loss"] == "aligned_v":
        objective.update(direction_weight=cell["weight"], direction_norm=cell["norm"])
    keys, steps = tuple(sorted(objective.items())), cell["steps"]
    pairs = cell.get("pairs", Student.pairs)
    progressive = Student((Stage(8, steps // 2, keys), Stage(4, steps - steps // 2, keys)), seed=cell["seed"], pairs=pairs)
    if cell["arm"] == "progressive":
        return progressive
    if cell["arm"] == "single, equal evaluations":
        return equal_cost(progressive, keys)
    return Student((Stage(4, steps, keys),), seed=cell["seed"], pairs=pairs)


def equal_cost(progressive: Student, objective: tuple[tuple[str, Any], ...]) -> Student:
    """The single-stage student of the last windows that costs at most as many network evaluations, and one step more costs more."""
    low, high = 1, 8 * sum(stage.steps for stage in progressive.stages)

    def of(steps: int) -> Student:
        return Student((Stage(progressive.stages[-1].windows, steps, objective),), seed=progressive.seed, pairs=progressive.pairs)

    while high - low > 1:
        half = (low + high) // 2
        low, high = (half, high) if of(half).evaluations() <= progressive.evaluations() else (low, half)
    return of(low)


def differences(rows: list[cells.Row]) -> list[dict[str, Any]]:
    """What progression and alignment change in the paired error, over seeds, at each density and budget."""
    found = []
    for density, steps in dict.fromkeys((r["cell"]["density"], r["cell"]["steps"]) for r in rows):
        arms = {(arm, loss): cells.select(rows, arm=arm, loss=loss, density=density, steps=steps, weight=1.0, norm="window_speed")
                for arm in ("single", "progressive", "single, equal evaluations") for loss in ("mse", "aligned_v")}  # fmt: skip
        pairs = {
            "aligned - plain, single": (("single", "aligned_v"), ("single", "mse")),
            "aligned - plain, progressive": (("progressive", "aligned_v"), ("progressive", "mse")),
            "progressive - single, plain, equal steps": (("progressive", "mse"), ("single", "mse")),
            "progressive - single, aligned, equal steps": (("progressive", "aligned_v"), ("single", "aligned_v")),
            "progressive - single, plain, equal evaluations": (("progressive", "mse"), ("single, equal evaluations", "mse")),
            "progressive - single, aligned, equal evaluations": (("progressive", "aligned_v"), ("single, equal evaluations", "aligned_v")),
            "both - neither, equal steps": (("progressive", "aligned_v"), ("single", "mse")),
        }
        for name, (mine, other) in pairs.items():
            if not arms[mine] or not arms[other]:
                continue
            against = cells.over_seeds(arms[other], ERROR)
            found.append({"density": density, "steps": steps, "what": name, "against": against.as_dict(),
                          "difference": cells.paired(arms[mine], arms[other], ERROR).as_dict()})  # fmt: skip
    return found


def by_weight(rows: list[cells.Row]) -> list[dict[str, Any]]:
    """The aligned error less the plain one, single stage, for each weight of the direction."""
    found = []
    kinds = [(r["cell"]["density"], r["cell"]["norm"], r["cell"]["weight"]) for r in rows if r["cell"]["loss"] == "aligned_v"]
    middle = next((r["cell"]["steps"] for r in rows if r["cell"]["weight"] != 1.0), rows[0]["cell"]["steps"])
    for density, norm, weight in sorted(set(kinds)):
        mine = cells.select(rows, arm="single", loss="aligned_v", density=density, norm=norm, weight=weight, steps=middle)
        plain = cells.select(rows, arm="single", loss="mse", density=density, steps=middle)
        if not plain or not mine:
            continue
        found.append({"density": density, "norm": norm, "weight": weight, "steps": middle, "paired": cells.over_seeds(mine, ERROR).as_dict(),
                      "less_plain": cells.paired(mine, plain, ERROR).as_dict()})  # fmt: skip
    return found


def text(rows: list[cells.Row], found: dict[str, Any]) -> str:
    kinds = sorted({(d["density"], d["steps"]) for d in found["differences"]})
    heads = ["difference in paired error, 4 windows at 4 steps", *(f"{steps} steps, {density}" for density, steps in kinds)]
    lines = []
    for name in dict.fromkeys(d["what"] for d in found["differences"]):
        each = [next((d for d in found["differences"] if (d["what"], d["density"], d["steps"]) == (name, *kind)), None) for kind in kinds]
        lines.append([name, *("" if d is None else cells.told(cells.Interval(**d["difference"]), sign=True) for d in each)])
    plain = [cells.over_seeds(cells.select(rows, arm="single", loss="mse", density=d, steps=s), ERROR) for d, s in kinds]
    first = cells.table(heads, [["single, plain: the error itself", *map(cells.told, plain)], *lines])
    groups = list(dict.fromkeys((w["density"], w["norm"]) for w in found["weights"]))
    weights = sorted({w["weight"] for w in found["weights"]})
    lines = []
    for weight in weights:
        each = [next((w for w in found["weights"] if (w["weight"], w["density"], w["norm"]) == (weight, *g)), None) for g in groups]
        lines.append([f"{weight:g}", *("" if w is None else cells.told(cells.Interval(**w["less_plain"]), sign=True) for w in each)])
    second = cells.table(["direction weight: aligned less plain, single stage", *(f"{d}, norm {n}" for d, n in groups)], lines)
    own = found["teacher_4"]["paired"]
    return f"{first}\n{second}\nThe teacher's own 4 steps: {own:.4f}. ± is half a 95 % interval of paired differences over training seeds.\n"


def draw(path: Path, rows: list[cells.Row], found: dict[str, Any], budgets: tuple[int, ...], middle: int) -> None:
    figure, axes = canvas(1, 3, width=13.5, height=4.2)
    arms = [("single", "mse"), ("single", "aligned_v"), ("progressive", "mse"), ("progressive", "aligned_v")]
    names = ["single, plain", "single, aligned", "8 -> 4, plain", "8 -> 4, aligned"]
    for (arm, loss), name, colour in zip(arms, names, COLOURS, strict=False):
        there = {s: cells.select(rows, arm=arm, loss=loss, density="near start", steps=s, weight=1.0, norm="window_speed") for s in budgets}
        there = {s: mine for s, mine in there.items() if mine}
        line_over(axes[0], list(there), [cells.over_seeds(mine, ERROR) for mine in there.values()], name, colour)
    axes[0].axhline(found["teacher_4"]["paired"], color="0.35", linestyle="--", linewidth=1)
    axes[0].set(
        xlabel="optimizer steps of 128 samples, all stages", ylabel="paired error, 4 windows at 4 steps", title="Four trainings at equal steps"
    )
    axes[0].legend(frameon=False)
    wanted = ("progressive - single, plain, equal steps", "progressive - single, plain, equal evaluations", "aligned - plain, single")
    labels = ("8 -> 4 less single, equal steps", "8 -> 4 less single, equal evaluations", "aligned less plain, single")
    for name, label, colour in zip(wanted, labels, COLOURS[2:], strict=False):
        own = {d["steps"]: cells.Interval(**d["difference"]) for d in found["differences"] if (d["what"], d["density"]) == (name, "near start")}
        line_over(axes[1], sorted(own), [own[s] for s in sorted(own)], label, colour)
    axes[1].axhline(0.0, color="0.35", linewidth=1)
    axes[1].set(xlabel="optimizer steps of 128 samples", ylabel="difference in paired error", title="Above 0: it costs quality")
    axes[1].legend(frameon=False)
    for axis in axes[:2]:
        axis.set_xscale("log")
        axis.set_xticks(budgets, [str(b) for b in budgets], minor=False)
        axis.minorticks_off()
    for (density, norm), colour in zip(dict.fromkeys((w["density"], w["norm"]) for w in found["weights"]), COLOURS, strict=False):
        mine = [w for w in found["weights"] if (w["density"], w["norm"]) == (density, norm)]
        said = "times speed²" if norm == "window_speed" else "as it is"
        line_over(axes[2], [w["weight"] for w in mine], [cells.Interval(**w["less_plain"]) for w in mine], f"{density}, {said}", colour)
    axes[2].axhline(0.0, color="0.35", linewidth=1)
    axes[2].set(xscale="log", xlabel="direction weight", ylabel="aligned less plain", title=f"Weight of the direction, {middle} steps")
    axes[2].legend(frameon=False, loc="upper left")
    save(figure, path)
