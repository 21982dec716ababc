"""`reflow prepare --pairs`: one stage's windows solved into a folder that later runs and recipes train on without a teacher."""

from __future__ import annotations

import pathlib

import torch
import torch.distributed as dist

from reflow.errors import UserError
from reflow.ranks import barrier
from reflow.recipes.settings import Recipe
from reflow.training import networks, pairs, run, stages
from reflow.training.progress import Progress
from reflow.training.solves import Solver
from reflow.weights.lora import stage_file, student_state


def solve(recipe: Recipe, stage: int, count: int, out: pathlib.Path, run_dir: pathlib.Path | None = None) -> int:
    """Solve `count` windows of stage `stage` (from 1) of a recipe into `out`; the same call goes on after a kill. Returns the pairs made.

    run_dir: the run whose finished stage before this one solves, where the stage's teacher is "previous". All ranks call it.
    """
    if not 1 <= stage <= len(recipe.stages):
        raise UserError(f"--stage {stage}: recipe '{recipe.name}' has {len(recipe.stages)} stages, counted from 1.")
    if count < 1:
        raise UserError(f"--pairs {count}: write how many windows to solve, at least 1.")
    weights = None
    if recipe.stages[stage - 1].teacher == "previous":
        if run_dir is None:
            raise UserError(f"Stage {stage} of recipe '{recipe.name}' is solved by the student of stage {stage - 1}; give the run that "
                            f"trained it as --run-dir.")
        weights = stage_file(run_dir, stage - 2)
        if not weights.is_file():
            raise UserError(f"{weights} is missing: stage {stage - 1} of {run_dir} is not finished.")
    device, base, data = run.begin(recipe)
    flow = stages.build(recipe, stage - 1, base.schedule(), base.prediction_type, device)
    if weights is not None:
        base.unet.load_state_dict(student_state(base.unet.state_dict(), weights))
    solver = Solver(recipe, flow, data, base.unet.requires_grad_(False).eval().to(device, networks.solver_dtype(recipe)), device)
    store = pairs.create(out, solver, count)
    bar = Progress(f"solving pairs of stage {stage}", count, 0, dist.get_rank() == 0)
    try:
        with torch.no_grad():
            store.fill(lambda n: bar.advance(n * dist.get_world_size()))
    finally:
        bar.close()
    barrier()
    store.load()
    return count
