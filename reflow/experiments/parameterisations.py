"""What a student's output means, from before the first step on: PeRFlow's readings of one network.

    reflow experiment parameterisations --bed exact

PeRFlow (arXiv 2405.07510) reads its student's output as the noise of the chord ("ddim_eps"), as that noise on another scale ("diff_eps",
its SD1.5 weights), or as the velocity itself. Only the first begins as the teacher's own steps. One row a reading, budget (0: untrained)
and seed: paired error at four windows and steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reflow.experiments import cells
from reflow.experiments.beds.students import Stage, Student
from reflow.experiments.figures import COLOURS, canvas, line_over, save
from reflow.experiments.opened import BEDS, opened

KINDS = ("ddim_eps", "diff_eps", "velocity")
BUDGETS, ON_DIGITS = (0, 100, 300, 1000), (0, 50, 200)


def run(out: Path, *, bed: str = "exact", data: str = "", seeds: int = 3, quick: bool = False, report: bool = False, device: str = "cpu") -> None:
    """Train, measure, tabulate and draw. quick: the seconds-long form of the tests. report: make nothing, tell what is there.
    device: where the bed computes. data: of --bed mnist. On --bed digits a student is a run of the trainer."""
    at = opened("parameterisations", out, bed=bed, data=data, quick=quick, report=report, device=device, beds=BEDS)
    budgets = (0, 30) if quick else ON_DIGITS if at.digits else BUDGETS
    asked = cells.seeded([{"kind": kind, "steps": steps} for steps in budgets for kind in KINDS], seeds)

    def work(cell: cells.Cell) -> dict[str, Any]:
        pairs = 8192 if at.digits else Student.pairs
        spec = Student((Stage(4, cell["steps"]),), seed=cell["seed"], prediction_type=cell["kind"], pairs=pairs)
        return at.of_student(spec, seeds=range(seeds))["4"]

    rows = at.make(asked, work)
    found = {"teacher_4": at.of_teacher(4), "kinds": gathered(rows)}
    draw(at.path("png"), found, budgets)
    at.finish(rows, text(found, budgets), found)


def gathered(rows: list[cells.Row]) -> list[dict[str, Any]]:
    """Each reading's paired error at each budget, and less that of ddim_eps."""
    found = []
    for kind, steps in dict.fromkeys((r["cell"]["kind"], r["cell"]["steps"]) for r in rows):
        mine, first = (cells.select(rows, kind=k, steps=steps) for k in (kind, KINDS[0]))
        found.append({"kind": kind, "steps": steps, "paired": cells.over_seeds(mine, lambda r: r["paired"]).as_dict(),
                      "less_ddim_eps": cells.paired(mine, first, lambda r: r["paired"]).as_dict()})  # fmt: skip
    return found


def text(found: dict[str, Any], budgets: tuple[int, ...]) -> str:
    lines = []
    for kind in KINDS:
        mine = [line for line in found["kinds"] if line["kind"] == kind]
        lines.append([f"`{kind}`", *(cells.told(cells.Interval(**line["paired"])) for line in mine)])
    heads = ["the output is read as", *(f"{s} optimizer steps" if s else "untrained" for s in budgets)]
    own = f"The teacher's own 4 steps: {found['teacher_4']['paired']:.4f}. ± is half a 95 % interval over training seeds."
    return cells.table(heads, lines) + f"\n{own}\n"


def draw(path: Path, found: dict[str, Any], budgets: tuple[int, ...]) -> None:
    figure, axes = canvas(1, 1, width=6.0, height=4.0)
    for kind, colour in zip(KINDS, COLOURS[::2], strict=False):
        mine = [line for line in found["kinds"] if line["kind"] == kind]
        line_over(axes[0], budgets, [cells.Interval(**line["paired"]) for line in mine], kind, colour)
    axes[0].axhline(found["teacher_4"]["paired"], color="0.35", linestyle="--", linewidth=1)
    axes[0].set(xscale="symlog", yscale="log", xlabel="optimizer steps of 128 samples", ylabel="paired error, 4 windows at 4 steps")
    axes[0].set_xscale("symlog", linthresh=100)
    axes[0].set_xticks(budgets, [str(b) for b in budgets])
    axes[0].legend(frameon=False)
    axes[0].set_title("Only one reading begins as the teacher")
    save(figure, path)
