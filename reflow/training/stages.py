"""What one stage is made of: its windows, the student's reading of them, and who solves them. Stages are data; nothing here knows 8, 4, 2."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reflow.errors import UserError
from reflow.flow import ChordTable, Merger, Rectified, Schedule, Windows, WindowSolver
from reflow.flow.merging import ends
from reflow.recipes.settings import Recipe, Stage


@dataclass(frozen=True)
class StageFlow:
    """The maths of one stage on one device. `recipe` has the stage's own values.

    windows: of the student when the stage ends. parts: what the teacher solves and the table, and every other number of a window, speak of; the
    same, but where parts merge into windows within the stage. active: numbers of the parts that are trained, as a LongTensor.
    """

    recipe: Recipe
    index: int
    stage: Stage
    windows: Windows
    parts: Windows
    table: ChordTable
    solver: WindowSolver
    active: torch.Tensor
    inverter: WindowSolver | None = None  # the solver backwards, where some pairs are made so
    merger: Merger | None = None  # the student's own part of the chords, where windows merge within the stage

    def window_of(self, solves: torch.Tensor) -> torch.Tensor:
        """Window of each solve [B]: the active ones in turn, so every batch holds them in equal parts."""
        return self.active[solves % len(self.active)]


def windows_of(stage: Stage) -> Windows:
    return Windows(stage.edges)


def parts_of(stage: Stage) -> Windows:
    """What the teacher solves: the windows, or the parts that merge into them."""
    return Windows(stage.solved_edges)


def trained(stage: Stage) -> tuple[int, ...]:
    """Numbers of the windows, or their parts, that a stage trains. Raises ValueError for a half that a window reaches across."""
    parts = parts_of(stage)
    if stage.half == "both":
        return tuple(range(len(parts)))
    windows_of(stage).half(stage.half)
    return parts.half(stage.half)


def build(recipe: Recipe, index: int, schedule: Schedule, prediction_type: str, device: torch.device) -> StageFlow:
    """Tables and solver of stage `index`. prediction_type: the base model's, in diffusers' names. Raises UserError with the stage's key."""
    recipe, stage = recipe.of_stage(index), recipe.stages[index]
    if isinstance(schedule, Rectified):
        schedule = Rectified(stage.shift or recipe.student.shift)
    guidance = None if recipe.teacher.guidance_scale == 1.0 else recipe.teacher.guidance_scale
    try:
        windows, parts = windows_of(stage), parts_of(stage)
        table = ChordTable(schedule, parts, recipe.student.prediction_type, ends=ends(parts, stage.merges), device=device)
        merger = Merger(table, stage.merges, share=stage.self_share or 0.5, network_time_mode=recipe.student.network_time) if stage.merges else None
        if stage.teacher == "previous":
            before = ChordTable(schedule, windows_of(recipe.stages[index - 1]), recipe.student.prediction_type, device=device)
            solver = WindowSolver.from_student(before, parts, stage.solver_steps, network_time_mode=recipe.student.network_time,
                                               device=device)  # the root's guidance is in this student already
        else:
            solver = WindowSolver(schedule, parts, stage.solver_steps, prediction_type=prediction_type, method=recipe.teacher.method,
                                  guidance_scale=guidance, device=device)
        inverter = None
        if recipe.objective.forward_share:
            inverter = WindowSolver(schedule, parts, stage.solver_steps, prediction_type=prediction_type, method=recipe.teacher.method,
                                    guidance_scale=guidance, backward=True, device=device)
        active = trained(stage)
    except ValueError as error:
        raise UserError(f"stages.{index}: {error}") from error
    return StageFlow(recipe, index, stage, windows, parts, table, solver, torch.tensor(active, device=device), inverter, merger)


def check_compatible(recipe: Recipe, prediction_type: str) -> None:
    """Refuse a student whose parameterisation the base's output cannot start from."""
    wanted = {"ddim_eps": "epsilon", "diff_eps": "epsilon", "ddim_v": "v_prediction"}.get(recipe.student.prediction_type)
    if prediction_type == "velocity":
        wrong = next((f"student.{key} = '{value}'" for key, value, right in (
            ("prediction_type", recipe.student.prediction_type, "velocity"), ("network_time", recipe.student.network_time, "flow")) if value != right), None)
        if wrong:
            raise UserError(f"{wrong} does not fit this base, which is a rectified flow; write student.prediction_type = 'velocity' and "
                            f"student.network_time = 'flow'.")
        return
    if recipe.student.shift != 1.0 or recipe.student.network_time == "flow":
        raise UserError("student.shift and student.network_time = 'flow' are of bases that are rectified flows, and this base is none; leave them out.")
    if wanted and wanted != prediction_type:
        fitting = {"epsilon": "ddim_eps", "v_prediction": "ddim_v"}.get(prediction_type, "velocity")
        raise UserError(f"student.prediction_type = '{recipe.student.prediction_type}' needs a base with prediction_type '{wanted}', "
                        f"but this base has '{prediction_type}'; write student.prediction_type = '{fitting}'.")
