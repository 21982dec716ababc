"""`reflow evaluate`: the students of a run against their teacher, as a table, report.json and a page."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflow.errors import UserError
from reflow.outputs import check_output

if TYPE_CHECKING:
    from reflow.evaluation.runs import Run
    from reflow.evaluation.suite import Settings


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-dir", required=True, help="the folder that training wrote")
    parser.add_argument(
        "--samples",
        type=int,
        default=1797,
        help="images for each method and sampling seed (default: 1797, as many as there are real scans)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="sampling seeds; two or more give intervals (default: 3)")
    parser.add_argument(
        "--unequal-sets",
        action="store_true",
        help="allow more samples than real scans; the Fréchet distance then has another bias",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        metavar="SCALE",
        help="of the teacher and of students that have learnt none; each of several has its own report, in guidance-SCALE of "
        "the folder (default: none, or what the students have learnt)",
    )
    parser.add_argument("--out", help="folder of the report (default: report/ in the run directory)")
    parser.add_argument(
        "--again", action="store_true", help="measure again although the report of these weights is there"
    )
    parser.add_argument(
        "--beside", metavar="JSON", help="print the table of this committed experiment below, if it exists"
    )
    parser.add_argument("--device", help="cpu or cuda (default: the GPU where there is one)")


def run(args: argparse.Namespace) -> int:
    from reflow.evaluation import report, table
    from reflow.evaluation.runs import open_run
    from reflow.evaluation.suite import Settings

    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds} is not possible; write 1 or more.")
    wrong = next((scale for scale in args.guidance or () if not 1 <= scale <= 100), None)
    if wrong is not None:
        raise UserError(f"--guidance {wrong:g} is not possible; write numbers from 1 (none) to 100.")
    run = open_run(args.run_dir)
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
