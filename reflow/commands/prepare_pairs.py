"""`reflow prepare --pairs`: windows of a recipe's stage solved once, for `pairs_from` of this recipe and of others."""

from __future__ import annotations

import argparse
import pathlib

from reflow.commands.common import positive
from reflow.errors import UserError
from reflow.outputs import check_output


def arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--pairs", type=positive, metavar="COUNT", help="windows to solve; on many GPUs: torchrun --no-python reflow prepare ...")
    group.add_argument("--recipe", help="whose base, data, teacher and windows are used")
    group.add_argument("--stage", type=positive, default=1, help="of the recipe, counted from 1 (default: 1)")
    group.add_argument("--run-dir", help="where the stage before was trained, if the stage's teacher is 'previous'")
    group.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key of the recipe")


def run(args: argparse.Namespace) -> int:
    if args.recipe is None:
        raise UserError("--pairs solves windows of a recipe's stage; write --recipe NAME too.")
    from reflow.recipes import reading
    from reflow.training import solve_pairs

    recipe = reading.load(args.recipe, args.overrides)
    out = check_output(args.out)
    made = solve_pairs.solve(recipe, args.stage, args.pairs, out, pathlib.Path(args.run_dir) if args.run_dir else None)
    print(f"{made} solved windows of stage {args.stage} of recipe '{recipe.name}' in {out}")
    print(f"Train on them with --set stages.{args.stage - 1}.pairs_from={out}")
    return 0
