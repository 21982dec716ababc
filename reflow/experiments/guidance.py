"""Students under guidance: scales 1 to 7, guided at inference or with the guidance learnt.

    reflow experiment guidance --bed exact

Figure 3 of ProReflow (arXiv 2503.04824) guides ProReflow-I (8 -> 4 windows, 4 steps) and -II (8 -> 4 -> 2, 2 steps) at scales 2 to 7. "sync"
(PeRFlow's CFG-sync): an unguided teacher, a tenth of the labels dropped for both, guidance at inference. "fixed" (CFG-fixed): a guided
teacher, the student is asked without guidance; its windows start at noised data, or on the guided teacher's own trajectories, which for a
guided flow is another law. Every student is paired with the fine solve that is guided at its scale, and stands beside the guided teacher's
own 4 or 2 steps. Scales are diffusers': u + w (c - u), 1 is none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reflow.experiments import cells
from reflow.experiments.beds import measure
from reflow.experiments.beds.students import Stage, Student
from reflow.experiments.figures import COLOURS, canvas, line_over, save
from reflow.experiments.opened import opened

SCALES = (1, 2, 3, 4, 5, 6, 7)
FIXED = (3, 7)
PAIRS = 8192  # a stage, solved once
MODELS = {"I": (8, 4), "II": (8, 4, 2)}
MEASURES = {"paired": "paired error", "frechet": "Fréchet distance", "nll": "-log p a pixel (nats)", "agreement": "class agreement"}


def run(out: Path, *, bed: str = "exact", data: str = "", seeds: int = 3, quick: bool = False, report: bool = False, device: str = "cpu") -> None:
    """Train, measure, tabulate and draw. quick: the seconds-long form of the tests. report: make nothing, tell what is there.
    device: where the bed computes. data: of --bed mnist."""
    at = opened("guidance", out, bed=bed, data=data, quick=quick, report=report, device=device)
    scales, fixed, steps = ((1, 3), (3,), 12) if quick else (SCALES, FIXED, 400)
    place = at.bed
    references = {w: at.reference(guidance=guided(w), steps=160) for w in scales}
    asked = []
    for model in MODELS:
        asked += [{"model": model, "mode": "sync", "starts": "data", "scale": w, "steps": steps} for w in scales]
        asked += [{"model": model, "mode": "fixed", "starts": starts, "scale": w, "steps": steps} for w in fixed for starts in ("data", "noise")]

    def work(cell: cells.Cell) -> dict[str, Any]:
        spec = student_of(cell)
        asked_for = guided(cell["scale"]) if cell["mode"] == "sync" else None
        return measure.of_student(place, *at.trained(spec, range(seeds)), references[cell["scale"]], guidance=asked_for)

    rows = at.make(cells.seeded(asked, seeds), work)
    found = {
        "teacher": {str(n): {str(w): measure.of_teacher(place, n, references[w]) for w in scales} for n in (4, 2, 32)},
        "fine": {str(w): measure.of_samples(place, references[w].fine, references[w]) for w in scales},
    }
    found["students"] = gathered(rows, found["teacher"])
    draw(at.path("png"), found, scales)
    at.finish(rows, text(found, scales), found)


def guided(scale: float) -> float | None:
    return None if scale == 1 else float(scale)


def student_of(cell: cells.Cell) -> Student:
    objective = (("starts", cell["starts"]),) if cell["starts"] != "data" else ()
    stages = tuple(Stage(k, cell["steps"], objective) for k in MODELS[cell["model"]])
    if cell["mode"] == "sync":
        return Student(stages, seed=cell["seed"], drop=0.1, pairs=PAIRS)
    return Student(stages, seed=cell["seed"], guidance=float(cell["scale"]), pairs=PAIRS)


def value(steps: int, key: str) -> Callable[[dict[str, Any]], float]:
    return lambda result: result[str(steps)][key]


def gathered(rows: list[cells.Row], teacher: dict[str, Any]) -> list[dict[str, Any]]:
    """Each student's measures over seeds, the paired error less the guided teacher's at as many steps, and starts on trajectories less
    starts at noised data."""
    found = []
    for model, mode, starts, scale in dict.fromkeys(tuple(r["cell"][key] for key in ("model", "mode", "starts", "scale")) for r in rows):
        mine, steps = cells.select(rows, model=model, mode=mode, starts=starts, scale=scale), MODELS[model][-1]
        line = {"model": model, "mode": mode, "starts": starts, "scale": scale, "steps": steps}
        line.update({key: cells.over_seeds(mine, value(steps, key)).as_dict() for key in MEASURES})
        own = teacher[str(steps)][str(scale)]["paired"]
        line["less_teacher"] = cells.over_seeds(mine, lambda r, own=own, steps=steps: value(steps, "paired")(r) - own).as_dict()
        if starts == "noise":
            data = cells.select(rows, model=model, mode=mode, starts="data", scale=scale)
            line["less_data_starts"] = cells.paired(mine, data, value(steps, "paired")).as_dict()
        if mode == "fixed":
            sync = cells.select(rows, model=model, mode="sync", starts="data", scale=scale)
            line["less_sync"] = cells.paired(mine, sync, value(steps, "paired")).as_dict()
        found.append(line)
    return found


def text(found: dict[str, Any], scales: tuple[int, ...]) -> str:
    def told(line: dict[str, Any], key: str, digits: int = 3, sign: bool = False) -> str:
        return cells.told(cells.Interval(**line[key]), digits, sign) if key in line else ""

    lines = []
    for w in scales:
        lines.append(["the fine solve", "", w, "", *("" if key == "paired" else f"{found['fine'][str(w)][key]:.3f}" for key in MEASURES), "", "", ""])
        for line in (x for x in found["students"] if x["scale"] == w):
            name = f"{line['model']}, {line['mode']}" + (f", starts: {line['starts']}" if line["mode"] == "fixed" else "")
            own = found["teacher"][str(line["steps"])][str(w)]
            differences = [told(line, key, sign=True) for key in ("less_teacher", "less_sync", "less_data_starts")]
            lines.append([name, line["steps"], w, f"{own['paired']:.3f}", *(told(line, key) for key in MEASURES), *differences])
    heads = ["student", "steps", "scale", "guided teacher's own", *MEASURES.values(), "less teacher", "less sync", "less data starts"]
    return cells.table(heads, lines) + "\n± is half a 95 % interval over training seeds, of paired differences where they are differences.\n"


def draw(path: Path, found: dict[str, Any], scales: tuple[int, ...]) -> None:
    figure, axes = canvas(1, 3, width=13.5, height=4.2)
    for axis, key in zip(axes, ("paired", "frechet", "agreement"), strict=True):
        for model, colour in zip(MODELS, (COLOURS[0], COLOURS[4]), strict=True):
            steps = MODELS[model][-1]
            mine = [line for line in found["students"] if (line["model"], line["mode"]) == (model, "sync")]
            line_over(axis, scales, [cells.Interval(**line[key]) for line in mine], f"{model}, {steps} steps, guided at inference", colour)
            own = [found["teacher"][str(steps)][str(w)][key] for w in scales]
            axis.plot(scales, own, color=colour, linestyle=":", linewidth=1.2, label=f"guided teacher, {steps} steps")
            for starts, mark in (("data", "s"), ("noise", "*")):
                dots = [line for line in found["students"] if (line["model"], line["mode"], line["starts"]) == (model, "fixed", starts)]
                said = f"{model}, guidance learnt, starts: {'noised data' if starts == 'data' else 'trajectories'}"
                axis.plot(
                    [d["scale"] for d in dots], [d[key]["mean"] for d in dots], mark, color=colour, markersize=8, markerfacecolor="none", label=said
                )
        if key != "paired":
            axis.plot(scales, [found["fine"][str(w)][key] for w in scales], color="0.35", linestyle="--", linewidth=1, label="the flow itself")
        axis.set(xlabel="guidance scale", ylabel=MEASURES[key])
    axes[0].set_title("Distance to the guided flow")
    axes[1].set_title("Distance to the data")
    axes[2].set_title("The class that was asked for")
    axes[0].legend(frameon=False)
    save(figure, path)
