"""SIGTERM, SIGUSR1 and a first Ctrl-C ask a run to leave: at once while it starts, with a checkpoint after a step once it trains.

torch is imported in the functions, since a run listens before that import, which takes seconds.
"""

from __future__ import annotations

import os
import signal
import time
from types import TracebackType

LEFT_EARLY = 75  # EX_TEMPFAIL: the same command goes on
# Ranks ask each other a second apart, and after at most so many steps, so that steps which grow slow on the way are no long silence either:
# whoever ends a job often gives it 30 s, of which a checkpoint takes its part.
ASK_S, MOST = 1.0, 8
ASKING = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]


class Signals:
    """The handlers of a run, in a `with` block that gives the old ones back at its end.

    Until `join` nothing needs saving, and a signal ends the process with exit code 75. After it the ranks agree over a CPU group, so
    that all of them leave after the same step: one rank after every step, several after every few quick ones (`ASK_S`).
    """

    def __init__(self) -> None:
        self.asked, self.group, self.before = False, None, {}

    def __enter__(self) -> Signals:
        for name in ASKING:
            # A job in a script's background ignores Ctrl-C, which is not meant for it.
            if name != signal.SIGINT or signal.getsignal(name) != signal.SIG_IGN:
                self.before[name] = signal.signal(name, self._ask)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def join(self, minutes: float) -> None:
        """The run is about to train, with a checkpoint due every so many minutes (0: never by the clock). All ranks call it."""
        import torch.distributed as dist

        self.minutes, self.saved_at, self.agreed_at = minutes, time.monotonic(), time.monotonic()
        self.group, self.steps, self.every = dist.new_group(backend="gloo"), 0, 1

    def _ask(self, number: int, _: object) -> None:
        self.asked = True
        if self.group is None:
            self._leave(signal.Signals(number).name)
        elif number == signal.SIGINT:
            # The system's handler, not Python's: a second Ctrl-C ends a rank that waits in a collective too.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if os.environ.get("RANK", "0") == "0":  # by os.write, since print may be what was interrupted
                os.write(2, b"\nInterrupted: leaving with a checkpoint after this step or a few; Ctrl-C again leaves at once, without one.\n")

    def _leave(self, name: str) -> None:
        """End the process here and now, as a kill would: an exception could be swallowed by whatever is being imported or loaded."""
        if os.environ.get("RANK", "0") == "0":
            os.write(2, f"\nAsked to leave ({name}) before the first step of this start; the same command goes on.\n".encode())
        os._exit(LEFT_EARLY)

    def after_step(self, at_once: bool) -> tuple[bool, bool]:
        """`agree` where it is time to, or `at_once`; between, (False, False). Every rank calls it after each step, with the same `at_once`."""
        self.steps += 1
        return self.agree() if at_once or self.steps >= self.every else (False, False)

    def agree(self) -> tuple[bool, bool]:
        """(leave, a checkpoint is due by the clock): the same answer on every rank."""
        import torch
        import torch.distributed as dist

        now = time.monotonic()
        due = bool(self.minutes) and dist.get_rank() == 0 and now - self.saved_at > 60 * self.minutes
        if dist.get_world_size() == 1:
            return self.asked, due
        flags = torch.tensor([self.asked, due, (now - self.agreed_at) / max(self.steps, 1)], dtype=torch.float64)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
        leave, save, seconds = flags.tolist()
        # The slowest rank's steps decide, by the same number on all of them.
        self.agreed_at, self.steps, self.every = now, 0, max(1, min(MOST, int(ASK_S / max(seconds, 1e-9))))
        return bool(leave), bool(save)
