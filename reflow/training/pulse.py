"""Ranks that watch each other: one that is stopped or gone ends the others with its name, where they would wait for it for ever.

A slow rank is waited for. The beats are files in the run directory, which all nodes share, and come from a process beside each rank, so that
neither a long computation nor a long write looks like a death.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
from types import TracebackType

import torch.distributed as dist

from reflow.training import beat

FOLDER = ".ranks"


class Pulse:
    """Watches the other ranks of a run in a `with` block. patience: seconds that one may be silent, stopped or gone (0: for ever)."""

    def __init__(self, run_dir: pathlib.Path, patience: int) -> None:
        self.folder, self.rank, self.world, self.patience = run_dir / FOLDER, dist.get_rank(), dist.get_world_size(), patience
        self.ending, self.beat = threading.Event(), None

    def __enter__(self) -> Pulse:
        if self.world > 1 and self.patience:
            self.folder.mkdir(exist_ok=True)
            self.beat = subprocess.Popen([sys.executable, "-I", "-S", beat.__file__, str(self.folder / str(self.rank)), str(os.getpid())],
                                         stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            threading.Thread(target=self._watch, daemon=True, name="pulse").start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.ending.set()
        if self.beat is not None:
            self.beat.kill()
            self.beat.wait()
            for left in (str(self.rank), f"{self.rank}.tmp"):
                (self.folder / left).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the others' beats
                self.folder.rmdir()

    def _watch(self) -> None:
        """Once a second, by turns of this loop and not by a clock, which goes on where a whole job is suspended."""
        silent, heard = dict.fromkeys(range(self.world), 0), {}
        while not self.ending.wait(1):
            for other in range(self.world):
                told = self._told(other)
                fresh = told.get("state") == "runs" and told["count"] != heard.get(other, {}).get("count")
                silent[other], heard[other] = (0, told) if fresh else (silent[other] + 1, {**heard.get(other, {}), **told})
                if other != self.rank and silent[other] >= self.patience and not self.ending.is_set():
                    self._end(other, heard[other], silent[other])

    def _told(self, rank: int) -> dict[str, object]:
        try:
            told = json.loads((self.folder / str(rank)).read_text())
            return told if isinstance(told, dict) and "count" in told else {}
        except (OSError, ValueError):
            return {}

    def _end(self, other: int, heard: dict[str, object], seconds: int) -> None:
        """By os._exit: this rank's own thread waits in a collective that never ends."""
        what = {"stopped": "is stopped (by a signal, a debugger or a scheduler)", "gone": "is gone"}.get(str(heard.get("state")), "is not heard")
        where = f" (process {heard['process']} on {heard['host']})" if heard.get("host") else ""
        print(f"\nreflow: rank {other}{where} {what} for {seconds} s, and rank {self.rank} would wait for it for ever; it ends too. See to that "
              f"machine, then give the same command again: it goes on from the last checkpoint (train.rank_patience).", file=sys.stderr, flush=True)
        os._exit(1)


def sweep(run_dir: pathlib.Path) -> None:
    """Take away the beats of ranks that were killed."""
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
