"""`reflow evaluate`: few-step models against their teacher: the students of a run, or pipelines of any make."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflow.commands import compared, comparing
from reflow.errors import UserError
from reflow.outputs import check_output

if TYPE_CHECKING:
    from reflow.evaluation.runs import Run
    from reflow.evaluation.suite import Settings


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-dir", help="the folder that training wrote: its teacher and the student of each stage")
    parser.add_argument(
        "--pipeline", action=compared.Model, metavar="PATH", help="a model of any make: a diffusers folder or a single file; may be repeated"
    )
    parser.add_argument(
        "--guidance",
        type=compared.scale,
        action=compared.OfModel,
        nargs="+",
        metavar="SCALE",
        help="of a run's teacher and its students that have learnt none, each of several with a report of its own for digits; of pipelines each "
        "of several (default: none, or what a model is made for)",
    )
    parser.add_argument("--out", help="folder of the report (default: report/ in the run directory, evaluation/ for pipelines)")
    parser.add_argument(
        "--again", action="store_true", help="measure again although the report of these weights is there"
    )
    parser.add_argument("--device", help="of a digits run: cpu or cuda (default: the GPU where there is one)")
    compared.arguments(parser)
    group = parser.add_argument_group("the digits models, whose measures are features of the digits")
    group.add_argument(
        "--samples",
        type=int,
        default=1797,
        help="images for each method and sampling seed (default: 1797, as many as there are real scans)",
    )
    group.add_argument("--seeds", type=int, default=3, help="sampling seeds; two or more give intervals (default: 3)")
    group.add_argument(
        "--unequal-sets",
        action="store_true",
        help="allow more samples than real scans; the Fréchet distance then has another bias",
    )
    group.add_argument(
        "--beside", metavar="JSON", help="print the table of this committed experiment below, if it exists"
    )


def run(args: argparse.Namespace) -> int:
    models = compared.Models.of(args)
    if bool(args.run_dir) == bool([model for model in models.named if not model.teacher]):
        raise UserError("Write what to evaluate: --run-dir FOLDER for the students of a training run, or --pipeline PATH for models of any make.")
    if args.run_dir and models.named:
        raise UserError("--teacher is for pipelines: a run has its own teacher; leave it out.")
    if args.run_dir:
        from reflow.evaluation.runs import open_run

        run = open_run(args.run_dir)
        if run.recipe.model.family in ("digits", "digits-flow") and not args.protocol:
            return digits(args, run)
        return comparing.of_run(args, run)
    return comparing.of_pipelines(args, compared.filled(models))


def digits(args: argparse.Namespace, run: Run) -> int:
    """The report of a digits run."""
    from reflow.evaluation import report, table
    from reflow.evaluation.suite import Settings

    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds} is not possible; write 1 or more.")
    wrong = next((scale for scale in args.guidance or () if not 1 <= scale <= 100), None)
    if wrong is not None:
        raise UserError(f"--guidance {wrong:g} is not possible; write numbers from 1 (none) to 100.")
    comparing.refuse_for_digits(args)
    whole = Path(args.out) if args.out else run.folder / "report"
    scales: list[float | None] = list(dict.fromkeys(args.guidance or [None]))
    places = [whole / f"guidance-{scale:g}" if len(scales) > 1 else whole for scale in scales]
    settings = [Settings(samples=args.samples, seeds=args.seeds, unequal=args.unequal_sets, guidance=scale) for scale in scales]
    there = [None if args.again else report.existing(*which) for which in zip(places, [run] * len(places), settings, strict=True)]
    for place, found in zip(places, there, strict=True):
        if found is None:
            check_output(place, "--out" if args.out else "the report's folder (--out names another)")
    for place, found, asked in zip(places, there, settings, strict=True):
        show(found, args, run, place, asked)
    if args.beside and Path(args.beside).is_file():
        print(f"\nThe committed full run ({args.beside})")
        print(table.experiment_text(json.loads(Path(args.beside).read_text())))
    print("\n" + "\n".join(f"Report: {place / 'index.html'}" for place in places))
    return 0


def show(found: dict[str, Any] | None, args: argparse.Namespace, run: Run, out: Path, settings: Settings) -> None:
    """Print the report of one guidance scale, found or made now."""
    from reflow.evaluation import report, table

    if found is None:
        found = report.make(run, out, settings, device=args.device, command=shlex.join(["reflow", *sys.argv[1:]]))
    else:
        print(f"{out / 'report.json'} is of these weights already; --again measures anew.")
    guided = f", guidance {settings.guidance:g}" if settings.guidance is not None else ""
    print(f"\n{found['recipe']}, training seed {found['training_seed']}{guided}")
    print(table.text(found))
