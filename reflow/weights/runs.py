"""Names of stages in a run directory.

Stages are counted from 1 in all that people see: folders, checkpoints, logs, reports, options.
Runs of versions before counted from 0. They are read and continued as they are: such a directory has a `stage-0`.
"""

from __future__ import annotations

from pathlib import Path


def first(run_dir: str | Path) -> int:
    """The number of a run's first stage: 1, or 0 in a directory that an earlier version began."""
    run_dir = Path(run_dir)
    old = (run_dir / "stage-0").exists() or any((run_dir / "checkpoints").glob("stage-0-*"))
    return 0 if old else 1


def stage_folder(run_dir: str | Path, index: int) -> Path:
    """The folder of stage `index` (a position in the recipe, from 0)."""
    return Path(run_dir) / f"stage-{index + first(run_dir)}"


def checkpoint_name(run_dir: str | Path, index: int, samples: int) -> str:
    """The name of a checkpoint of stage `index` after so many of its samples."""
    return f"stage-{index + first(run_dir)}-{samples:09d}"


def checkpoint_place(path: Path) -> tuple[int, int]:
    """(stage, samples) of a checkpoint's folder; the stage as a position, from 0."""
    _, number, samples = path.name.split("-")
    return int(number) - first(path.parent.parent), int(samples)


def stage_number(folder: Path) -> int:
    """The number of a stage, from 1, of its folder in a run directory."""
    return int(folder.name.removeprefix("stage-")) + 1 - first(folder.parent)
