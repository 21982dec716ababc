"""Ways to few windows: 8 -> 4 -> 2 -> 1 against fewer stages and none, with the root or the stage before as teacher.

    reflow experiment progressive-paths --bed exact

ProReflow (arXiv 2503.04824) merges windows stage by stage; who solves the merged ones is not stated. A path is a list of windows; all paths
that end at as many windows have equal optimizer steps in all, shared evenly by their stages, and then again equal network evaluations (the
direct path takes the steps that this buys it). "chained": the stage before solves each later stage, two Euler steps a merged
window. One row a path, teacher, budget and seed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reflow.experiments import cells
from reflow.experiments.ablation import equal_cost
from reflow.experiments.beds.students import Stage, Student
from reflow.experiments.figures import COLOURS, canvas, line_over, save
from reflow.experiments.opened import BEDS, opened

PATHS = ((4,), (8, 4), (2,), (4, 2), (8, 4, 2), (1,), (2, 1), (4, 2, 1), (8, 4, 2, 1))
BUDGETS, ON_DIGITS = (200, 600), (200,)


def run(out: Path, *, bed: str = "exact", data: str = "", seeds: int = 3, quick: bool = False, report: bool = False, device: str = "cpu") -> None:
    """Train, measure, tabulate and draw. quick: the seconds-long form of the tests. report: make nothing, tell what is there.
    device: where the bed computes. data: of --bed mnist. On --bed digits a student is a run of the trainer."""
    at = opened("progressive-paths", out, bed=bed, data=data, quick=quick, report=report, device=device, beds=BEDS)
    paths, budgets = (((2,), (4, 2)), (40,)) if quick else (PATHS, ON_DIGITS if at.digits else BUDGETS)
    asked = []
    for steps in budgets:
        for path in paths:
            kinds = ["equal steps"] if len(path) == 1 else ["root", "chained", "direct for root", "direct for chained"]
            asked += [{"path": list(path), "kind": kind, "steps": steps} for kind in kinds]

    def work(cell: cells.Cell) -> dict[str, Any]:
        spec = student_of(cell)
        return {"at": at.of_student(spec, seeds=range(seeds)), "evaluations": spec.evaluations(), "steps": sum(stage.steps for stage in spec.stages)}

    rows = at.make(cells.seeded(asked, seeds), work)
    found = {"teacher": {k: at.of_teacher(k) for k in sorted({path[-1] for path in paths})}, "paths": gathered(rows)}
    draw(at.path("png"), found, budgets)
    at.finish(rows, text(found, budgets), found)


def student_of(cell: cells.Cell) -> Student:
    """The student of a cell: the path's stages share the steps evenly, the last takes what is left over."""
    path, steps, seed = cell["path"], cell["steps"], cell["seed"]
    each = steps // len(path)
    parts = [each] * (len(path) - 1) + [steps - each * (len(path) - 1)]
    chained = cell["kind"].endswith("chained")
    stages = tuple(Stage(k, n, teacher="previous" if chained and i else "root") for i, (k, n) in enumerate(zip(path, parts, strict=True)))
    whole = Student(stages, seed=seed)
    return equal_cost(whole, ()) if cell["kind"].startswith("direct") else whole


def error(windows: int, key: str = "paired") -> Callable[[dict[str, Any]], float]:
    return lambda result: result["at"][str(windows)][key]


def gathered(rows: list[cells.Row]) -> list[dict[str, Any]]:
    """Of each path the paired error, and its difference to the direct one of the same accounting."""
    found = []
    for path, kind, steps in dict.fromkeys((tuple(r["cell"]["path"]), r["cell"]["kind"], r["cell"]["steps"]) for r in rows):
        mine, last = cells.select(rows, path=list(path), kind=kind, steps=steps), path[-1]
        line = {"path": list(path), "kind": kind, "steps": steps, "paired": cells.over_seeds(mine, error(last)).as_dict(),
                "frechet": cells.over_seeds(mine, error(last, "frechet")).as_dict(), "evaluations": mine[0]["result"]["evaluations"],
                "own_steps": mine[0]["result"]["steps"]}  # fmt: skip
        if kind in ("root", "chained"):
            line["less_direct"] = cells.paired(mine, cells.select(rows, path=[last], kind="equal steps", steps=steps), error(last)).as_dict()
            cheap = cells.select(rows, path=list(path), kind=f"direct for {kind}", steps=steps)
            line["less_direct_of_equal_evaluations"] = cells.paired(mine, cheap, error(last)).as_dict()
        if kind == "chained":
            line["less_root"] = cells.paired(mine, cells.select(rows, path=list(path), kind="root", steps=steps), error(last)).as_dict()
        found.append(line)
    return found


def named(path: list[int]) -> str:
    return " -> ".join(map(str, path))


def text(found: dict[str, Any], budgets: tuple[int, ...]) -> str:
    def told(line: dict[str, Any], key: str) -> str:
        return cells.told(cells.Interval(**line[key]), sign=key != "paired") if key in line else ""

    keys = ("paired", "less_direct", "less_direct_of_equal_evaluations", "less_root")
    heads = ["windows", "later stages taught by", "optimizer steps", "network evaluations", "paired error, one step a window"]
    heads += ["less direct, equal steps", "less direct, equal evaluations", "less the root's"]
    lines = []
    for steps in budgets:
        for line in found["paths"]:
            if line["steps"] == steps and not line["kind"].startswith("direct"):
                kind = "" if line["kind"] == "equal steps" else line["kind"]
                lines.append([named(line["path"]), kind, line["own_steps"], f"{line['evaluations']:,}", *(told(line, key) for key in keys)])
    own = ", ".join(f"{v['paired']:.4f} at {k}" for k, v in found["teacher"].items())
    return (
        cells.table(heads, lines)
        + f"\nThe teacher's own steps: {own}. ± is half a 95 % interval over training seeds, of paired differences where they are differences.\n"
    )


def draw(path: Path, found: dict[str, Any], budgets: tuple[int, ...]) -> None:
    ends = sorted(int(k) for k in found["teacher"])[::-1]
    figure, axes = canvas(1, len(ends), width=4.4 * len(ends), height=4.6)
    for axis, end in zip(axes, ends, strict=True):
        lines = [line for line in found["paths"] if line["path"][-1] == end and line["kind"] in ("equal steps", "root", "chained")]
        routes = list(dict.fromkeys(named(line["path"]) for line in lines))
        for line_kind in dict.fromkeys((named(line["path"]), line["kind"]) for line in lines):
            mine = [next(x for x in lines if (named(x["path"]), x["kind"], x["steps"]) == (*line_kind, s)) for s in budgets]
            label = line_kind[0] + {"equal steps": ", direct", "root": "", "chained": ", chained"}[line_kind[1]]
            style = "--" if line_kind[1] == "chained" else "-"
            values = [cells.Interval(**x["paired"]) for x in mine]
            line_over(axis, budgets, values, label, COLOURS[routes.index(line_kind[0])], style=style)
        axis.set(
            xscale="log",
            xlabel="optimizer steps of 128 samples, all stages",
            title=f"{end} window{'s' if end > 1 else ''}, {end} step{'s' if end > 1 else ''}",
        )
        axis.set_xticks(budgets, [str(b) for b in budgets], minor=False)
        axis.minorticks_off()
        axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    axes[0].set_ylabel("paired error to the fine solve")
    save(figure, path)
