"""A training step's time in parts and as a whole, against the published-style loop, on digits, SD1.5 and SDXL.

First the gate: in fp32 the published-style step must give ours' window, velocity, loss and gradient for the same noise
and time, or nothing is timed. Cells are in bench.step_cells; every row says its batch, windows, steps and guidance.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch

from bench import record, session
from bench.rig import Rig
from bench.scenes import FAMILIES
from bench.step_cells import Cell, plan, text
from reflow.recipes import reading

GATE = 1e-4
SHAPES = {"digits": [4, 8, 8], "sd15": [4, 64, 64], "sdxl": [4, 128, 128]}
DERIVED = (
    "derived from the stages' rows: published solves every sample; ours solves the recipe's pairs once and trains on "
    "them; encoding the data set, validation and checkpoints are left out of both"
)
# A rounding of both solvers' times that differs nowhere: 1000 is a multiple of windows x steps.
EXACT = dict(windows=4, solver_steps=5, batch=8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    session.add_options(parser)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--list", action="store_true", help="print the cells and measure nothing")


def main(arguments: argparse.Namespace) -> int:
    run = session.Session("step", arguments)
    cells = plan(run.device, run.quick, arguments.families)
    if arguments.list:
        print("\n".join(f"{one.case}, batch {one.batch}: {', '.join(one.entries)}" for one in cells))
        return 0
    rig = Rig("digits", run.device, run.quick, run.seed)
    errors = same_maths(rig)
    told = ", ".join(f"{name} {error:.2g}" for name, error in errors.items())
    print(f"gate, published-style against ours in fp32: {told}", flush=True)
    if not max(errors.values()) < GATE:
        run.fail("step, published-style loop", f"differs from ours by {max(errors.values()):.3g}, allowed {GATE:g}")
        return run.exit_code()
    for one in cells:
        if rig.family != one.family:
            del rig
            release(run.device)
            rig = Rig(one.family, run.device, run.quick, run.seed)
        measure(run, rig, one)
    summary(run)
    return run.exit_code()


def measure(run: session.Session, rig: Rig, one: Cell) -> None:
    """One cell; a scene that does not fit into memory makes its rows say so."""
    shape = SHAPES[one.family]
    cell = {"case": one.case, "dtype": "fp32" if one.family == "digits" else "bf16", "shape": [one.batch, *shape]}
    try:
        run.measure(cell, lambda: one.peers(rig), list(one.entries), modes=["plain"], caches=["warm"], extra=one.facts)
    except torch.OutOfMemoryError:
        release(run.device)
        for name in one.entries:
            run.add(**cell, peer=name, note="skipped: out of GPU memory", extra=one.facts)


def release(device: torch.device) -> None:
    """Give the networks of the family before back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def same_maths(rig: Rig) -> dict[str, float]:
    """Largest relative errors of the published-style step against ours: digits in fp32, same noise and time.

    rig: one of the digits family; its weights stay as they are.
    """
    from bench.gate import check
    from bench.published import lookup
    from reflow.data import sampler
    from reflow.training import targets

    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        errors: dict[str, float] = {}
        for name, scale in (("", 1.0), (" guided", 3.0)):
            ours, loop = rig.ours(**EXACT, guidance_scale=scale), rig.published(**EXACT, guidance_scale=scale)
            solved = ours.fixed()
            z_end = rig.published_window(loop, ours)()
            dt = ours.flow.table.dt[solved.window].view(-1, 1, 1, 1)
            errors[f"window{name}"] = check(z_end, solved.z_end, float("inf"))
            errors[f"velocity{name}"] = check(
                (z_end - solved.z_start) / dt, (solved.z_end - solved.z_start) / dt, float("inf")
            )
        # The student's half on the guided window: loss and gradients at the recipe's own times.
        draws = sampler.chord_draws(rig.seed, ours.flow.index, ours.samples).to(rig.device)
        t, _ = targets.times(draws, solved.window, ours.flow.table, ours.recipe.objective)
        t_start, t_end, numbers = lookup(t, EXACT["windows"])
        rows = solved.conditioning.to(rig.device)
        ours.meter.loss.zero_()
        ours.student()
        wanted, value = rig.gradients(), ours.meter.loss[0] / ours.meter.loss[1]
        rig.scene.student.zero_grad()
        loss = loop.loss((solved.z_start, z_end, t_start, t_end, numbers), t, rows)
        loss.backward()
        errors["loss"] = check(loss, value, float("inf"))
        errors["gradient"] = check(rig.gradients(), wanted, float("inf"))
        return errors
    finally:
        torch.backends.cudnn.allow_tf32 = before


def summary(run: session.Session) -> None:
    """Ratios to the published-style loop of the same cell, and the whole recipe `digits` from its stages' rows."""
    rows = [row for row in record.read(run.recorder.path) if row["median_us"]] if run.recorder.path.exists() else []
    last = {(row["case"], row["shape"][0], row["peer"]): row for row in rows}
    for (case, batch, peer), row in last.items():
        base = last.get((case, batch, row.get("baseline", "published")))
        if base is not None and peer not in ("published", "solve of a window"):
            ratio = base["median_us"] / base.get("samples", batch) * row.get("samples", batch) / row["median_us"]
            print(f"{case}, batch {batch}: {peer} {ratio:.2f}x the published-style loop's samples a second")
    whole_recipe(run, last)


def whole_recipe(run: session.Session, rows: dict[tuple[str, int, str], dict[str, Any]]) -> None:
    """What all stages of the recipe `digits` take, from the rows of its stages: rows without times of their own."""
    found = {}
    for batch in sorted({batch for _, batch, _ in rows}):
        seconds = {"published": 0.0, "ours": 0.0}
        for stage in reading.load("digits").stages:
            case = f"digits stage: {text(len(stage.edges) - 1, stage.solver_steps)}"
            names = ("published", "solve of a window", "ours, stored pairs")
            each = [rows[case, batch, name]["median_us"] / batch / 1e6 for name in names if (case, batch, name) in rows]
            if len(each) < len(names):
                break
            seconds["published"] += stage.samples * each[0]
            seconds["ours"] += stage.pairs * each[1] + stage.samples * each[2]
        else:
            found[batch] = seconds
    for batch, seconds in found.items():
        case = {"case": "digits whole recipe", "dtype": "fp32", "shape": [batch, *SHAPES["digits"]]}
        for peer, taken in seconds.items():
            if not run.recorder.done(run.key(**case, peer=peer)):
                told = {"derived_seconds": taken, "ratio_to_published": seconds["published"] / taken}
                run.add(**case, peer=peer, note=DERIVED, extra=told)
