"""Few-step methods at equal training cost, the teacher's samplers, and the cost of a student as good as 32 steps of its teacher.

    reflow experiment comparison --bed exact

ProReflow (arXiv 2503.04824, tables 1 to 3) compares few-step models that were trained at very different cost. Here each method has its source's
windows, starts, times, loss and reading (`beds/methods.py`), and as many optimizer steps as 400,000 network evaluations leave it after its
pairs are solved; each stands beside the same method with times near the start where its source takes uniform ones. Sampled at 1, 2, 4 and 8
steps; fewer steps than windows are not defined. "guided": at scale 3, at inference or as learnt, against the fine solve guided so. The
teacher is sampled by diffusers' own schedulers. Second table: network evaluations until the 4-step student is within 1.05 of the paired
error of the teacher's 32 DDIM steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from reflow.experiments import cells, comparison_page
from reflow.experiments.beds import measure, methods, stock
from reflow.experiments.beds.consistency import Consistency
from reflow.experiments.beds.measure import Reference
from reflow.experiments.beds.methods import METHODS, SCALE, Method
from reflow.experiments.beds.students import Student
from reflow.experiments.opened import Opened, opened
from reflow.experiments.store import elsewhere
from reflow.flow import Windows

STEPS = (1, 2, 4, 8)
TEACHER_STEPS = (1, 2, 4, 8, 16, 32)
BUDGET = 400_000
WANTED = 1.05  # times the teacher's error at 32 steps
BUDGETS = (500_000, 1_000_000, 2_000_000)
STARTS = (("time_share", 1.0),)
FINE = {"solver_steps": 32}  # 128 of the whole of time
TIMED = {
    "4 windows, near start": Method("ours", (4,), settings={"drop": 0.0}),
    "4 windows, starts alone, 128-step teacher": Method("ours", (4,), STARTS, stage=FINE, settings={"drop": 0.0}),
    "starts alone, 128-step teacher, 3 times the width": Method("ours", (4,), STARTS, stage=FINE, settings={"drop": 0.0, "width": 384}),
    "8 -> 4, near start": Method("ours", (8, 4), settings={"drop": 0.0}),
}
# (method, steps), (other, steps), what was published of them: FID on COCO-2014 and COCO-2017 (ProReflow's tables), "RD": Rectified Diffusion's.
ORDER = (
    (("ProReflow-II", 4), ("ProReflow-I", 4), "10.70 - 11.16, 22.03 - 22.97"),
    (("ProReflow-I", 4), ("PeRFlow", 4), "11.16 - 12.01, 22.97 - 23.81"),
    (("PeRFlow", 4), ("2-rectified flow", 4), "12.01 - 15.32, 23.81 - 32.97"),
    (("ProReflow-II", 2), ("2-rectified flow", 2), "15.44 - 20.17, 27.59 - 49.32"),
    (("InstaFlow", 4), ("InstaFlow", 2), "44.01 - 24.61, 102.41 - 71.54"),
    (("2-rectified flow", 4), ("2-rectified flow", 2), "15.32 - 20.17, 32.97 - 49.32"),
    (("ProReflow-I", 4), ("PCM, 4 phases", 4), "11.16 - 11.70"),
    (("ProReflow-II", 4), ("PCM, 4 phases", 4), "10.70 - 11.70"),
    (("PCM, 4 phases", 4), ("PeRFlow", 4), "11.70 - 12.01"),
    (("phased rectified diffusion", 4), ("PeRFlow", 4), "20.64 - 22.97 (RD)"),
    (("ProReflow-II, near start", 4), ("ProReflow-I, near start", 4), ""),
    (("ProReflow-I, near start", 4), ("PeRFlow, near start", 4), ""),
    (("PCM, 4 phases", 4), ("PeRFlow, near start", 4), ""),
    (("phased rectified diffusion, near start", 4), ("4 windows, near start", 4), ""),
    (("2 windows, near start", 4), ("4 windows, near start", 4), ""),
    (("2 windows, near start", 4), ("ProReflow-II, near start", 4), ""),
    (("ProReflow-II, near start", 2), ("2 windows, near start", 2), ""),
    (("8 parts merging into 4", 4), ("ProReflow-I, near start", 4), ""),
    (("8 parts merging into 4", 4), ("4 windows, near start", 4), ""),
    (("8 parts merging into 2", 2), ("2 windows, near start", 2), ""),
    (("4 windows, near start, trajectory starts", 4), ("4 windows, near start", 4), ""),
    (("2-rectified flow++, half from data", 1), ("2-rectified flow++", 1), ""),
    (("InstaFlow", 1), ("distillation at t = 1", 1), ""),
)
QUICK = ("2-rectified flow", "PeRFlow", "PeRFlow-fixed", "PCM, 4 phases")
# The product's solver: from index to index where diffusers floors 1000 / steps, and of second order in the last step too.
OWN = {"DDIM, index to index": "ddim", "Heun, to the end": "heun"}
TO_END = {"DPM-Solver, to the end": "dpmsolver", "DPM-Solver++, to the end": "dpmsolver++"}  # diffusers' own, told to keep its order below 15 steps
SOURCES = (*methods.SOURCES, "experiments/beds/stock.py")


def run(out: Path, *, bed: str = "exact", data: str = "", seeds: int = 3, quick: bool = False, report: bool = False, device: str = "cpu") -> None:
    """Train, measure, tabulate and draw. quick: the seconds-long form of the tests. report: make nothing, tell what is there.
    device: where the bed computes. data: of --bed mnist."""
    at = opened("comparison", out, bed=bed, data=data, quick=quick, report=report, device=device)
    names, budget, budgets, timed = (QUICK, 18_000, (6_000, 12_000), list(TIMED)[:1]) if quick else (METHODS, BUDGET, BUDGETS, TIMED)
    references = {"unguided": at.reference(), "guided": at.reference(guidance=SCALE, steps=160)}
    samplers, most = (("DDIM", *OWN), 8) if quick else ((*stock.KINDS, *OWN, *TO_END), TEACHER_STEPS[-1])
    solves = [(kind, n) for kind in samplers for n in TEACHER_STEPS if n <= most]
    asked: list[cells.Cell] = [{"teacher": kind, "steps": n, "guided": guided} for kind, n in solves for guided in (False, True)]
    asked += cells.seeded([{"method": name, "budget": budget} for name in names], seeds)
    asked += cells.seeded([{"timed": name, "budget": b} for name in timed for b in budgets], seeds)

    def work(cell: cells.Cell) -> dict[str, Any]:
        if "teacher" in cell:
            return of_teacher(at, cell, references["guided" if cell["guided"] else "unguided"])
        if "timed" in cell:
            return of_timed(at, student_of(cell), references["unguided"], seeds)
        return of_method(at, cell, references, seeds)

    rows = at.make(asked, work, *SOURCES)
    fine = {key: measure.of_samples(at.bed, ref.fine, ref) for key, ref in references.items()}
    found = {"budget": budget, "fine": fine, **gathered(rows)}
    comparison_page.draw(at.path("png"), found)
    at.finish(rows, comparison_page.text(found), found)


def student_of(cell: cells.Cell) -> Student | Consistency:
    """The student of a cell. Of the second table: pairs grow with the budget, one for each 128 evaluations."""
    if "method" in cell:
        return METHODS[cell["method"]].at(cell["budget"], cell["seed"])
    method, budget = TIMED[cell["timed"]], cell["budget"]
    return replace(method, settings={**method.settings, "pairs": budget // 128}).at(budget, cell["seed"])


def of_teacher(at: Opened, cell: cells.Cell, ref: Reference) -> dict[str, Any]:
    kind, steps, model = cell["teacher"], cell["steps"], at.bed.teacher

    def sample(noise: Tensor, labels: Tensor) -> Tensor:
        if kind in OWN:
            return at.bed.sample(model, at.bed.solver(Windows.uniform(1), steps, guidance=ref.guidance, method=OWN[kind]), noise, labels)
        return stock.sample(at.bed, model, scheduler(kind, steps), noise, labels, guidance=ref.guidance)

    asked = steps * (1 + (OWN.get(kind) == "heun")) if kind in {**OWN, **TO_END} else stock.evaluations(kind, steps)
    asked *= 1 if ref.guidance is None else 2
    return {**measure.of_samples(at.bed, sample(ref.noise, ref.labels), ref), "evaluations": asked, "time": timed(at, sample, model, ref)}


def scheduler(kind: str, steps: int) -> Any:
    if kind not in TO_END:
        return stock.made(kind, steps)
    found = stock.dpm(algorithm_type=TO_END[kind], lower_order_final=False)
    found.set_timesteps(steps)
    return found


def of_method(at: Opened, cell: cells.Cell, references: dict[str, Reference], seeds: int) -> dict[str, Any]:
    """What it costs, and by "unguided" or "guided" and steps what it makes; "time": of a sample of the fewest steps, in network evaluations."""
    method, spec = METHODS[cell["method"]], student_of(cell)
    model, table = methods.trained(spec, at.bed, at.store, range(seeds))
    found: dict[str, Any] = {"training": spec.evaluations(), "optimizer_steps": optimizer_steps(spec)}
    kinds = (["unguided"] if method.guidance is None else []) + (["guided"] if method.guidance or method.sees_null else [])
    for kind in kinds:
        ref, guidance = references[kind], None if kind == "unguided" or method.guidance else SCALE
        made = {n: methods.sample(at.bed, spec, model, n // len(table), ref.noise, ref.labels, guidance=guidance) for n in STEPS if n >= len(table)}
        found[kind] = {str(n): measure.of_samples(at.bed, sample, ref) for n, sample in made.items()}
    sample = lambda noise, labels: methods.sample(at.bed, spec, model, 1, noise, labels)  # noqa: E731
    found["time"] = timed(at, sample, model, references["unguided"])
    return found


def of_timed(at: Opened, spec: Student | Consistency, ref: Reference, seeds: int) -> dict[str, Any]:
    model, table = methods.trained(spec, at.bed, at.store, range(seeds))
    found = measure.of_student(at.bed, model, table, ref)[str(len(table))]
    return {**found, "training": spec.evaluations(), "optimizer_steps": optimizer_steps(spec)}


def optimizer_steps(spec: Student | Consistency) -> int:
    return spec.steps if isinstance(spec, Consistency) else sum(stage.steps for stage in spec.stages)


def timed(at: Opened, sample: Callable[..., Any], model: Callable[..., Any], ref: Reference) -> float:
    """Time of a sample over that of one answer of the network, the least of a few of each: the processor's, or what passes until a GPU is done."""
    noise, labels = ref.noise[:200], ref.labels[:200]
    when, clock = noise.new_full((len(noise),), 500.0), time.perf_counter if elsewhere(at.bed.device) else time.process_time

    def least(call: Callable[[], Any]) -> float:
        taken = []
        for _ in range(1 if at.quick else 5):
            began = clock()
            float(call()[0, 0])  # a GPU is waited for
            taken.append(clock() - began)
        return min(taken)

    return least(lambda: sample(noise, labels)) / max(least(lambda: model(noise, when, labels)), 1e-9)


def gathered(rows: list[cells.Row]) -> dict[str, list[dict[str, Any]]]:
    """Of the "teacher" its samplers; of "methods" measures over seeds by kind and steps; the "order": differences of two of them; and "to_quality",
    the cost until the error is as wanted."""
    teacher = [{**row["cell"], **row["result"]} for row in rows if "teacher" in row["cell"]]
    students = [one for name in dict.fromkeys(row["cell"].get("method") for row in rows) if name for one in [of_seeds(name, rows)]]
    wanted = (next(iter(OWN)), max((line["steps"] for line in teacher), default=0), False)
    ddim = next((line["paired"] for line in teacher if (line["teacher"], line["steps"], line["guided"]) == wanted), None)
    names = [name for name in dict.fromkeys(row["cell"].get("timed") for row in rows) if name]
    order = [line for line in (difference(rows, *asked) for asked in ORDER) if line]
    return {"teacher": teacher, "methods": students, "order": order, "to_quality": [to_quality(name, rows, WANTED * ddim) for name in names if ddim]}


def of_seeds(name: str, rows: list[cells.Row]) -> dict[str, Any]:
    mine = cells.select(rows, method=name)
    first = mine[0]["result"]
    line: dict[str, Any] = {"method": name, "family": METHODS[name].family, "windows": list(METHODS[name].windows), "steps": METHODS[name].steps}
    line.update({key: first[key] for key in ("training", "optimizer_steps")})
    line["time"] = min(row["result"]["time"] for row in mine)
    for kind in ("unguided", "guided"):
        if kind in first:
            line[kind] = {
                steps: {key: cells.over_seeds(mine, lambda r, k=kind, s=steps, m=key: r[k][s][m]).as_dict() for key in ("paired", "frechet", "nll")}
                for steps in first[kind]
            }
    return line


def difference(rows: list[cells.Row], mine: tuple[str, int], other: tuple[str, int], published: str) -> dict[str, Any] | None:
    """Of two methods' unguided measures, seed by seed; None where one of them is not there."""
    both = []
    for name, steps in (mine, other):
        own = [row for row in cells.select(rows, method=name) if str(steps) in row["result"].get("unguided", {})]
        both.append([{"cell": row["cell"], "result": row["result"]["unguided"][str(steps)]} for row in own])
    if not all(both):
        return None
    line = {"method": mine, "other": other, "published": published}
    return {**line, **{key: cells.paired(*both, lambda r, k=key: r[k]).as_dict() for key in ("paired", "frechet")}}


def to_quality(name: str, rows: list[cells.Row], wanted: float) -> dict[str, Any]:
    """By seed the cost at which the error falls to `wanted`, None where it does not up to the largest budget; their geometric mean where all do."""
    mine = [row for row in rows if row["cell"].get("timed") == name]
    budgets = sorted({row["cell"]["budget"] for row in mine})
    seeds = sorted({row["cell"]["seed"] for row in mine})
    each = []
    for seed in seeds:
        own = sorted((row["result"]["training"], row["result"]["paired"]) for row in cells.select(mine, seed=seed))
        each.append(reached([cost for cost, _ in own], [error for _, error in own], wanted))
    curve = []
    for budget in budgets:
        those = cells.select(mine, budget=budget)
        curve.append({"training": those[0]["result"]["training"], "optimizer_steps": those[0]["result"]["optimizer_steps"],
                      "paired": cells.over_seeds(those, lambda r: r["paired"]).as_dict()})  # fmt: skip
    line = {"method": name, "wanted": wanted, "reached": each, "curve": curve, "cost": None}
    if all(each):
        logs = cells.over_seeds([{"cell": {"seed": s}, "result": {"x": math.log(c)}} for s, c in zip(seeds, each, strict=True)], lambda r: r["x"])
        line["cost"] = {"mean": math.exp(logs.mean), "low": logs.low and math.exp(logs.low), "high": logs.high and math.exp(logs.high)}
    return line


def reached(costs: list[int], errors: list[float], wanted: float) -> float | None:
    """Cost at which errors at rising costs first fall to `wanted`: between two of them by straight lines in the logarithm of the cost; the first
    cost itself where that is already there, which is then an upper bound."""
    if errors[0] <= wanted:
        return float(costs[0])
    for (a, high), (b, low) in zip(zip(costs, errors, strict=True), zip(costs[1:], errors[1:], strict=True), strict=False):
        if low <= wanted:
            return math.exp(math.log(a) + (high - wanted) / (high - low) * (math.log(b) - math.log(a)))
    return None
