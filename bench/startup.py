"""``python -m bench startup``: seconds from a command to its first optimizer step, of `reflow train` and of plain diffusers.

Both load the digits' pipeline from its folder, encode the digits and take one step of 128 samples (8 windows x 4 steps) in a new
process, in turn. `cold` is each one's first process of the series, in whatever page cache the machine has (nothing is
dropped, since others use it), `warm` those after it. CPU seconds are the process's own, which a busy machine shows too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.record import ROOT
from bench.student import told

RECIPE = """
name = "first-step"
[model]
family = "digits"
[train]
batch_size = 128
micro_batch = 64
[validate]
every = {every}
[log]
every = 128
[[stages]]
windows = 8
solver_steps = 4
samples = 12800
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="processes of each kind, the first of them cold")
    parser.add_argument("--label", default="", help="what is measured, for the rows")
    parser.add_argument("--out", type=Path, help="a .jsonl file that gets the rows too")


def main(arguments: argparse.Namespace) -> int:
    taken: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="reflow-bench-") as folder:
        for number in range(arguments.rounds):
            for name, every in (("reflow train", 12800), ("reflow train, without validation", 0), ("diffusers", None)):
                if every is None:
                    done = Path(folder, f"plain-{number}")
                    words = ["-m", "bench.startup_plain", str(done)]
                else:
                    run_dir, recipe = Path(folder, f"run-{number}-{every}"), Path(folder, f"{every}.toml")
                    recipe.write_text(RECIPE.format(every=every))
                    words = ["-m", "reflow", "train", "--recipe", str(recipe), "--run-dir", str(run_dir)]
                    done = run_dir / "log.jsonl"
                taken.setdefault(name, []).append(until(words, done))
    for name, times in taken.items():
        for state, part in (("cold", times[:1]), ("warm", times[1:])):
            for clock, seconds in (("wall", [wall for wall, _ in part]), ("cpu", [cpu for _, cpu in part])):
                if seconds:
                    spread = {"median": statistics.median(seconds), "low": min(seconds), "high": max(seconds)}
                    row = {"measured": "startup", "peer": name, "state": state, "clock": clock, "processes": len(part)}
                    told({**row, "seconds": spread, "label": arguments.label}, arguments.out)
    return 0


def until(words: list[str], done: Path) -> tuple[float, float]:
    """Wall and CPU seconds of a new Python process until the first optimizer step's line stands in `done`; then it is ended.

    Raises RuntimeError where it ends before.
    """
    start = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=said, stderr=said)
        while not (done.exists() and '"event": "train"' in done.read_text()):
            if process.poll() is not None:
                said.seek(0)
                raise RuntimeError(f"{' '.join(words)} ended before its first step: {said.read()[-500:].decode()}")
            time.sleep(0.01)
        wall = time.monotonic() - start
        process.kill()
        used = os.wait4(process.pid, 0)[2]
        process.returncode = -9  # it has been waited for
    return wall, used.ru_utime + used.ru_stime
