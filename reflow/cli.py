"""`reflow prepare | train | sample | evaluate | export | merge | experiment | env`: arguments in, one clear sentence out when they are wrong."""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib
import sys
import time

from reflow.errors import UserError
from reflow.quiet import quiet_libraries

# Each command's module has `arguments(parser)` and `run(args) -> exit code`; it is imported only when asked for.
COMMANDS = {
    "train": ("reflow.commands.train", "train a recipe; the same command resumes"),
    "sample": ("reflow.commands.sample", "make images from prompts"),
    "evaluate": ("reflow.commands.evaluate", "measure a run's students against their teacher"),
    "export": ("reflow.commands.export", "write a run's student as a diffusers folder, a single file or delta weights"),
    "merge": ("reflow.commands.merge", "add delta weights to a base or a custom fine-tune"),
    "experiment": ("reflow.commands.experiment", "reproduce a figure or table"),
    "env": ("reflow.commands.env", "say what this machine has and which backends would be used"),
}


def main(argv: list[str] | None = None) -> None:
    """Entry of the `reflow` command and of scripts/train.py. Ends the process."""
    quiet_libraries()
    parser = argparse.ArgumentParser(prog="reflow", description="Turn diffusion models into 4-, 2- and 1-step models by progressive reflow.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    argv = sys.argv[1:] if argv is None else argv
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if argv[:1] == [name]:
            importlib.import_module(module).arguments(command)
    args = parser.parse_args(argv)
    try:
        code = importlib.import_module(COMMANDS[args.command][0]).run(args)
    except UserError as error:
        code = fail(str(error))
    except KeyboardInterrupt:
        code = 130
    leave(code)


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


def new_folder(path: str, what: str) -> pathlib.Path:
    """A folder that does not exist yet or is empty. Raises UserError, so nothing is overwritten."""
    folder = pathlib.Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{what} {folder} exists already; give a new name or remove it first.")
    return folder


if __name__ == "__main__":
    main()
