"""`reflow train`, also behind `deepspeed scripts/train.py`."""

from __future__ import annotations

import argparse

from reflow.errors import UserError
from reflow.outputs import check_output
from reflow.recipes import reading


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", required=True, help=f"a .toml file or one of: {', '.join(reading.available())}")
    parser.add_argument("--run-dir", help="where the run lives; the same command resumes it (default: runs/<recipe>)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override a key, for example --set stages.0.samples=20000; may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="print what the recipe will take, and stop")
    parser.add_argument("--resolved", action="store_true", help="of --dry-run: then print every key with its value")
    parser.add_argument("--allow-config-change", action="store_true", help="resume although algorithm keys changed")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    recipe = reading.load(args.recipe, args.overrides)
    if args.resolved and not args.dry_run:
        raise UserError("--resolved prints every key after the plan of --dry-run; add --dry-run, or use `reflow recipe NAME --resolved`.")
    if args.dry_run:
        from reflow.training import plan

        print(plan.describe(recipe))
        print(f"\n{reading.dump(recipe)}" if args.resolved else "\n--resolved prints every key of the recipe after this.")
        return 0
    from reflow.training.signals import Signals

    if not args.run_dir and ("/" in recipe.name or recipe.name in (".", "..")):
        raise UserError(f"The recipe's name '{recipe.name}' would lead out of runs/; give a --run-dir.")
    with Signals() as signals:  # before the imports, which take seconds
        from reflow.training import run as training

        run_dir = check_output(args.run_dir or f"runs/{recipe.name}", "--run-dir")
        return training.train(recipe, run_dir, allow_config_change=args.allow_config_change, signals=signals)
