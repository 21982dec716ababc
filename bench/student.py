"""``python -m bench student``: the student's half of a step against the published-style loop's, call by call in turn.

Forward, loss and backward on the digits' first batch of 32 (8 windows x 4 steps). On a machine that others use too only
ratios of neighbouring calls mean something, and of a process's own seconds: the median ratio with its bootstrapped 95 %
interval, of CPU and of wall-clock time. `no-op` is the network and its data alone.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

from bench import record
from bench.rig import Rig

SETTINGS = dict(windows=8, solver_steps=4, batch=32)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--label", default="", help="what is measured, for the row")
    parser.add_argument("--out", type=Path, help="a .jsonl file that gets the row too")


def main(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    rig = Rig("digits", torch.device("cpu"))
    ours, published = rig.ours(**SETTINGS), rig.published(**SETTINGS)
    noop = rig.ours("eager", "no-op", **SETTINGS)
    calls = {"published": rig.published_student(published, ours), "ours": ours.student, "no-op": noop.student}
    taken = in_turn(calls, arguments.rounds)
    found = {}
    for clock in ("cpu", "wall"):
        base = taken["published", clock]
        found[clock] = {
            f"published/{name}": ratio(base, taken[name, clock]) for name in calls if name != "published"
        } | {f"{name} ms": 1e3 * statistics.median(taken[name, clock]) for name in calls}
    row = {"measured": "student", "label": arguments.label, "rounds": arguments.rounds, **SETTINGS, **found}
    told(row, arguments.out)
    return 0


def in_turn(calls: dict, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of each call by (name, clock): all calls once a round, in an order drawn anew."""
    for call in calls.values():
        for _ in range(3):
            call()
    taken: dict[tuple[str, str], list[float]] = {(name, clock): [] for name in calls for clock in ("cpu", "wall")}
    for number in range(rounds):
        for name in random.Random(number).sample(list(calls), len(calls)):
            cpu, wall = time.process_time(), time.perf_counter()
            calls[name]()
            taken[name, "cpu"].append(time.process_time() - cpu)
            taken[name, "wall"].append(time.perf_counter() - wall)
    return taken


def ratio(above: list[float], below: list[float], draws: int = 2000) -> dict[str, float]:
    """Median of the pairs' ratios with the 95 % interval of a bootstrap over pairs."""
    ratios, chance = [a / b for a, b in zip(above, below, strict=True)], random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(draws))
    low, high = medians[int(0.025 * draws)], medians[int(0.975 * draws)]
    return {"median": statistics.median(ratios), "low": low, "high": high}


def told(row: dict, out: Path | None) -> None:
    """Print a row, and add it to a file with what it was measured on."""
    print(json.dumps(row, indent=1))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "a") as file:
            file.write(json.dumps({**row, "stamp": record.stamp("cpu")}) + "\n")
