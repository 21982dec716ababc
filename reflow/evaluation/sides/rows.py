"""What the tables of several sides hold: recipes key by key, cost, and the quality rows with their marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reflow.errors import UserError
from reflow.evaluation.runs import Run
from reflow.evaluation.sides.opened import Side
from reflow.recipes import reading

COST = ("side", "samples", "teacher evaluations", "student evaluations", "training time", "evaluation's network rows", "evaluation's device hours")


def differences(sides: Sequence[Side]) -> list[tuple[str, list[str], bool]]:
    """(key, its value for each side that has a recipe, whether it changes what is learnt) of all keys whose values differ; those that change
    what is learnt first."""
    recipes = [side.recipe for side in sides if side.recipe is not None]
    keys = list(dict.fromkeys(key for recipe in recipes for key in recipe))
    found = []
    for key in keys:
        values = [recipe.get(key) for recipe in recipes]
        if any(value != values[0] for value in values):
            free = key.split(".")[0] in reading.FREE_SECTIONS or all(reading.is_free(key, values[0], value) for value in values[1:])
            found.append((key, ["-" if value is None else reading.toml_value(value) for value in values], not free))
    return sorted(found, key=lambda entry: not entry[2])


def elapsed(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds that the steps of a run took by its log: a stage's clock starts anew where the run was resumed. None without a record."""
    total, last = 0.0, {}
    for record in records:
        stage, now = record.get("stage"), record.get("elapsed")
        if not isinstance(now, (int, float)):
            continue
        if now < last.get(stage, 0.0):
            total += last[stage]
        last[stage] = now
    return total + sum(last.values()) if last else None


def training_cost(side: Side) -> tuple[int, float | None, float | None]:
    """(samples, teacher evaluations, seconds) of a run's recipe and log; samples are those of its log where there is one."""
    recipe = side.recipe_of
    records = Run(side.path, recipe, ()).log("train")
    planned = sum(stage.samples for stage in recipe.stages)
    done = max((record["total_samples"] for record in records if isinstance(record.get("total_samples"), int)), default=planned)
    return done, teacher_evaluations(recipe, done), elapsed(records)


def teacher_evaluations(recipe: Any, done: int) -> float | None:
    """Network rows of the teacher for the first `done` samples, by the recipe; None where it cannot be counted."""
    import torch

    from reflow.flow import DiscreteVP
    from reflow.training import stages
    from reflow.training.plan import evaluations_per_sample

    # The counts depend on windows and steps alone, so any schedule serves and no base is read.
    schedule = DiscreteVP.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000})
    total, left = 0.0, done
    for index, stage in enumerate(recipe.stages):
        try:
            flow = stages.build(recipe, index, schedule, "epsilon", torch.device("cpu"))
            per_sample, _ = evaluations_per_sample(recipe, index, flow)
        except (UserError, ValueError):  # a recipe that only its own base can build
            return None
        total += per_sample * min(left, stage.samples)
        left = max(0, left - stage.samples)
    return total


def cost_rows(sides: Sequence[Side]) -> list[tuple[str, ...]]:
    """Cells as text in the order of COST; "-" for what is not known."""
    found = []
    for side in sides:
        samples = teacher = student = time = "-"
        if side.recipe_of is not None:
            done, rows, seconds = training_cost(side)
            samples, student = f"{done:,}", f"{done:,}"
            teacher = "-" if rows is None else f"{round(rows):,}"
            time = "-" if seconds is None else duration(seconds)
        costs = [result.cost for result in side.results if result.cost]
        evaluations = f"{sum(cost['evaluations'] for cost in costs):,}" if costs else "-"
        hours = f"{sum(cost['hours'] for cost in costs):.2g}" if costs else "-"
        found.append((side.label, samples, teacher, student, time, evaluations, hours))
    return found


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
