"""What every bench shares: common options, the device, the budget, and one way to gate, time and record a cell."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import counting, gate, record, timing
from reflow.errors import UserError

WARM_UP_S = 10.0
QUICK_ROUNDS = 2
MODES = ("plain", "graph")
CACHES = ("warm", "cold")

_warmed: set[str] = set()


@dataclasses.dataclass
class Peer:
    """One way to do what a cell is about.

    run: a call without arguments. oracle: what it must return, None for a peer that computes nothing (an empty kernel).
    tolerance: allowed error, as in :mod:`bench.gate`, one or one for each tensor. capturable: False for a peer that
    syncs with the host. note: what a reader must know, e.g. that it keeps a bf16 state. read: the result to judge, by
    default what ``run`` returns. launches: False where counting a call is too expensive. why_absent: a peer that cannot
    run here, and why. setup: called before ``run`` is captured, on the stream of the capture (the forward of a
    backward-only peer). facts: from its times to what stands beside them in the row (samples a second, memory). trial:
    what the gate calls instead of ``run``: the same work on small operands made afresh, for peers that change theirs.
    """

    run: Callable[[], Any]
    oracle: Any = None
    tolerance: float | Sequence[float] = 0.0
    capturable: bool = True
    note: str = ""
    read: Callable[[], Any] | None = None
    launches: bool = True
    why_absent: str = ""
    setup: Callable[[], Any] | None = None
    facts: Callable[[timing.Times], dict[str, Any]] | None = None
    trial: Callable[[], Any] | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every measuring bench has."""
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds: exercises the code, no numbers")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no new cell after this many seconds")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: $OUT, else bench/results/<machine>")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-resume", dest="resume", action="store_false", help="measure again what is there already")


class Session:
    """A run of one bench. ``exit_code()`` is 1 where a peer failed the gate."""

    def __init__(self, bench: str, arguments: argparse.Namespace):
        self.bench, self.quick, self.seed = bench, arguments.quick, arguments.seed
        name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if name == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no CUDA GPU here; write --device cpu --quick to try the suite.")
        self.device = torch.device(name)
        self.rounds = QUICK_ROUNDS if self.quick else timing.ROUNDS
        self._deadline = math.inf if arguments.budget is None else time.monotonic() + arguments.budget
        path = record.results_path(bench, self.device, arguments.out, self.quick)
        self.recorder = record.Recorder(path, arguments.resume, record.stamp(self.device))
        self.stopwatch = timing.Stopwatch(self.device)
        self.failures: list[str] = []
        self._left_out = 0

    def left(self) -> float:
        """Seconds of the budget that are left, infinity without a budget."""
        return self._deadline - time.monotonic()

    def out_of_time(self) -> bool:
        """Whether the budget is spent; counts the cells that are left out for it."""
        spent = self.left() <= 0
        self._left_out += spent
        return spent

    def note(self, text: str = "") -> str:
        """The note of a row: on CPU quick runs it says that the row is no performance number."""
        if self.quick and self.device.type == "cpu":
            text = f"{record.NOT_A_NUMBER}; {text}" if text else record.NOT_A_NUMBER
        return text

    def key(self, **cell: Any) -> dict[str, Any]:
        """The identity of a row of this run."""
        common = {"bench": self.bench, "device": self.device.type, "seed": self.seed, "quick": self.quick}
        return common | cell

    def add(self, **row: Any) -> dict[str, Any]:
        """Record and print a row."""
        row["note"] = self.note(row.get("note", ""))
        full = self.recorder.add(**(self.key() | row))
        print(line(full), flush=True)
        return full

    def fail(self, where: str, why: str) -> None:
        self.failures.append(f"{where}: {why}")
        print(f"{where}: {why}", file=sys.stderr, flush=True)

    def measure(
        self,
        cell: Mapping[str, Any],
        peers: Callable[[], Mapping[str, Peer]],
        names: Sequence[str],
        *,
        modes: Sequence[str] = MODES,
        caches: Sequence[str] = CACHES,
        roofline_us: float | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Gate and time the peers of one cell in every mode and cache state that is not recorded yet.

        cell: its case, dtype and shape. peers: makes them, called only where something is left to do; names: what it
        will make, so that a finished cell costs nothing. A peer that fails the gate gets a row without times and makes
        the run exit 1.
        """
        wanted = [
            (mode, cache)
            for mode in modes
            for cache in caches
            if not all(self.recorder.done(self.key(**cell, peer=name, mode=mode, cache=cache)) for name in names)
        ]
        if not wanted or self.out_of_time():
            return
        self._warm_up()
        made = peers()
        if set(made) != set(names):
            raise ValueError(f"peers() made {sorted(made)}, names says {sorted(names)}")
        verdicts = {name: self._judge(cell, name, peer) for name, peer in made.items()}
        able = {name: peer for name, peer in made.items() if not verdicts[name].failure}
        counts = {name: self._count(name, peer) for name, peer in able.items()}
        for mode, cache in wanted:
            calls = {name: _marked(peer) for name, peer in able.items()}
            times = timing.compare(
                calls,
                device=self.device,
                rounds=self.rounds,
                graph=mode == "graph",
                cold=cache == "cold",
                budget_s=None if math.isinf(self._deadline) else max(self.left(), 0.0),
                count=1 if self.quick else None,
                stopwatch=self.stopwatch,
            )
            for name, peer in made.items():
                verdict, counted = verdicts[name], counts.get(name)
                found = times.get(name) or timing.Times(None, note=verdict.failure)
                fields = found.fields()
                fields["note"] = "; ".join(text for text in (found.note, peer.note) if text)
                self.add(
                    **cell,
                    **fields,
                    peer=name,
                    mode=mode,
                    cache=cache,
                    error=verdict.error,
                    deterministic=verdict.deterministic,
                    failed=verdict.failed,
                    launches=counted.launches if counted else None,
                    syncs=counted.syncs if counted else None,
                    roofline_us=roofline_us,
                    extra={**(extra or {}), **(peer.facts(found) if peer.facts else {})},
                )

    def _judge(self, cell: Mapping[str, Any], name: str, peer: Peer) -> gate.Verdict:
        if peer.why_absent:
            return gate.Verdict(None, None, f"skipped: {peer.why_absent}")
        if peer.oracle is None:
            return gate.Verdict(None, None)
        read = peer.read

        def run() -> Any:
            result = (peer.trial or peer.run)()
            return result if read is None else read()

        verdict = gate.judge(run, peer.oracle, peer.tolerance)
        if verdict.failed:
            where = f"{self.bench} {cell.get('case')} {cell.get('dtype')} {cell.get('shape')}, peer {name}"
            self.fail(where, verdict.failure)
        return verdict

    def _count(self, name: str, peer: Peer) -> counting.Counts | None:
        if not peer.launches:
            return None
        if self.device.type == "cpu" and name.startswith("compile"):
            return None  # under a dispatch mode dynamo gives a frame up for good, and later calls would run eagerly
        try:
            return counting.count(peer.run, self.device, warm=False)
        except Exception:  # noqa: BLE001 - a profiler that is not allowed here costs the count, not the time
            return None

    def _warm_up(self) -> None:
        if self.device.type not in _warmed and not self.quick:
            _warmed.add(self.device.type)
            timing.warm_up(self.device, min(WARM_UP_S, max(self.left() / 20, 1.0)))

    def exit_code(self) -> int:
        """Say what is missing; 1 where something failed the gate."""
        if self._left_out:
            print(f"{self.bench}: the budget was spent; {self._left_out} cells are left, the same command goes on.")
        print(f"{self.bench}: rows are in {self.recorder.path}")
        return int(bool(self.failures))


def _marked(peer: Peer) -> Callable[[], Any]:
    def call() -> Any:
        return peer.run()

    call.capturable, call.setup = peer.capturable, peer.setup
    return call


def line(row: Mapping[str, Any]) -> str:
    """A row as a line of text."""
    shape = "x".join(str(size) for size in row["shape"] or ())
    head = f"{row['bench']} {row['case']} {row['dtype'] or ''} {shape} {row['mode']}/{row['cache']} {row['peer']}"
    if row["median_us"] is None:
        return f"{head}: {row['note']}"[:240]
    text = f"{head}: {row['median_us']:.1f} us ({row['p20_us']:.1f} to {row['p80_us']:.1f}, {row['rounds']} rounds)"
    if row["error"] is not None:
        text += f", error {row['error']:.2g}"
    if row["unstable"]:
        text += ", unstable clocks"
    return text + (f" [{row['note']}]" if row["note"] else "")
