"""Experiments as lists of cells: settings and a seed in, one line of JSON out; what is there is not made again.

An experiment names its cells, makes a row of each, and turns the rows into a table and a picture. A row is kept as soon as it is made,
with the version of the sources that made it, so the same command goes on after an interruption and after new cells were added.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from reflow.errors import UserError
from reflow.evaluation import machine
from reflow.evaluation.intervals import Interval, t_interval
from reflow.experiments.store import elsewhere
from reflow.lines import read_lines
from reflow.outputs import write_text

Cell = dict[str, Any]
Row = dict[str, Any]


def make(path: Path, cells: Sequence[Cell], work: Callable[[Cell], dict[str, Any]], version: str, *, report: bool = False) -> list[Row]:
    """A row {cell, result, version, seconds} for each cell, in their order, from `path` (JSON lines) or made now by `work`.

    Rows of other versions and of cells that are no longer asked for stay in the file and are not returned. report: nothing is
    made; returned are the rows that are there, of settings whose seeds are all there. Raises UserError where the file is none of rows, and
    where there is none to report.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read(path)
    known = {(_key(row["cell"]), row["version"]): row for row in rows}
    missing = [cell for cell in cells if (_key(cell), version) not in known]
    if report:
        short = {_setting(cell) for cell in missing}
        there = [known[_key(cell), version] for cell in cells if _setting(cell) not in short]
        if not there:
            raise UserError(f"{path} has no setting with all its seeds of this version yet; give the command without --report first.")
        print(f"{len(missing)} of {len(cells)} cells are not there yet")
        return there
    began = time.monotonic()
    for n, cell in enumerate(missing):
        start = time.process_time()
        result = work(cell)
        row = {"cell": cell, "result": result, "version": version, "cpu_seconds": round(time.process_time() - start, 2)}
        known[_key(cell), version] = row
        rows.append(row)
        write_text(path, "".join(json.dumps(line) + "\n" for line in rows))
        left = (time.monotonic() - began) / (n + 1) * (len(missing) - n - 1)
        print(f"[{n + 1}/{len(missing)}] {described(cell)}: {row['cpu_seconds']:.1f} s, {left / 60:.0f} minutes left", flush=True)
    return [known[_key(cell), version] for cell in cells]


def seeded(settings: Iterable[Cell], seeds: int) -> list[Cell]:
    """Each setting with the seeds 0, 1, ... one after the other, so that students of one setting are trained together."""
    return [{**setting, "seed": seed} for setting in settings for seed in range(seeds)]


def read(path: Path) -> list[Row]:
    """The rows of a file, none where there is no file. Raises UserError for what is none of them."""
    try:
        rows = [json.loads(line) for line in read_lines(path)] if path.exists() else []
        if not all(isinstance(row, dict) and {"cell", "result", "version"} <= row.keys() for row in rows):
            raise ValueError("a line lacks its cell, result or version")
    except ValueError as error:
        raise UserError(f"{path} is not made of rows of an experiment ({error}); remove it, or give another --out.") from error
    return rows


def _key(cell: Cell) -> str:
    return json.dumps(cell, sort_keys=True)


def _setting(cell: Cell) -> str:
    return _key({key: value for key, value in cell.items() if key != "seed"})


def described(cell: Cell) -> str:
    return " ".join(f"{key}={value}" for key, value in cell.items())


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows whose cells have these values, by seed."""
    found = [row for row in rows if all(row["cell"].get(key) == value for key, value in wanted.items())]
    return sorted(found, key=lambda row: row["cell"].get("seed", 0))


def over_seeds(rows: Sequence[Row], value: Callable[[dict[str, Any]], float]) -> Interval:
    """Mean and 95 % interval over the training seeds of rows that differ in their seed alone."""
    seeds = [row["cell"]["seed"] for row in rows]
    assert len(set(seeds)) == len(seeds), f"{len(seeds)} rows of {len(set(seeds))} seeds"
    return t_interval([value(row["result"]) for row in rows])


def paired(rows: Sequence[Row], others: Sequence[Row], value: Callable[[dict[str, Any]], float]) -> Interval:
    """Of the difference rows - others, seed by seed."""
    mine, theirs = ({row["cell"]["seed"]: value(row["result"]) for row in group} for group in (rows, others))
    assert mine.keys() == theirs.keys(), f"seeds {sorted(mine)} against {sorted(theirs)}"
    return t_interval([mine[seed] - theirs[seed] for seed in sorted(mine)])


def told(interval: Interval, digits: int = 4, sign: bool = False) -> str:
    """As 0.0312 ± 0.0006, or the mean alone where a single seed has no interval and where no seed counts."""
    mean = f"{interval.mean:{'+' if sign else ''}.{digits}f}"
    return f"{mean} ± {interval.half_width:.{digits}f}" if interval.half_width and interval.half_width > 1e-9 else mean


def table(heads: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    rows = [f"| {' | '.join(map(str, line))} |" for line in (heads, ["---"] * len(heads), *lines)]
    return "\n".join(rows) + "\n"


def finish(path: Path, name: str, bed: str, rows: Sequence[Row], text: str, found: dict[str, Any], *, device: str = "") -> None:
    """Writes `path` (.json: what was found, command, seeds, revision, machine, versions, processor time) and .md beside it, and prints that.
    device: where it was computed, if that was asked."""
    seeds = sorted({row["cell"]["seed"] for row in rows if "seed" in row["cell"]})
    summary = {
        "experiment": name,
        "command": f"reflow experiment {name} --bed {bed} --seeds {len(seeds)}" + (f" --device {device}" if elsewhere(device) else ""),
        "seeds": seeds,
        "revision": revision(),
        **({"device": device} if device else {}),
        "version": rows[0]["version"] if rows else None,
        "cpu_seconds": round(sum(row.get("cpu_seconds", 0.0) for row in rows), 1),
        "found": found,
        **machine.describe(),
    }
    write_text(path, json.dumps(summary, indent=1) + "\n")
    write_text(path.with_suffix(".md"), text)
    print(f"\n{text}\nResults: {path}")


def revision() -> str | None:
    """Of the checkout that runs, "-dirty" where its files were changed; None from an installed package."""
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
