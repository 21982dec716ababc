"""The command line: arguments in, one clear sentence out when they are wrong.

Nothing heavy is imported here, so that help is quick; a command's module is imported only when it is asked for.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import time

import reflow
from reflow.errors import UserError
from reflow.quiet import quiet_libraries

# Each command's module has `arguments(parser)` and `run(args) -> exit code`.
COMMANDS = {
    "prepare": ("reflow.commands.prepare", "encode captioned images once to train on, or solve pairs once"),
    "train": ("reflow.commands.train", "train a recipe; the same command resumes"),
    "sample": ("reflow.commands.sample", "make images from prompts"),
    "evaluate": ("reflow.commands.evaluate", "measure a run's students against their teacher"),
    "export": ("reflow.commands.export", "write a run's student as a diffusers folder, a single file or delta weights"),
    "merge": ("reflow.commands.merge", "add delta weights to a base or a custom fine-tune"),
    "recipe": ("reflow.commands.recipe", "print a recipe as it stands, or with every key"),
    "experiment": ("reflow.commands.experiment", "reproduce a figure or table"),
    "env": ("reflow.commands.env", "say what this machine has and which backends would be used"),
}
START = """
A first run, on real handwritten digits (minutes on a CPU):
  reflow train --recipe digits-quick --run-dir runs/first
  reflow sample --run-dir runs/first --prompt "a handwritten seven"
  reflow evaluate --run-dir runs/first
  reflow export --run-dir runs/first --out first-student

`reflow COMMAND --help` tells a command's options.
"""


def main(argv: list[str] | None = None) -> None:
    """Entry of the `reflow` command and of scripts/train.py. Ends the process."""
    quiet_libraries()
    argv = sys.argv[1:] if argv is None else argv
    asked = command_of(argv)
    parser = build_parser(asked)
    if asked is not None and asked not in COMMANDS:
        near = difflib.get_close_matches(asked, COMMANDS, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        leave(fail(f"There is no command '{asked}'{hint}; the commands are: {', '.join(COMMANDS)}."))
    if not argv:
        parser.print_help(sys.stderr)
        leave(UserError.exit_code)
    args = parser.parse_args(argv)
    try:
        code = importlib.import_module(COMMANDS[args.command][0]).run(args)
    except UserError as error:
        code = fail(str(error))
    except KeyboardInterrupt:
        code = 130
    leave(code)


def command_of(argv: list[str]) -> str | None:
    """The command that these arguments name; None where they only ask for help."""
    return next((word for word in argv if not word.startswith("-")), None)


def build_parser(asked: str | None) -> argparse.ArgumentParser:
    """The parser; of the commands only the one that is asked for brings its options."""
    parser = argparse.ArgumentParser(
        prog="reflow",
        usage="reflow [-h] [--version] COMMAND [OPTION ...]",
        description="Turn diffusion models into 4-, 2- and 1-step models by progressive reflow.",
        epilog=START,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"reflow {reflow.__version__}")
    # The long metavar widens the column of the names.
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND, one of", prog="reflow")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name == asked:
            importlib.import_module(module).arguments(command)
    return parser


def fail(sentence: str) -> int:
    """Print the sentence once, by the first rank; the others give it time before the launcher ends everything."""
    if os.environ.get("RANK", "0") == "0":
        print(f"reflow: {sentence}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)
    return UserError.exit_code


def leave(code: int) -> None:
    """End without interpreter shutdown: DeepSpeed's stage 3 sometimes aborts there after all work is done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
