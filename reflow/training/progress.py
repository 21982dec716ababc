"""A progress bar of samples: stage, samples a second and time left."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """tqdm on rank 0, silent elsewhere. In a log file it prints a line every 20 seconds instead of redrawing."""

    def __init__(self, title: str, total: int, done: int, shown: bool) -> None:
        interval = 0.5 if sys.stderr.isatty() else 20.0
        self.bar = tqdm(total=total, initial=done, desc=title, unit=" samples", disable=not shown, mininterval=interval,
                        dynamic_ncols=True, smoothing=0.05)
        self.start, self.count = time.monotonic(), 0

    def advance(self, samples: int) -> None:
        self.count += samples
        self.bar.update(min(samples, self.bar.total - self.bar.n) if not self.bar.disable else 0)

    def rate(self) -> float:
        """Samples a second since the start."""
        return self.count / max(time.monotonic() - self.start, 1e-9)

    def show(self, **values: float) -> None:
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)

    def close(self) -> None:
        self.bar.close()
