"""SIGTERM, SIGUSR1 and a first Ctrl-C ask a run to leave: at once while it starts, with a checkpoint after this step once it trains.

torch is imported in the functions, since a run listens before that import, which takes seconds.
"""

from __future__ import annotations

import os
import signal
import time
from types import TracebackType

LEFT_EARLY = 75  # EX_TEMPFAIL: the same command goes on
ASKING = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]


class Signals:
    """The handlers of a run, in a `with` block that gives the old ones back at its end.

    Until `join` nothing needs saving, and a signal ends the process with exit code 75. After it the ranks agree over a CPU group, so
    that all of them leave after the same step.
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

        self.minutes, self.saved_at = minutes, time.monotonic()
        self.group = dist.new_group(backend="gloo")

    def _ask(self, number: int, _: object) -> None:
        self.asked = True
        if self.group is None:
            self._leave(signal.Signals(number).name)
        elif number == signal.SIGINT:
            # The system's handler, not Python's: a second Ctrl-C ends a rank that waits in a collective too.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if os.environ.get("RANK", "0") == "0":  # by os.write, since print may be what was interrupted
                os.write(2, b"\nInterrupted: leaving with a checkpoint after this step; Ctrl-C again leaves at once, without one.\n")

    def _leave(self, name: str) -> None:
        """End the process here and now, as a kill would: an exception could be swallowed by whatever is being imported or loaded."""
        if os.environ.get("RANK", "0") == "0":
            os.write(2, f"\nAsked to leave ({name}) before the first step of this start; the same command goes on.\n".encode())
        os._exit(LEFT_EARLY)

    def agree(self) -> tuple[bool, bool]:
        """(leave, a checkpoint is due by the clock): the same answer on every rank."""
        import torch
        import torch.distributed as dist

        due = bool(self.minutes) and dist.get_rank() == 0 and time.monotonic() - self.saved_at > 60 * self.minutes
        flags = torch.tensor([int(self.asked), int(due)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
        return bool(flags[0]), bool(flags[1])
