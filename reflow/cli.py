"""The command line: arguments in, one clear sentence out when they are wrong.

Nothing heavy is imported here, so that help is quick; a command's module is imported only when it is asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import os
import re
import sys
import tempfile
import time
import traceback

import reflow
from reflow import outputs
from reflow.errors import UserError, printable, short
from reflow.quiet import quiet_libraries

# Each command's module has `arguments(parser)` and `run(args) -> exit code`.
COMMANDS = {
    "prepare": ("reflow.commands.prepare", "encode captioned images once to train on, or solve pairs once"),
    "train": ("reflow.commands.train", "train a recipe; the same command resumes"),
    "sample": ("reflow.commands.sample", "make images from prompts"),
    "evaluate": ("reflow.commands.evaluate", "measure a run's students against their teacher"),
    "compare": ("reflow.commands.compare", "put runs and evaluations side by side"),
    "export": ("reflow.commands.export", "write a run's student as a diffusers folder, a single file or delta weights"),
    "merge": ("reflow.commands.merge", "add delta weights to a base or a custom fine-tune"),
    "recipe": ("reflow.commands.recipe", "print a recipe as it stands, or with every key"),
    "experiment": ("reflow.commands.experiment", "reproduce a figure or table"),
    "env": ("reflow.commands.env", "say what this machine has and which backends would be used"),
}
# How gloo and NCCL tell that a process at the other end is gone.
LOST = re.compile(r"closed by peer|reset by peer|remote process exited|peer went away", re.IGNORECASE)
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
    for stream in (sys.stdout, sys.stderr):  # a name that is no UTF-8 is printed with its bytes written out
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv or bool(os.environ.get("REFLOW_DEBUG"))
    argv = [word for word in argv if word != "--debug"]
    asked = command_of(argv)
    parser = build_parser(asked)
    if asked is not None and asked not in COMMANDS:
        near = difflib.get_close_matches(short(asked), COMMANDS, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        leave(fail(f"There is no command '{short(asked)}'{hint}; the commands are: {', '.join(COMMANDS)}."))
    if not argv:
        parser.print_help(sys.stderr)
        leave(UserError.exit_code)
    args = parser.parse_args(argv)
    try:
        code = importlib.import_module(COMMANDS[args.command][0]).run(args)
    except Exception as error:  # noqa: BLE001 - every error ends here as a sentence
        code = told(error, debug)
    except KeyboardInterrupt:
        module = sys.modules.get(COMMANDS[args.command][0])
        print(f"\nreflow: interrupted; {getattr(module, 'INTERRUPTED', 'nothing more is written')}.", file=sys.stderr)
        code = 130
    leave(code)


def told(error: Exception, debug: bool) -> int:
    """The exit code of an error that has been said: 2 for a user's mistake, 1 for the machine's and for our own."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, UserError):
        return fail(str(error))
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed has no reader
        return 141
    system = outputs.of_the_system(error)
    if system is not None and not isinstance(error, ImportError):
        return say(outputs.sentence(system), 1)
    if type(error).__name__ == "OutOfMemoryError":
        return say(
            f"the GPU's memory is used up ({str(error).splitlines()[0].strip()}). Train with a smaller train.micro_batch or "
            "model.gradient_checkpointing = true (`reflow train --dry-run` says what fits); sample with a smaller --batch-size.",
            1,
        )
    if isinstance(error, RuntimeError) and LOST.search(str(error)):
        return say("another rank of this run ended and left this one alone; what it said is the cause.", 1)
    return say(f"{unexpected(error)} {kept(error, debug)}", 1)


def unexpected(error: Exception) -> str:
    """An error that no sentence was written for: its kind, its text and the place in our own code."""
    ours = os.path.dirname(os.path.abspath(reflow.__file__))
    frames = traceback.extract_tb(error.__traceback__)
    place = next((f for f in reversed(frames) if f.filename.startswith(ours)), frames[-1] if frames else None)
    where = f" at {os.path.relpath(place.filename, os.path.dirname(ours))}:{place.lineno}" if place else ""
    text = " ".join(str(error).split())[:300]
    return f"an error that should not happen{where}: {type(error).__name__}{f': {text}' if text else ''}."


def kept(error: Exception, debug: bool) -> str:
    """Where the traceback is. It is kept in a file, since a run of days is not repeated to see it."""
    report = "Please report it to the project's maintainers with"
    if debug:
        return f"{report} the traceback above and what `reflow env` prints."
    try:
        with tempfile.NamedTemporaryFile("w", prefix="reflow-error-", suffix=".txt", delete=False, encoding="utf-8") as file:
            traceback.print_exception(error, file=file)
    except OSError:
        traceback.print_exception(error)
        return f"{report} the traceback above and what `reflow env` prints."
    return f"{report} {file.name}, which holds the traceback (--debug prints it), and what `reflow env` prints."


def command_of(argv: list[str]) -> str | None:
    """The command that these arguments name; None where they only ask for help."""
    return next((word for word in argv if not word.startswith("-")), None)


def build_parser(asked: str | None) -> argparse.ArgumentParser:
    """The parser; of the commands only the one that is asked for brings its options."""
    parser = argparse.ArgumentParser(
        prog="reflow",
        usage="reflow [-h] [--version] [--debug] COMMAND [OPTION ...]",
        description="Turn diffusion models into 4-, 2- and 1-step models by progressive reflow.",
        epilog=START,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error; anywhere in the command")
    parser.add_argument("--version", action="version", version=f"reflow {reflow.__version__}")
    # The long metavar widens the column of the names.
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND, one of", prog="reflow")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name == asked:
            importlib.import_module(module).arguments(command)
    return parser


def fail(sentence: str) -> int:
    """Print the sentence once, by the first rank. The others give it time, before the launcher ends everything; where
    nothing ends them the mistake was met by this rank alone, which then says it."""
    if os.environ.get("RANK", "0") == "0":
        close_bars()
        print(f"reflow: {printable(sentence)}", file=sys.stderr, flush=True)
        return UserError.exit_code
    time.sleep(3)
    return say(sentence, UserError.exit_code)


def say(sentence: str, code: int) -> int:
    """Print a sentence of this rank alone: a disk, a GPU or a fault may be one rank's."""
    close_bars()
    rank = os.environ.get("RANK")
    of_rank = f" (rank {rank})" if rank is not None and os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(f"reflow{of_rank}: {printable(sentence)}", file=sys.stderr, flush=True)
    return code


def close_bars() -> None:
    """End the lines of all progress bars that an error left open, ours and the libraries', so that what is said next starts on its own."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            with contextlib.suppress(Exception):  # a terminal that went away
                bar.close()


def leave(code: int) -> None:
    """End without interpreter shutdown: DeepSpeed's stage 3 sometimes aborts there after all work is done."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a reader that went away
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
