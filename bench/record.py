"""Rows of measurements as JSON lines: what was measured, on what, and whether a cell is there already.

A row says everything that its number depends on, so that tables and plots are made from the files alone. A run that is
started again with the same revision on the same machine goes on where it stopped.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from reflow.evaluation import machine
from reflow.lines import read_lines

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
NOT_A_NUMBER = "not a performance number"

# What a row is about; two rows that agree here and in the revision are the same measurement.
IDENTITY = ("bench", "case", "peer", "mode", "cache", "device", "dtype", "shape", "seed", "quick")
# Every row has these; what was not measured is None.
FIELDS: dict[str, Any] = {
    "bench": None,
    "case": None,
    "peer": None,
    "mode": "plain",  # plain | graph
    "cache": "warm",  # cold | warm
    "device": None,
    "dtype": None,
    "shape": None,
    "seed": None,
    "quick": False,
    "median_us": None,
    "p20_us": None,
    "p80_us": None,
    "host_us": None,  # of the host alone, for calls that a GPU runs later
    "rounds": None,
    "error": None,
    "deterministic": None,
    "failed": False,  # by the gate; such a row is measured again by the next run
    "launches": None,
    "syncs": None,
    "roofline_us": None,
    "unstable": None,
    "clocks": None,
    "note": "",
}


def stamp(device: torch.device | str) -> dict[str, Any]:
    """Machine, versions and revision, ready for JSON; None where the machine does not tell."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": (torch.version.cuda or torch.version.hip) if cuda else None,
        "python": platform.python_version(),
        "revision": revision(),
        "cpu": machine.processor(),
        "cores": machine.cores(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def revision() -> str:
    """The git revision, with +dirty where tracked files outside bench/results differ; "unknown" without git."""
    found = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if found is None:
        return "unknown"
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno", "--", ".", ":!bench/results")
    return found + ("+dirty" if changed else "")


def machine_name(device: torch.device | str) -> str:
    """The folder of this machine's results: the GPU's name as a slug, or "cpu"."""
    device = torch.device(device)
    if device.type != "cuda":
        return device.type
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def results_path(bench: str, device: torch.device | str, out: Path | str | None = None, quick: bool = False) -> Path:
    """<out>/<bench>.jsonl; without ``out`` $OUT, else bench/results/<machine>, <machine>-quick for quick runs."""
    folder = out or os.environ.get("OUT")
    if not folder:
        folder = RESULTS / (machine_name(device) + ("-quick" if quick else ""))
    return Path(folder) / f"{bench}.jsonl"


def read(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a file, or of every .jsonl file under a folder. A last line cut short by a kill is left out."""
    path = Path(path)
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    rows = []
    for file in files:
        lines = read_lines(file)
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number < len(lines):
                    raise ValueError(f"{file}, line {number} is not JSON ({error}); remove or repair it.") from None
    return rows


def identity(row: Mapping[str, Any]) -> tuple:
    """What a row is about, hashable; fields that are not given have their default."""
    values = (row.get(name, FIELDS[name]) for name in IDENTITY)
    return tuple(tuple(value) if isinstance(value, list | tuple) else value for value in values)


class Recorder:
    """Appends rows to a file and knows which are there.

    Args:
        path: the .jsonl file, made with its folders at the first row.
        resume: rows of this revision, GPU and torch count as done; False measures everything again (rows are appended,
            and the last row of an identity is the one that counts).
        stamp: what :func:`stamp` returned; goes into every row.
    """

    def __init__(self, path: Path | str, resume: bool = True, stamp: Mapping[str, Any] | None = None):
        self.path, self.stamp = Path(path), dict(stamp or {})
        self._done: dict[tuple, dict[str, Any]] = {}
        if resume and self.path.exists():
            rows = (row for row in read(self.path) if self._same_run(row.get("stamp", {})))
            self._done = {identity(row): row for row in rows if not row.get("failed")}
        self._mend()

    def done(self, key: Mapping[str, Any]) -> bool:
        """Whether a row with the identity fields of ``key`` is there (missing fields: their defaults)."""
        return identity(key) in self._done

    def get(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row that makes ``key`` done, or None."""
        return self._done.get(identity(key))

    def add(self, **row: Any) -> dict[str, Any]:
        """Append a row, complete it with defaults and the stamp, and return it. ValueError for an unknown field unless
        it stands in ``extra``, a dict of what only one bench knows."""
        extra = row.pop("extra", {})
        unknown = set(row) - set(FIELDS)
        if unknown:
            raise ValueError(f"A row has no field {', '.join(sorted(unknown))}; put it into extra={{...}}.")
        full = {**FIELDS, **row, **extra, "stamp": self.stamp}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(full) + "\n")
        if not full["failed"]:
            self._done[identity(full)] = full
        return full

    def _same_run(self, other: Mapping[str, Any]) -> bool:
        return all(other.get(name) == self.stamp.get(name) for name in ("revision", "gpu", "torch", "cpu"))

    def _mend(self) -> None:
        """Drop a last line that a killed run left incomplete, so that the next row stands on a line of its own."""
        if not self.path.exists():
            return
        text = self.path.read_text()
        if text and not text.endswith("\n"):
            self.path.write_text(text[: text.rfind("\n") + 1])


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip().split("\n")[0]
