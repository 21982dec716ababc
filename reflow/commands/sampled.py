"""What `reflow sample` samples: a run's student, an exported folder or a base, and with which scheduler and steps."""

from __future__ import annotations

import argparse
import pathlib
from dataclasses import dataclass
from typing import Any

from reflow.commands.common import (
    open_run,
    reading_given,
    reading_of,
    single_file_options,
    stage_of,
    student_file,
    unsaid_reading,
)
from reflow.errors import UserError

TEACHER_STEPS = 32
SCHEDULERS = ("PiecewiseFlowScheduler", "PeRFlowScheduler", "FlowWindowScheduler")


@dataclass
class Source:
    """What to sample: the base's folder and family, a student's weights (None: those in the folder), a student's
    windows and reading ({} for a base), and a name for the images' metadata.
    """

    family: Any
    folder: pathlib.Path | str
    weights: pathlib.Path | None
    settings: dict[str, Any]
    name: str


def find_source(args: argparse.Namespace) -> Source:
    """Raises UserError for a run or folder that has nothing to sample."""
    if args.run_dir:
        folder, recipe = open_run(args.run_dir)
        weights = None if args.teacher else student_file(folder, recipe, args.stage)
    elif args.stage or args.teacher or args.teacher_windows:
        raise UserError(
            "--stage, --teacher and --teacher-windows choose within a training run, which has both networks; give --run-dir, or "
            "leave them out."
        )

    from reflow.models import base_path, family_for, family_of
    from reflow.weights.delta import student_settings
    from reflow.weights.files import weight_files

    given = reading_given(args)
    if args.run_dir and given:
        raise refused_reading(given, args.run_dir)
    if args.run_dir:
        base = family_for(recipe.model), base_path(recipe.model)
        if weights is None:
            return Source(*base, None, {}, f"base of {recipe.name}")
        return Source(*base, weights, reading_of(weights, recipe), f"{recipe.name}, stage {stage_of(weights)}")
    found, folder = family_of(args.model, **single_file_options(args))
    files = weight_files(folder / found.network[0])
    settings = student_settings(files[0]) if files else {}
    if given:
        from reflow.sampling import contradiction

        config = found.load(folder, parts=()).scheduler_config
        if settings or config.get("_class_name") in SCHEDULERS:
            raise refused_reading(given, args.model)
        settings = unsaid_reading(given, args.model)
        problem = contradiction(config.get("prediction_type"), settings["prediction_type"])
        if problem:
            raise UserError(f"{args.model} is sampled in another way: {problem}")
    return Source(found, folder, None, settings, args.model)


def refused_reading(given: dict[str, Any], where: str) -> UserError:
    """Where a student says itself how it is sampled, and is asked to be sampled as ``given``."""
    option = "--" + next(iter(given)).replace("_", "-")
    return UserError(
        f"{where} says itself how its student is sampled, so {option} would not be read; leave such options out."
    )


def refuse_contradiction(source: Source, config: Any) -> None:
    """Raises UserError where the scheduler of a student's folder is not that of its weights, which say themselves how
    they are sampled: the images would be wrong, with no other sign."""
    from reflow.sampling import FlowWindowScheduler, PiecewiseFlowScheduler, contradiction

    told, says = [], source.settings
    if contradiction(config.get("prediction_type"), says["prediction_type"]):
        told.append(("prediction_type", config["prediction_type"], says["prediction_type"]))
    if config.get("_class_name") in SCHEDULERS:
        kind = FlowWindowScheduler if config["_class_name"] == "FlowWindowScheduler" else PiecewiseFlowScheduler
        other = kind.from_config(config)
        if other.config.prediction_type != says["prediction_type"]:
            told.append(("prediction_type", other.config.prediction_type, says["prediction_type"]))
        if other.windows != says["windows"]:
            told.append(("windows", list(other.windows.boundaries), list(says["windows"].boundaries)))
        if other.config.network_time != says["network_time"]:
            told.append(("network_time", other.config.network_time, says["network_time"]))
    for what, scheduler, weights in told[:1]:
        raise UserError(
            f"{source.name} contradicts itself: its scheduler_config.json says {what} {scheduler!r}, and its UNet was "
            f"trained with {weights!r}. Put the scheduler that was exported with these weights back."
        )


def student_scheduler(source: Source, config: Any, counts: tuple[int, ...] | None) -> tuple[Any, int]:
    """(the student's scheduler or None for a base, steps in all); counts are those of --steps. Raises UserError where they do not
    fit the windows."""
    from reflow.sampling import FlowWindowScheduler, PiecewiseFlowScheduler, student_scheduler

    if source.settings:
        if source.weights is None:
            refuse_contradiction(source, config)
        scheduler: Any = student_scheduler(config, **source.settings)
    elif config.get("_class_name") == "FlowWindowScheduler":
        scheduler = FlowWindowScheduler.from_config(config)
    elif config.get("_class_name") in SCHEDULERS:
        scheduler = PiecewiseFlowScheduler.from_config(config)
    else:
        if counts and len(counts) > 1:
            raise UserError(f"--steps {','.join(map(str, counts))} are of a student's windows, and a base has none; write one number.")
        return None, counts[0] if counts else TEACHER_STEPS
    count = len(scheduler.windows)
    if counts and len(counts) > 1:
        if len(counts) != count:
            raise UserError(
                f"--steps {','.join(map(str, counts))} are {len(counts)} numbers, and the student has {count} windows; write one "
                "for each of them, from noise to data, or their sum."
            )
        scheduler.set_timesteps(sum(counts), steps_per_window=counts)
        return scheduler, sum(counts)
    own = scheduler.config.steps_per_window
    steps = counts[0] if counts else sum(own) if own else None
    if steps is not None and steps < count:
        raise UserError(
            f"--steps {steps} is fewer than the student's {count} windows, and every window needs a step; write "
            f"--steps {count} or more, or sample a stage with fewer windows."
        )
    scheduler.set_timesteps(steps or count)
    return scheduler, steps or count


def refuse_parts(args: argparse.Namespace, scheduler: Any, scales: list[float]) -> None:
    """Raises UserError where --teacher-windows does not go with what else is asked for."""
    if scheduler is None:
        raise UserError("--teacher-windows says what a student leaves to its base; leave --teacher out.")
    if args.init_image or len(set(scales)) > 1:
        what = "--init-image" if args.init_image else "several --guidance scales"
        raise UserError(f"--teacher-windows does not go with {what}; leave one of them out.")
    wrong = next((number for number in args.teacher_windows if number > len(scheduler.windows)), None)
    if wrong:
        raise UserError(
            f"--teacher-windows {wrong}: the student has {len(scheduler.windows)} windows, counted from 1 at the noisy end."
        )


def load(source: Source, device: Any, dtype: str, student: bool = True) -> Any:
    """The base, with the student's weights in it. Raises UserError where they do not fit."""
    from reflow.weights.files import dtype_of
    from reflow.weights.lora import student_state

    base = source.family.load(source.folder, device=device, dtype=dtype_of(dtype))
    if student and source.weights is not None:
        base.unet.load_state_dict(student_state(base.unet.state_dict(), source.weights))
    return base
