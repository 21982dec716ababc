"""`reflow experiment NAME`: a module of reflow/experiments, with a docstring and `run(out, *, option=default, ...)`.

The options of the command are the keyword arguments of that `run`, read from its source, so listing imports nothing.
A module without `run` but with `main()` parses its own arguments.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflow import experiments
from reflow.errors import UserError
from reflow.outputs import check_output
from reflow.recipes.reading import nearest

SAID = {"device": "cpu or cuda"}  # of options whose default says too little


@dataclass(frozen=True)
class Experiment:
    """What the source of an experiment says of itself. options: name -> default; None where `main` parses its own."""

    name: str
    module: str
    text: str
    options: dict[str, Any] | None


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="which one; without it, the list of them")
    parser.add_argument(
        "rest", nargs=argparse.REMAINDER, metavar="...", help="its options; `reflow experiment NAME --help` names them"
    )


def run(args: argparse.Namespace) -> int:
    known = available()
    if args.name is None:
        width = max(map(len, known))
        print("\n".join(f"{name.ljust(width)}  {found.text.splitlines()[0]}" for name, found in known.items()))
        return 0
    if args.name not in known:
        raise UserError(
            f"There is no experiment called '{args.name}'{nearest(args.name, list(known))}; "
            f"there are: {', '.join(known)}."
        )
    experiment = known[args.name]
    if experiment.options is None:
        sys.argv = [f"reflow experiment {experiment.name}", *args.rest]
        importlib.import_module(experiment.module).main()
        return 0
    chosen = vars(parser_of(experiment).parse_args(args.rest))
    importlib.import_module(experiment.module).run(check_output(chosen.pop("out")), **chosen)
    return 0


def available() -> dict[str, Experiment]:
    """All experiments by name, read from their sources."""
    found = {}
    for path in sorted(Path(experiments.__file__).parent.glob("[!_]*.py")):
        experiment = read(path)
        if experiment is not None:
            found[experiment.name] = experiment
    return dict(sorted(found.items()))


def read(path: Path) -> Experiment | None:
    """The experiment in a file; None if it has neither `run(out, ...)` nor `main()`. NAME = "..." renames it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    name = path.stem.replace("_", "-")
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "NAME":
            name = ast.literal_eval(node.value)
    text = ast.get_docstring(tree) or name
    module = f"{experiments.__name__}.{path.stem}"
    if "run" in functions and [a.arg for a in functions["run"].args.args][:1] == ["out"]:
        signature = functions["run"].args
        defaults = zip(signature.kwonlyargs, signature.kw_defaults, strict=True)
        return Experiment(name, module, text, {a.arg: ast.literal_eval(d) for a, d in defaults if d is not None})
    return Experiment(name, module, text, None) if "main" in functions else None


def parser_of(experiment: Experiment) -> argparse.ArgumentParser:
    """A parser with --out and an option for each keyword argument, of its default's type; a tuple may be repeated."""
    parser = argparse.ArgumentParser(
        prog=f"reflow experiment {experiment.name}",
        description=experiment.text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", default=f"runs/experiments/{experiment.name}", help="folder of the results (default: %(default)s)"
    )
    for name, default in experiment.options.items():
        option = "--" + name.rstrip("_").replace("_", "-")
        if isinstance(default, bool):
            parser.add_argument(option, dest=name, default=default, action=argparse.BooleanOptionalAction)
        elif isinstance(default, tuple):
            parser.add_argument(option, dest=name, default=list(default), action="append", help="may be repeated")
        else:
            said = f"{SAID[name]} (default: {default})" if name in SAID else f"default: {default}"
            parser.add_argument(option, dest=name, default=default, type=type(default), help=said)
    return parser
