"""`reflow compare`: training runs and evaluations side by side."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from reflow.errors import UserError
from reflow.outputs import check_output


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="a training run's folder, a folder that `reflow evaluate` wrote, or a report.json; two or more"
    )
    parser.add_argument("--out", default="comparison", metavar="FOLDER", help="where the page is written (default: comparison)")


def run(args: argparse.Namespace) -> int:
    if len(args.paths) < 2:
        raise UserError(f"`reflow compare` puts two or more side by side, and {args.paths[0]} is one; name another run or evaluation.")
    out = Path(args.out)
    held = next((name for name in ("recipe.toml", "report.json") if (out / name).exists()), None)
    if held is not None:
        raise UserError(f"--out {out} is the folder of a run or of an evaluation (it holds {held}), whose page would be lost; choose another.")
    check_output(out)
    from reflow.evaluation.markup import shortened
    from reflow.evaluation.sides import opened, page, text
    from reflow.weights.files import make_folder

    sides = opened.open_sides(args.paths)
    make_folder(out)
    written = page.write(sides, shlex.join(map(shortened, ["reflow", *sys.argv[1:]])), out)
    print(text.described(sides))
    print(f"\nPage: {written}")
    return 0
