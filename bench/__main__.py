"""``python -m bench COMMAND``: a command is a module with ``add_arguments(parser)`` and ``main(arguments) -> int``."""

from __future__ import annotations

import argparse
import importlib
import sys

from reflow.errors import UserError

# command -> (module, what it does); modules are imported only when their command runs.
COMMANDS = {
    "all": ("bench.everything", "the whole suite, the first questions first"),
    "ops": ("bench.ops", "the four ops against published, eager and compiled code"),
    "solver": ("bench.solver", "accuracy of a window's velocity: bf16 state against fp32 state"),
    "tail": ("bench.tail", "clipping, optimizer and EMA"),
    "launches": ("bench.launches", "kernel launches and host syncs of the ops"),
    "step": ("bench.step", "a training step in parts and as a whole against the published-style loop"),
    "host": ("bench.host", "host time of a call of an op, with the launch itself replaced by nothing; no GPU needed"),
    "student": ("bench.student", "the student's half of a step against the published-style loop's, call by call"),
    "startup": ("bench.startup", "seconds from a command to its first step, against plain diffusers"),
    "sample": ("bench.sample", "seconds an image at 1 to 32 steps"),
    "aot": ("bench.aot", "compile every kernel for NVIDIA and AMD targets, no GPU needed"),
    "report": ("bench.report", "write the README's blocks of numbers from bench/results/"),
    "compare": ("bench.compare", "two runs or two revisions side by side"),
}


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run one command; its return value is the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, purpose) in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        if argv[:1] == [name]:
            importlib.import_module(module).add_arguments(command)
    arguments = parser.parse_args(argv)
    try:
        return importlib.import_module(COMMANDS[arguments.command][0]).main(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
