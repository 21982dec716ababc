"""What a person who waits sees: a bar of samples with stage, samples a second and time left, and a line for what takes long before it."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

BEGAN = time.monotonic()


def say(what: str) -> None:
    """One line on rank 0's stderr before something that may take long, with the seconds since the process came here."""
    if os.environ.get("RANK", "0") == "0":
        print(f"[{time.monotonic() - BEGAN:6.1f} s] {what}", file=sys.stderr, flush=True)


class Rate:
    """Samples a second of training alone since the last reading; `with pause()` leaves out what is no training."""

    def __init__(self) -> None:
        self.start, self.count, self.paused = time.monotonic(), 0, 0.0

    def add(self, samples: int) -> None:
        self.count += samples

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.paused += time.monotonic() - start

    def read(self) -> float:
        now = time.monotonic()
        rate = self.count / max(now - self.start - self.paused, 1e-9)
        self.start, self.count, self.paused = now, 0, 0.0
        return rate


class Progress:
    """tqdm on rank 0, silent elsewhere. In a log file it prints a line every 20 seconds instead of redrawing."""

    def __init__(self, title: str, total: int, done: int, shown: bool) -> None:
        interval = 0.5 if sys.stderr.isatty() else 20.0
        self.bar = tqdm(total=total, initial=done, desc=title, unit=" samples", disable=not shown, mininterval=interval,
                        dynamic_ncols=True, smoothing=0.05)

    def advance(self, samples: int) -> None:
        self.bar.update(min(samples, self.bar.total - self.bar.n) if not self.bar.disable else 0)

    def show(self, **values: float) -> None:
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)

    def close(self) -> None:
        self.bar.close()
