"""A whole comparison: samples are drawn, measured and timed, and all that changes a number is written beside the numbers."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflow.errors import UserError
from reflow.evaluation import machine
from reflow.evaluation.comparison import asked
from reflow.evaluation.comparison.columns import COLUMNS, Given, measured
from reflow.evaluation.comparison.drawing import Drawing, Spec, draw
from reflow.evaluation.comparison.protocol import Protocol
from reflow.evaluation.comparison.samples import Cell, Samples
from reflow.evaluation.comparison.stored import Stored
from reflow.evaluation.comparison.timing import timed
from reflow.locks import alone
from reflow.outputs import write_text
from reflow.weights.files import make_folder

FORMAT = 2  # of report.json; the digits suite's is 1
NAME = "report.json"


@dataclass(frozen=True)
class Comparison:
    """What is compared. models: each spec with its (steps, guidance) settings; teacher: the reference's spec or None, with teacher_steps
    and its guidance (None: that of the cell compared with it). straight: guidance at which straightness is measured, for contenders that
    can (0: none)."""

    protocol: Protocol
    asked: asked.Asked
    models: tuple[tuple[Spec, tuple[tuple[int, float], ...]], ...]
    teacher: Spec | None
    teacher_steps: int
    teacher_guidance: float | None
    dtype: str
    batch: int
    replicates: int
    features: tuple[str, ...] = ()
    straight: float = 0.0
    notes: tuple[str, ...] = ()

    def reference(self, guidance: float) -> Cell | None:
        if self.teacher is None:
            return None
        return Cell(self.teacher.label, self.teacher_steps, guidance if self.teacher_guidance is None else self.teacher_guidance)

    @property
    def cells(self) -> list[Cell]:
        """All cells: the references first, then each model's."""
        own = [Cell(spec.label, *setting) for spec, settings in self.models for setting in settings]
        references = [self.reference(cell.guidance) for cell in own]
        return list(dict.fromkeys([*(cell for cell in references if cell is not None), *own]))

    def drawing(self, root: Path) -> Drawing:
        specs = {spec.label: spec for spec in (*([self.teacher] if self.teacher else []), *(spec for spec, _ in self.models))}
        parts = tuple((spec, tuple(cell for cell in self.cells if cell.label == label)) for label, spec in specs.items())
        what = {"prompts": self.asked.digest, "seed": self.protocol.samples.seed, "per_prompt": self.protocol.samples.per_prompt, "dtype": self.dtype}
        return Drawing(root, parts, self.asked.prompts, self.protocol.samples.per_prompt, self.protocol.samples.seed, self.dtype, self.batch, what)


def key_of(comparison: Comparison) -> str:
    """Of all that is asked for, with the files' sizes and times: whether a report that is there answers it."""
    told = repr(comparison) + comparison.protocol.digest + comparison.asked.digest + digest_of(comparison.asked.images)
    places = [place for spec, _ in comparison.drawing(Path()).specs for place in spec.files()]
    places += [Path(entry.partition("=")[2]) for entry in comparison.features]
    files = [file for place in places for file in (sorted(place.rglob("*")) if place.is_dir() else [place])]
    weights = [file for file in files if file.is_file()]
    return hashlib.sha256((told + digest_of(weights)).encode()).hexdigest()[:24]


def existing(folder: Path, comparison: Comparison) -> dict[str, Any] | None:
    """The report that is already there, if it answers this very comparison."""
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    answers = isinstance(found, dict) and found.get("format") == FORMAT and found.get("key") == key_of(comparison)
    return found if answers and (folder / "index.html").is_file() else None


def make(comparison: Comparison, out: Path, devices: Sequence[str], *, command: str, keep: bool) -> dict[str, Any]:
    """Draw what is missing below `out`, measure it, write report.json and the page; returns the report.

    Samples are removed at the end unless they are kept; features stay, so that a later call with more networks redraws only then.
    """
    from reflow.evaluation.comparison import page
    from reflow.evaluation.features import open_features

    make_folder(out)
    with alone(out, "Another evaluation"):
        features = open_features(comparison.features, devices[0])  # before hours of drawing
        drawing = comparison.drawing(out / "samples")
        told = draw(drawing, devices)
        seconds, straight = in_turns(comparison, drawing, devices[0])
        rows, missing = measure(comparison, drawing, told, features, out)
        report = {
            "format": FORMAT,
            "kind": "comparison",
            "key": key_of(comparison),
            "command": command,
            "protocol": {**comparison.protocol.model_dump(mode="json"), "title": comparison.protocol.title, "digest": comparison.protocol.digest},
            "prompts": {"count": len(comparison.asked.prompts), "digest": comparison.asked.digest},
            "real_images": len(comparison.asked.images),
            "samples": drawing.count,
            "batch": comparison.batch,
            "reference": reference_of(comparison),
            "models": [told[label] for label in dict.fromkeys(cell.label for cell in comparison.cells)],
            "features": {n: described(f) for n, f in features.items()},
            "columns": [
                {"name": c.name, "title": c.title, "better": c.better, "digits": c.digits, "network": c.network, "real": c.real} for c in COLUMNS
            ],
            "rows": [{**row, "seconds": seconds.get(str(cell_of(row)))} for row in rows],
            "not_measured": missing,
            "straightness": straight,
            "notes": list(comparison.notes),
            "replicates": comparison.replicates,
            "cost": {
                "network_evaluations": sum(row["evaluations"] * drawing.count for row in rows),
                "device_hours": sum(row["drawing_seconds"] for row in rows) / 3600,
                "devices": list(devices),
            },
            **machine.describe(),
        }
        page.write(report, page.chosen_pictures(comparison.cells, drawing), out)
        write_text(out / NAME, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        if not keep:
            shutil.rmtree(out / "samples")
    return report


def described(feature: Any) -> dict[str, Any]:
    """A network beside its numbers; truncated: how many prompts were longer than it reads."""
    told = {"implementation": feature.implementation, "digest": feature.digest}
    return told | ({"truncated_prompts": feature.truncated} if getattr(feature, "truncated", 0) else {})


def reference_of(comparison: Comparison) -> dict[str, Any] | None:
    if comparison.teacher is None:
        return None
    return {"model": comparison.teacher.label, "steps": comparison.teacher_steps, "guidance": comparison.teacher_guidance}


def cell_of(row: Mapping[str, Any]) -> Cell:
    return Cell(row["model"], row["steps"], row["guidance"])


def in_turns(comparison: Comparison, drawing: Drawing, device: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(seconds an image of every cell, straightness of the contenders that measure it), one contender after the other."""
    seconds: dict[str, Any] = {}
    straight: list[dict[str, Any]] = []
    windows = {len(w): w for spec, _ in drawing.specs if (w := getattr(getattr(spec, "student", None), "windows", None)) is not None}
    prompts, seeds = drawing.prompts_of(range(min(64, drawing.count))), [drawing.seed + i for i in range(min(64, drawing.count))]
    for spec, cells in drawing.specs:
        contender = spec.open(device, drawing.dtype)
        try:
            seconds |= timed(contender, cells, drawing.prompts[0], drawing.seed)
            follow = getattr(contender, "straightness", None)
            own = getattr(getattr(spec, "student", None), "windows", None)
            if follow is not None and comparison.straight:
                guidance = comparison.straight if own is None else cells[0].guidance
                straight += [follow(prompts, seeds, guidance, w) for w in ([own] if own is not None else windows.values())]
        finally:
            contender.close()
    return seconds, straight


def measure(
    comparison: Comparison, drawing: Drawing, told: Mapping[str, Mapping[str, Any]], features: dict[str, Any], out: Path
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row of every cell, and why what is in no row was not measured."""
    images, samples = comparison.protocol.images, comparison.protocol.samples
    stored = Stored(out / "features", drawing.prompts, samples.per_prompt, images.size, images.resize)
    real_digest = digest_of(comparison.asked.images)
    rows, missing = [], {}

    def at(cell: Cell) -> Samples:
        return drawing.samples(cell, told[cell.label])

    for cell in comparison.cells:
        reference = comparison.reference(cell.guidance)
        beside = at(reference) if reference is not None and reference != cell else None
        given = Given(
            at(cell), beside, stored, features, comparison.asked.images, real_digest, comparison.replicates, comparison.asked.objects
        )
        found, lacking = measured(given)
        if reference != cell or len(comparison.cells) == 1:
            missing |= lacking
        costs = at(cell).costs
        rows.append(
            {
                "model": cell.label,
                "steps": cell.steps,
                "guidance": cell.guidance,
                "reference": None if beside is None else {"model": beside.cell.label, "steps": beside.cell.steps, "guidance": beside.cell.guidance},
                "is_reference": reference == cell,
                "evaluations": costs[0]["evaluations"],
                "drawing_seconds": sum(sum(cost["seconds"].values()) for cost in costs),
                "measures": found,
            }
        )
    return rows, {name: why for name, why in missing.items() if not any(name in row["measures"] for row in rows)}


def digest_of(paths: Sequence[Path]) -> str:
    """Of files by name, size and time of change: what real images these are."""
    told = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in paths]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def open_result(path: Path) -> dict[str, Any]:
    """A report.json, or that of a folder. Raises UserError where there is none that can be compared."""
    file = path / NAME if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} holds no result of an evaluation ({file.name} cannot be read: {error}); give a folder that `reflow evaluate` wrote."
        ) from error
    if not isinstance(found, dict) or found.get("format") not in (1, FORMAT) or "machine" not in found:
        raise UserError(f"{file} is no result of `reflow evaluate` of this version; give a folder that it wrote.")
    return found
