"""`reflow evaluate`: the students of a run against their teacher, as a table, report.json and a page."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from reflow.errors import UserError
from reflow.outputs import check_output


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
    run = open_run(args.run_dir)
    out = Path(args.out) if args.out else run.folder / "report"
    settings = Settings(samples=args.samples, seeds=args.seeds, unequal=args.unequal_sets)
    found = None if args.again else report.existing(out, run, settings)
    if found is None:
        check_output(out, "--out" if args.out else "the report's folder (--out names another)")
    if found is None:
        found = report.make(run, out, settings, device=args.device, command=shlex.join(["reflow", *sys.argv[1:]]))
    else:
        print(f"{out / 'report.json'} is of these weights already; --again measures anew.")
    print(f"\n{found['recipe']}, training seed {found['training_seed']}")
    print(table.text(found))
    if args.beside and Path(args.beside).is_file():
        print(f"\nThe committed full run ({args.beside})")
        print(table.experiment_text(json.loads(Path(args.beside).read_text())))
    print(f"\nReport: {out / 'index.html'}")
    return 0
