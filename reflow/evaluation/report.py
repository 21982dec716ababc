"""A run's report folder: report.json, the pictures and the page; an evaluation that fails leaves the old ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from reflow.errors import UserError
from reflow.evaluation import machine, page, pictures
from reflow.evaluation.runs import Run
from reflow.evaluation.suite import Settings, Suite
from reflow.models import registry
from reflow.outputs import staged, write_text
from reflow.recipes import reading

FAMILIES = ("digits", "digits-flow")  # whose measures are features of the digits
FORMAT = 1  # of report.json; raise it when its keys change


def existing(folder: Path, run: Run, settings: Settings) -> dict[str, Any] | None:
    """The report that is already there, if it measures these very weights with these settings."""
    try:
        found = json.loads((folder / "report.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None
    wanted = {
        "format": FORMAT,
        "weights": {f"stage-{s.stage + 1}": s.digest() for s in run.students},
        "settings": asdict(settings),
    }
    there = all((folder / name).is_file() for name in ("index.html", "differences.png"))
    complete = there and all(found.get(key) == value for key, value in wanted.items())
    return found if complete else None


def make_suite(run: Run, settings: Settings, device: str | None = None) -> Suite:
    """A run's base, ready to evaluate it and others of the same base. UserError for a family other than those of the digits."""
    if run.recipe.model.family not in FAMILIES:
        raise UserError(
            f"{run.folder} trained the family '{run.recipe.model.family}'; `reflow evaluate` measures the digits model"
            " only, since its measures are features of the digits."
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    base = registry.family(run.recipe.model.family).load(run.recipe.model.base, device=machine.usable(device))
    learnt, asked = learnt_guidance(run), settings.guidance
    if asked is None or asked == learnt:
        return Suite(base, settings, guidance_scale=learnt)
    if learnt != 1:
        raise UserError(
            f"The students of {run.folder} have learnt guidance {learnt:g} and are sampled without any, so they have no"
            f" --guidance {asked:g}; write {learnt:g}, or leave it out."
        )
    return Suite(base, settings, guidance_scale=asked, student_guidance=asked)


def learnt_guidance(run: Run) -> float:
    """The guidance that all students of a run have learnt, and their teacher is sampled with. Raises UserError for several."""
    scales = {student.stage + 1: run.recipe.guidance_of(student.stage) for student in run.students}
    if len(set(scales.values())) > 1:
        said = ", ".join(f"stage {stage} guidance {scale:g}" for stage, scale in scales.items())
        raise UserError(
            f"The students of {run.folder} have learnt different guidances ({said}), and a report compares them with one"
            " teacher; move the folders of the stages that it should leave out."
        )
    return next(iter(scales.values()))


def make(
    run: Run, folder: Path, settings: Settings, *, command: str, device: str | None = None, suite: Suite | None = None
) -> dict[str, Any]:
    """Evaluate the run; write report.json, grid.png, differences.png, quality.png, training.png, curves.png and index.html. Returns the report."""
    suite = suite or make_suite(run, settings, device)
    report = {"format": FORMAT, "command": command, **suite.evaluate(run), **machine.describe()}
    with staged(folder, last="report.json") as new:
        pictures.sample_grid(suite.pictures, suite.labels).save(new / "grid.png", optimize=True)
        pictures.difference_grid(suite.pictures, suite.labels).save(new / "differences.png", optimize=True)
        pictures.quality(report, new / "quality.png")
        pictures.curves(run.log("train"), [len(s.solved_edges) - 1 for s in run.recipe.stages], new / "curves.png")
        pictures.progress(run.log("train"), run.log("validate"), new / "training.png")
        write_json(report, new / "report.json")
        page.write(report, new, reading.dump(run.recipe))
    return report


def write_json(value: Mapping[str, Any], path: Path) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
