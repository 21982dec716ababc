"""Memory of trainings over 5,000 steps: what a process holds must not grow with the steps that it has taken.

Each trial is one command in a process of its own, which notes after every 20 steps the anonymous memory that the system counts for it. The slope
is that of the last four fifths: the first holds what is made once (kernels, pools, the first checkpoint, torch's record of its last
2,000 collectives).
"""

from __future__ import annotations

import ctypes
import gc
import json
import pathlib
import re
import sys
from collections.abc import Callable

import numpy as np
import nursery

import tiny

TITLE = "trainings of 5,000 steps whose memory does not grow"
STEPS, EVERY = 5_000, 20
LIMIT = 1_024  # bytes a step
BATCH = 4
# Validation, checkpoints and the log come as often as in a long run of some hours.
COMMON = (f"train.batch_size={BATCH}", f"train.micro_batch={BATCH}", "validate.every=2000", "checkpoint.every=2000", "log.every=80", "validate.pairs=2")
KINDS = {
    "solver beside the student": (),
    "stored pairs": ("stages.0.pairs=64",),
    "trajectory starts": ("objective.starts=noise",),
    "ZeRO 2, bf16": ("train.zero_stage=2", "train.precision=bf16"),
    "ZeRO 3, offload": ("train.zero_stage=3", "train.offload=true"),
    "LoRA": ("model.lora_rank=2",),
    "samples that are not finite": ("train.max_nonfinite=1000000",),
}
CASES = len(KINDS)


class Watch:
    """Counts steps and notes memory after each `every`-th: rows of (step, bytes)."""

    def __init__(self, every: int, memory: Callable[[], int]) -> None:
        self.every, self.memory, self.steps, self.rows = every, memory, 0, list[tuple[int, int]]()

    def step(self) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            self.rows.append((self.steps, self.memory()))

    def slope(self, skip: float = 0.2) -> float:
        """Bytes a step, without the first share of the rows: the median slope of all pairs, which one thing made early or late does not move."""
        steps, held = np.array(self.rows[int(skip * len(self.rows)):], dtype=float).T
        first, second = np.triu_indices(len(steps), 1)
        return float(np.median((held[second] - held[first]) / (steps[second] - steps[first])))


def held() -> int:
    """Anonymous memory of this process, bytes, as the system counts it: whole pages, with what allocators keep for later."""
    return int(re.search(r"Anonymous:\s+(\d+)", pathlib.Path("/proc/self/smaps_rollup").read_text())[1]) * 1024


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def asked_for() -> int:
    """Bytes in use by glibc's malloc and by Python's objects (counted at 64 each): no pages, so that some hundred steps tell."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd + 64 * sys.getallocatedblocks()


def watch_steps(watch: Watch) -> Callable[[], None]:
    """Let the loop tell the watch of every step; returns what undoes it."""
    from reflow.training.ema import Ema

    update = Ema.update

    def updated(self, *args, **words):
        update(self, *args, **words)
        watch.step()

    Ema.update = updated
    return lambda: setattr(Ema, "update", update)


def words(folder: pathlib.Path, settings: tuple[str, ...], steps: int) -> list[str]:
    recipe = folder / "tiny.toml"
    recipe.write_text(tiny.TINY)
    settings = (*COMMON, f"stages.0.samples={steps * BATCH}", f"stages.1.samples={BATCH}", *settings)
    return ["train", "--recipe", str(recipe), "--run-dir", str(folder / "run"), *(word for s in settings for word in ("--set", s))]


def child(text: str, rows: str, spoil: bool) -> None:
    watch = Watch(EVERY, held)
    watch_steps(watch)
    if spoil:
        spoil_latents()
    from reflow import cli

    leave = cli.leave

    def leaving(code: int) -> None:
        pathlib.Path(rows).write_text(json.dumps(watch.rows))
        leave(code)

    cli.leave = leaving
    nursery.work(text)


def spoil_latents() -> None:
    """Every thirtieth sample of the digits is NaN."""
    from reflow.training import run

    encode = run.encode_digits

    def spoilt(base):
        data = encode(base)
        data.latents[::30] = float("nan")
        return data

    run.encode_digits = spoilt


def trial(index: int, folder: pathlib.Path) -> dict:
    kind = list(KINDS)[index]
    nursery.ready()
    said, rows = folder / "said", folder / "rows.json"
    job = {"words": words(folder, KINDS[kind], STEPS), "environment": {}, "said": str(said), "changes": None}
    process = nursery.CONTEXT.Process(target=child, args=(json.dumps(job), str(rows), "not finite" in kind))
    process.start()
    process.join()
    result = {"kind": kind, "failed": None}
    if process.exitcode != 0:
        return result | {"failed": f"exit code {process.exitcode}: {said.read_text(errors='replace')[-400:]}"}
    watch = Watch(EVERY, held)
    watch.rows = [tuple(row) for row in json.loads(rows.read_text())]
    slope = round(watch.slope(), 1)
    result |= {"steps": watch.rows[-1][0], "bytes_a_step": slope, "mebibytes": round(watch.rows[-1][1] / 2**20, 1)}
    if result["steps"] < STEPS:
        return result | {"failed": f"it took {result['steps']} steps"}
    return result | {"failed": None if slope < LIMIT else f"memory grows by {slope} bytes a step"}
