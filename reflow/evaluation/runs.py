"""What a run directory offers to evaluation: its recipe, the students of its finished stages, its log."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reflow.errors import UserError
from reflow.flow import Windows
from reflow.lines import read_lines
from reflow.models.family import Base
from reflow.recipes import reading
from reflow.recipes.settings import Recipe
from reflow.weights.lora import stage_file, student_state
from reflow.weights.runs import first


@dataclass(frozen=True)
class Student:
    """The EMA student that a finished stage left: its windows, and how its output is read inside them."""

    stage: int  # a position in the recipe, from 0
    windows: Windows
    path: Path
    prediction_type: str
    network_time: str
    twin: bool = False  # another stage of the run has as many windows

    @property
    def label(self) -> str:
        """A name of its own among the students of a run."""
        count = len(self.windows)
        return f"student, {count} window{'s' if count > 1 else ''}{f' (stage {self.stage + 1})' if self.twin else ''}"

    def digest(self) -> str:
        """sha256 of the weights file."""
        with open(self.path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()

    def network(self, base: Base, device: torch.device) -> torch.nn.Module:
        """A UNet of the base's architecture with the student's weights, fp32, frozen. UserError if they do not fit."""
        unet = base.new_network()
        unet.load_state_dict(student_state(base.unet.state_dict(), self.path))
        return unet.to(device, torch.float32).eval().requires_grad_(False)


@dataclass(frozen=True)
class Run:
    folder: Path
    recipe: Recipe
    students: tuple[Student, ...]

    def log(self, event: str) -> list[dict[str, Any]]:
        """The records of one kind in log.jsonl, stages counted from 1; a line that a killed run left half written is
        skipped."""
        path, records = self.folder / "log.jsonl", []
        for line in read_lines(path) if path.exists() else ():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and record.get("event") == event:
                if "stage" in record:
                    record["stage"] += 1 - first(self.folder)
                records.append(record)
        return records


def open_run(folder: str | Path) -> Run:
    """Read a run directory. Raises UserError where it is none, or where no stage is finished."""
    folder = Path(folder)
    recipe_file = folder / "recipe.toml"
    if not recipe_file.is_file():
        raise UserError(
            f"--run-dir {folder} holds no run of reflow (there is no {recipe_file.name} in it); give the folder that "
            "training wrote."
        )
    recipe = reading.load(str(recipe_file))
    counts = [len(stage.edges) - 1 for stage in recipe.stages]
    kind, time = recipe.student.prediction_type, recipe.student.network_time
    students = tuple(
        Student(i, Windows(stage.edges), path, kind, time, twin=counts.count(counts[i]) > 1)
        for i, stage in enumerate(recipe.stages)
        if (path := stage_file(folder, i)).is_file()
    )
    if not students:
        raise UserError(
            f"--run-dir {folder} has no finished stage yet (there are no weights of stage 1); run the "
            "training command until the first stage is done, then evaluate again."
        )
    return Run(folder, recipe, students)
