"""Every experiment that has a bed, one after the other: each goes on where it was.

    reflow experiment all --bed exact

Results of NAME lie in OUT/NAME, students in OUT/students. The exact bed takes about an hour and a half of one core in all.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from reflow.errors import UserError
from reflow.experiments.opened import BEDS, opened

NAME = "all"
# What others build on first; minutes before hours.
ORDER = (
    "direction-vs-magnitude", "parameterisations", "velocity-discrepancy", "conversions", "guidance", "steps", "windows", "half-straightening",
    "losses", "diversity", "plug-and-play", "time-density", "comparison", "progressive-paths", "ablation", "stochasticity",
)  # fmt: skip
ON_DIGITS = ("parameterisations", "ablation", "progressive-paths")


def run(out: Path, *, bed: str = "exact", data: str = "", quick: bool = False, report: bool = False, device: str = "cpu") -> None:
    """Run them. quick: the seconds-long forms. report: make nothing, tell what is there of each. data: of --bed mnist.
    device: where each computes."""
    opened("all", out, bed=bed, data=data, device=device, beds=BEDS)
    for name in ON_DIGITS if bed == "digits" else ORDER:
        print(f"\n== {name}", flush=True)
        module = importlib.import_module(f"reflow.experiments.{name.replace('-', '_')}")
        try:
            module.run(out / name, bed=bed, data=data, quick=quick, report=report, device=device)
        except UserError as error:
            if not report:
                raise
            print(error)  # of what is not there yet
