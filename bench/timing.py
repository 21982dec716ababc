"""Peers timed against each other in one process: interleaved, order flipped every round (ABBA), medians with p20/p80.

Three modes: a plain call (what an eager trainer feels: launches and Python included), the same inside a CUDA graph, and
either with a cold L2, where a buffer larger than the cache is overwritten before every call. Nothing is subtracted;
an empty-kernel peer shows the floor. Never compare times of two processes.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bench import clocks

ROUNDS = 20
DRIFT = 0.03  # clocks of the peers of a cell may differ by this much
ATTEMPTS = 3
FLUSH_BYTES = 256 * 2**20  # five times the L2 of an H200
UNROLL = 32  # calls in a warm graph
SLOW_S = 10.0  # what takes longer than this says how long, so that a long cell is not silent
Call = Callable[[], Any]


@dataclasses.dataclass
class Times:
    """Microseconds a call. ``median_us`` is None where nothing was measured, and ``note`` says why.

    ``host_us`` is what the host took to ask for a call, of calls one after the other on a GPU; else None.
    """

    median_us: float | None
    p20_us: float | None = None
    p80_us: float | None = None
    host_us: float | None = None
    rounds: int = 0
    unstable: bool = False
    clocks: dict[str, Any] | None = None
    note: str = ""

    def fields(self) -> dict[str, Any]:
        """The fields of a row that come from here."""
        return dataclasses.asdict(self)


class Stopwatch:
    """Times calls on a device: CUDA events on a GPU, the process's clock elsewhere."""

    def __init__(self, device: torch.device | str, flush_bytes: int = FLUSH_BYTES):
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.read_clock, self.clock_source = clocks.reader(self.device)
        self._flush_bytes, self._buffer = flush_bytes, None
        self.host_us: float | None = None  # of the last calls that were timed on a GPU

    def time(self, call: Call, count: int, cold: bool) -> tuple[float, float | None]:
        """(microseconds a call over ``count`` calls, SM clock in MHz or None). Cold: every call is timed alone."""
        if cold:
            pairs = [self._between(call, 1, flush=True) for _ in range(count)]
            return statistics.fmean(pair[0] for pair in pairs), pairs[-1][1]
        return self._between(call, count, flush=False)

    def _between(self, call: Call, count: int, flush: bool) -> tuple[float, float | None]:
        if flush:
            self.flush()
        if not self.cuda:
            started = time.perf_counter()
            for _ in range(count):
                call()
            return (time.perf_counter() - started) / count * 1e6, None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        started = time.perf_counter()
        for _ in range(count):
            call()
        self.host_us = (time.perf_counter() - started) / count * 1e6
        end.record()
        clock = self.read_clock()  # while the work is in flight
        end.synchronize()
        return start.elapsed_time(end) / count * 1e3, clock

    def flush(self) -> None:
        """Fill the cache with something else."""
        if self._buffer is None:
            size = self._flush_bytes if self.cuda else min(self._flush_bytes, 2**23)
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._buffer.zero_()

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)


def compare(
    peers: Mapping[str, Call],
    *,
    device: torch.device | str,
    rounds: int = ROUNDS,
    graph: bool = False,
    cold: bool = False,
    budget_s: float | None = None,
    count: int | None = None,
    target_us: float = 2000.0,
    stopwatch: Stopwatch | None = None,
) -> dict[str, Times]:
    """Time peers against each other.

    Args:
        peers: name -> call without arguments. A call with the attribute ``capturable = False`` (it syncs with the host)
            has no time inside a graph.
        rounds: every round times every peer once, in the given order and in the reverse order by turns.
        graph: capture the call in a CUDA graph and time replays (warm: 32 calls a graph). On a CPU no peer gets a time.
        cold: overwrite the L2 cache before every call.
        budget_s: stop after this many seconds at the end of a pair of rounds, with a note where rounds are missing.
        count: calls a round; by default as many as take ``target_us``.
        stopwatch: what times calls; tests give their own.

    Returns:
        name -> Times. Clocks that differ by more than 3 % between peers have the cell measured again; after three
        times ``unstable`` is set. A peer whose call or capture fails has no time and a note.
    """
    stopwatch = stopwatch or Stopwatch(device)
    result = {}
    if graph and not stopwatch.cuda:
        return {name: Times(None, note="skipped: CUDA graphs need a GPU") for name in peers}
    calls: dict[str, tuple[Call, int, int]] = {}  # call, how many times a round, op calls in one of them
    for name, call in peers.items():
        started = time.monotonic()
        try:
            calls[name] = _prepared(call, stopwatch, graph, cold, count, target_us)
        except Exception as error:  # noqa: BLE001 - the other peers are still measured
            stopwatch.wait()
            text = str(error).strip().split("\n")[0]
            result[name] = Times(None, note=f"skipped: {text if isinstance(error, _Skip) else repr(error)}"[:300])
        _told(f"{name} is ready", started)
    deadline = math.inf if budget_s is None else time.monotonic() + budget_s
    for attempt in range(1, ATTEMPTS + 1):  # noqa: B007 - how many it took is reported
        samples, speeds, asked = _rounds(calls, stopwatch, rounds, cold, deadline)
        drift = _drift(speeds)
        if drift <= DRIFT or time.monotonic() > deadline:
            break
    for name, values in samples.items():
        low, middle, high = quantiles(values)
        seen = speeds[name]
        clock = {"sm_mhz": statistics.median(seen), "drift": round(drift, 4)} if seen else {}
        clock |= {"source": stopwatch.clock_source, "attempts": attempt}
        note = "" if len(values) >= rounds else f"{len(values)} of {rounds} rounds: the budget was spent"
        host = statistics.median(asked[name]) if asked[name] and not graph else None
        result[name] = Times(middle, low, high, host, len(values), drift > DRIFT, clock, note)
    return {name: result[name] for name in peers}


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(p20, median, p80), linear between neighbours."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return at(0.2), at(0.5), at(0.8)


def warm_up(device: torch.device | str, seconds: float) -> None:
    """Keep the GPU busy until its clocks are steady; nothing on a CPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return
    matrix = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for _ in range(50):
            matrix @ matrix
        torch.cuda.synchronize(device)


class _Skip(Exception):
    """A peer that has no time in this mode, and why."""


def _prepared(call: Call, stopwatch: Stopwatch, graph: bool, cold: bool, count: int | None, target_us: float):
    if graph and not getattr(call, "capturable", True):
        raise _Skip("it syncs with the host, so it cannot be captured")
    for _ in range(1 if count == 1 else 3):
        call()
    stopwatch.wait()
    unroll = 1
    if graph:
        unroll = 1 if cold else UNROLL
        call = captured(call, unroll)
        call()
        stopwatch.wait()
    if count is None:
        estimate, _ = stopwatch.time(call, 1, False)
        count = max(1, min(int(target_us / max(estimate, 0.1)), 10 if cold else 200))
    return call, count, unroll


def captured(call: Call, unroll: int = 1) -> Call:
    """A replay of ``unroll`` calls captured in one CUDA graph. The calls were run before, so nothing is compiled now.

    ``call.setup``, where there is one, runs on the stream of the capture first: a backward runs where its forward ran.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        if getattr(call, "setup", None) is not None:
            call.setup()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(unroll):
            call()
    return graph.replay


def _rounds(calls, stopwatch: Stopwatch, rounds: int, cold: bool, deadline: float):
    samples: dict[str, list[float]] = {name: [] for name in calls}
    speeds: dict[str, list[float]] = {name: [] for name in calls}
    asked: dict[str, list[float]] = {name: [] for name in calls}
    if not calls:
        return samples, speeds, asked
    for number in range(rounds):
        if number >= 2 and number % 2 == 0 and time.monotonic() > deadline:
            break
        started = time.monotonic()
        names = list(calls) if number % 2 == 0 else list(reversed(calls))
        for name in names:
            call, count, unroll = calls[name]
            microseconds, clock = stopwatch.time(call, count, cold)
            samples[name].append(microseconds / unroll)
            if clock is not None:
                speeds[name].append(clock)
            if getattr(stopwatch, "host_us", None) is not None:
                asked[name].append(stopwatch.host_us)
        _told(f"round {number + 1} of at most {rounds} is done", started)
    return samples, speeds, asked


def _told(what: str, started: float) -> None:
    """Say on stderr how long something took, where it was long."""
    seconds = time.monotonic() - started
    if seconds > SLOW_S:
        print(f"  {what} after {seconds:.0f} s", file=sys.stderr, flush=True)


def _drift(speeds: Mapping[str, list[float]]) -> float:
    """How much faster the fastest peer's clock was than the slowest's, as a share."""
    middles = [statistics.median(values) for values in speeds.values() if values]
    return max(middles) / min(middles) - 1.0 if len(middles) > 1 else 0.0
