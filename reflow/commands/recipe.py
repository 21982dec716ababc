"""`reflow recipe`: a recipe as it stands, or with every key. Both are TOML that `reflow train --recipe FILE` reads."""

from __future__ import annotations

import argparse

from reflow.errors import UserError
from reflow.recipes import reading


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a recipe that ships, or a .toml file; without one their names are listed")
    parser.add_argument("--resolved", action="store_true", help="every key with its value, without comments")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="of --resolved: override a key, as `reflow train` does; may be repeated")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if args.name is None:
        if args.resolved or args.overrides:
            raise UserError(f"Name the recipe to print: a .toml file or one of {', '.join(reading.available())}.")
        print("\n".join(reading.available()))
        return 0
    if args.overrides and not args.resolved:
        raise UserError("--set changes values that the recipe's own comments speak of; add --resolved, which prints keys alone.")
    recipe = reading.load(args.name, args.overrides)
    print(reading.dump(recipe) if args.resolved else reading.text_of(args.name)[0], end="")
    return 0
