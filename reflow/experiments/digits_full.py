"""The full run on digits: one recipe, several training seeds through the deepspeed launcher, evaluated together.

    reflow experiment digits --out runs/experiments/digits

Every seed is trained as `deepspeed scripts/train.py --recipe digits --set train.seed=N` does, then measured as by
`reflow evaluate`, from the same noises. Finished seeds are kept, so the same command goes on where it was. Writes
OUT/digits.json, digits.png and digits-samples.png, with --recipe digits-flow digits-flow.json and so on; the committed copies are in
bench/results/experiments/.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reflow.errors import UserError
from reflow.evaluation import machine, pictures, report, table
from reflow.evaluation.intervals import t_interval
from reflow.evaluation.runs import open_run
from reflow.evaluation.suite import Settings
from reflow.ranks import free_port
from reflow.recipes import reading
from reflow.weights.runs import stage_folder

NAME = "digits"
# What a prototype in pixel space reached with another classifier: compare ratios to its teacher's 32 steps.
PROTOTYPE = {
    "teacher, 32 steps": [0.67],
    "teacher, 4 steps": [1.7, 2.0],
    "teacher, 2 steps": [4.7, 5.2],
    "student, 4 steps": [0.70, 0.75],
    "student, 2 steps": [0.87, 0.93],
}
SPACES = ("images", "latents", "frechet", "frechet_to_reference")
SECONDS = "training_seconds.json"
MEASURES = ("frechet", "frechet_unequal", "diversity", "prompt_accuracy", "paired_images", "paired_latents")


def run(
    out: Path,
    *,
    recipe: str = "digits",
    seeds: int = 3,
    ranks: int = 0,
    samples: int = 1797,
    sampling_seeds: int = 3,
    set_: tuple = (),
) -> None:
    """Train and evaluate `seeds` training seeds of a recipe under `out`. ranks 0: two on a CPU, else the GPUs."""
    checked = reading.load(recipe, list(set_))
    if seeds < 1 or sampling_seeds < 1:
        raise UserError("--seeds and --sampling-seeds must be 1 or more.")
    settings = Settings(samples=samples, seeds=sampling_seeds)
    ranks = ranks or default_ranks()
    folders = [out / f"seed-{seed}" for seed in range(seeds)]
    for seed, folder in enumerate(folders):
        train(recipe, folder, [*set_, f"train.seed={seed}"], ranks, stages=len(checked.stages))
    runs, suite, reports = [open_run(folder) for folder in folders], None, []
    for found in runs:
        done = report.existing(found.folder / "report", found, settings)
        if done is None:
            suite = suite or report.make_suite(found, settings)
            done = report.make(found, found.folder / "report", settings, command=command(), suite=suite)
        reports.append(done)
    result = gather(reports, [taken(out).get(folder.name, 0.0) for folder in folders])
    result = {
        "command": command(),
        "ranks": ranks,
        **result,
        "resolved_recipe": reading.load(str(folders[0] / "recipe.toml")).resolved(),
    }
    name = checked.model.family  # "digits", or that of the flow bed
    report.write_json(result, out / f"{name}.json")
    pictures.quality(result, out / f"{name}.png")
    (out / f"{name}-samples.png").write_bytes((folders[0] / "report" / "differences.png").read_bytes())
    print(f"\n{result['recipe']}, {seeds} training seeds")
    print(table.experiment_text(result))
    print(f"\nResults: {out / f'{name}.json'}")


def command() -> str:
    return shlex.join(["reflow", *sys.argv[1:]])


def default_ranks() -> int:
    """Two on a CPU; on GPUs the largest power of two, which shares every shipped recipe's batch evenly."""
    gpus = torch.cuda.device_count()
    return 1 << (gpus.bit_length() - 1) if gpus else 2


def train(recipe: str, folder: Path, overrides: Sequence[str], ranks: int, *, stages: int) -> None:
    """Train one run under the launcher unless it is finished, and note the seconds. UserError if that fails."""
    if all((stage_folder(folder, i) / "unet_ema.safetensors").is_file() for i in range(stages)):
        return
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(max(1, machine.cores() // ranks))}
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    code = subprocess.run(launch(recipe, folder, overrides, ranks), env=environment).returncode
    so_far = taken(folder.parent)
    so_far[folder.name] = so_far.get(folder.name, 0.0) + time.monotonic() - start
    report.write_json(so_far, folder.parent / SECONDS)
    if code:
        raise UserError(
            f"Training into {folder} ended with exit code {code}; the lines above say why. The same command goes "
            "on from there."
        )


def taken(out: Path) -> dict[str, float]:
    """Wall-clock seconds of training by run directory, interrupted launches included."""
    note = out / SECONDS
    return json.loads(note.read_text()) if note.is_file() else {}


def launch(recipe: str, folder: Path, overrides: Sequence[str], ranks: int) -> list[str]:
    """The command of the deepspeed launcher, on a free port, so that two runs on one machine do not meet."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--no_local_rank"]
    place = ["--num_accelerators", str(ranks), "--master_port", str(free_port())]
    program = ["--module", "reflow.cli", "train", "--recipe", recipe, "--run-dir", str(folder)]
    return [*launcher, *place, *program, *(part for override in overrides for part in ("--set", override))]


def gather(reports: Sequence[dict[str, Any]], training_seconds: Sequence[float]) -> dict[str, Any]:
    """Reports of several training seeds as one result.

    Teacher rows come from the first report: the teacher is the same, and their intervals are over sampling seeds and
    samples. Student rows and differences are means over training seeds with their t-interval; `per_seed` keeps each
    seed's own, with intervals over samples.
    """
    first = reports[0]
    rows = [m for m in first["methods"] if m["windows"] is None]
    for i, method in enumerate(first["methods"]):
        if method["windows"] is None:
            continue
        same = [r["methods"][i] for r in reports]
        row = {key: method[key] for key in ("method", "stage", "windows", "steps")}
        row |= {key: over_training(m[key]["mean"] for m in same) for key in MEASURES if key in method}
        row["milliseconds_per_image"] = statistics.median(m["milliseconds_per_image"] for m in same)
        rows.append(row)
    differences = []
    for i, entry in enumerate(first["differences"]):
        same = [r["differences"][i] for r in reports]
        spaces = {space: over_training(d[space]["mean"] for d in same) for space in SPACES}
        below = {space: all(d[space]["excludes_zero"] and d[space]["mean"] < 0 for d in same) for space in SPACES}
        names = {key: entry[key] for key in ("method", "stage", "windows", "steps")}
        differences.append({**names, **spaces, "below_zero_for_every_seed": below})
    teacher = next(m for m in rows if m["steps"] == first["settings"]["teacher_steps"])["frechet"]["mean"]
    kept = (
        "recipe",
        "settings",
        "sampling_seeds",
        "real_scans",
        "classifier",
        "floor",
        "timing",
        "machine",
        "versions",
    )
    told = {key: first[key] for key in ("teacher_sampler",) if key in first}  # reports from before it are kept too
    return {
        **{key: first[key] for key in kept},
        **told,
        "training_seeds": [r["training_seed"] for r in reports],
        "training_seconds": [round(s, 1) for s in training_seconds],
        "evaluation_seconds": [r["seconds"] for r in reports],
        "methods": rows,
        "differences": differences,
        "frechet_relative_to_teacher": {
            f"{m['method']}, {m['steps']} steps": m["frechet"]["mean"] / teacher for m in rows
        },
        "prototype": PROTOTYPE,
        "per_seed": [
            {key: r[key] for key in ("training_seed", "weights", "methods", "differences", "straightness")}
            for r in reports
        ],
    }


def over_training(values: Any) -> dict[str, Any]:
    values = list(values)
    return {**t_interval(values).as_dict(), "values": values}
