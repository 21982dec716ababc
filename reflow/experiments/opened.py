"""An experiment opened on a bed: where its students and rows lie, and under which version they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflow.errors import UserError
from reflow.evaluation import machine
from reflow.experiments import cells
from reflow.experiments.beds import SHORT, digits, measure, scans, students
from reflow.experiments.beds.digits import DigitsBed
from reflow.experiments.beds.exact import Correction, ExactBed, Model
from reflow.experiments.beds.students import Student
from reflow.experiments.store import Store, elsewhere
from reflow.flow import ChordTable

BEDS = ("exact", "mnist", "digits")


@dataclass(frozen=True)
class Opened:
    """The experiment `name` with its results in `out`. kind: the bed's name, of `BEDS`; other beds than the first have their own files.

    bed: the exact one, of its own or the user's scans. digits: the bed whose students are runs of the trainer, where it was asked for; then
    only students and the teacher are measured."""

    name: str
    out: Path
    kind: str
    bed: ExactBed
    quick: bool
    report: bool
    digits: DigitsBed | None = None

    @property
    def store(self) -> Store:
        """Of students, shared by all experiments whose folders lie side by side."""
        return Store(self.out.parent / "students")

    def path(self, ending: str) -> Path:
        return self.out / f"{self.name if self.kind == BEDS[0] else f'{self.name}-{self.kind}'}.{ending}"

    def reference(self, *, guidance: float | None = None, **settings: Any) -> measure.Reference:
        """Noises and what the flow makes of them, few in the quick form."""
        return measure.reference(self.bed, self.store, guidance=guidance, **(SHORT if self.quick else settings))

    def make(self, asked: Sequence[cells.Cell], work: Callable[[cells.Cell], dict[str, Any]], *sources: str) -> list[cells.Row]:
        """`cells.make` under the version of the students, of what measures them and of more sources, named from the package."""
        version = students.version("experiments/beds/measure.py", *sources, *(digits.SOURCES if self.digits else ()))
        if self.bed.scans:
            version += f"-{scans.digest(self.bed.scans)}"
        if elsewhere(self.bed.device):
            version += f"-{elsewhere(self.bed.device)}"
        return cells.make(self.path("jsonl"), asked, work, version, report=self.report)

    def trained(self, spec: Student, seeds: Sequence[int] = ()) -> tuple[Model, ChordTable]:
        """The student on this bed, and its last stage's windows."""
        own = students.on(self.bed, spec)
        return students.trained(own, self.store, seeds), own.table()

    def of_student(self, spec: Student, per_window: Sequence[int] = (1,), *, seeds: Sequence[int] = ()) -> dict[str, dict[str, float]]:
        """What is measured of the student at so many steps in each window: {steps in all: numbers}, as `measure.of_samples` or the digits bed
        has them. seeds: trained with it where they are not there."""
        if self.digits:
            return self.digits.of_student(spec, self.store, per_window)
        return measure.of_student(self.bed, *self.trained(spec, seeds), self.reference(), tuple(per_window))

    def of_teacher(self, steps: int) -> dict[str, float]:
        """The same of the teacher's own steps."""
        return self.digits.of_teacher(self.store, steps) if self.digits else measure.of_teacher(self.bed, steps, self.reference())

    def correction(self, spec: Student) -> Correction:
        return students.correction_of(students.on(self.bed, spec), self.store)

    def finish(self, rows: Sequence[cells.Row], text: str, found: dict[str, Any]) -> None:
        cells.finish(self.path("json"), self.name, self.kind, rows, text, found, device="" if self.digits else self.bed.device)


def opened(
    name: str, out: Path, *, bed: str = "exact", data: str = "", quick: bool = False, report: bool = False, device: str = "cpu",
    beds: Sequence[str] = BEDS[:2],
) -> Opened:  # fmt: skip
    """beds: that the experiment is there for. device: where beds of a closed form compute. Raises UserError for another bed, for a device that
    is not there, and for scans that cannot be read."""
    if bed not in beds:
        raise UserError(f"{name} is there for --bed {' or '.join(beds)}, not {bed!r}.")
    if bed == "mnist" and not data:
        raise UserError(f"--bed mnist needs the scans: {scans.HELP}.")
    if bed != "mnist" and data:
        raise UserError(f"--data goes with --bed mnist; --bed {bed} has its scans with it.")
    if bed == "digits" and device != "cpu":
        raise UserError(f"--device goes with --bed {' or '.join(BEDS[:2])}; the trainer of --bed digits takes the GPU where there is one.")
    machine.usable(device)
    scans.mixture(data)  # what cannot be read is told before anything is made
    return Opened(name, out, bed, ExactBed(scans=data, device=device), quick, report, digits.DigitsBed(quick) if bed == "digits" else None)
