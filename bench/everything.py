"""``python -m bench all``: the whole suite, so ordered that a short budget answers the first questions.

SDXL's loss, the step op, accuracy of the solver, the whole training step, the tail, then the rest. A phase gets a share
of what is left of the budget; what it does not use goes to the next. The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import time

from bench import session

# (command line of a phase, share of the remaining budget)
PHASES = (
    ("ops --op aligned_v_loss --family sdxl", 0.25),
    ("ops --op guided_step --family sdxl", 0.2),
    ("solver", 0.25),
    ("step", 0.6),
    ("tail", 0.4),
    ("launches", 0.5),
    ("ops", 0.6),
    ("sample", 1.0),
)
# A quick run has one tiny shape, so each command runs once.
QUICK = ("ops", "solver", "step", "tail", "launches", "sample")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    session.add_options(parser)


def main(arguments: argparse.Namespace) -> int:
    from bench.__main__ import COMMANDS
    from bench.__main__ import main as run

    deadline = math.inf if arguments.budget is None else time.monotonic() + arguments.budget
    phases = [(command, 1.0) for command in QUICK] if arguments.quick else PHASES
    phases = [(line, share) for line, share in phases if line.split()[0] in COMMANDS]
    codes = {}
    for line, share in phases:
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"all: the budget was spent before '{line}'; the same command goes on.")
            continue
        started = time.monotonic()
        print(f"== {line}", flush=True)
        codes[line] = run([*line.split(), *_options(arguments, left * share)])
        print(f"== {line}: {time.monotonic() - started:.0f} s, exit code {codes[line]}", flush=True)
    failed = [line for line, code in codes.items() if code]
    if failed:
        print(f"all: {', '.join(failed)} failed; the lines above say why.")
    return int(bool(failed))


def _options(arguments: argparse.Namespace, seconds: float) -> list[str]:
    """The common options, handed on."""
    options = ["--seed", str(arguments.seed)]
    if arguments.device:
        options += ["--device", arguments.device]
    if arguments.out:
        options += ["--out", str(arguments.out)]
    if math.isfinite(seconds):
        options += ["--budget", f"{seconds:.1f}"]
    return options + ["--quick"] * arguments.quick + ["--no-resume"] * (not arguments.resume)
