"""What several commands share: finding a run's student, and free names for what they write."""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

from reflow.errors import UserError
from reflow.recipes import reading
from reflow.recipes.settings import Recipe
from reflow.weights.runs import stage_number

PUBLISHED = (
    "published PeRFlow: --windows 4 --network-time perflow --prediction-type diff_eps for SD1.5, ddim_eps for SDXL"
)


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return number


def single_file_arguments(parser: argparse.ArgumentParser) -> None:
    """What a base that is one .safetensors or .ckpt file needs beside it."""
    group = parser.add_argument_group("for a model that is a single file (.safetensors, .ckpt)")
    group.add_argument(
        "--tokenizer", default="", metavar="DIR", help="a folder with CLIP's tokenizer: a diffusers folder"
    )
    group.add_argument(
        "--config", default="", metavar="DIR", help="a folder with its configs (default: SD1.5's or SDXL's)"
    )
    group.add_argument(
        "--base-prediction-type",
        default="",
        choices=["epsilon", "v_prediction"],
        help="what its UNet predicts (default: what the file says, else epsilon)",
    )


def single_file_options(args: argparse.Namespace) -> dict[str, str]:
    """These arguments as the keywords of `Family.load` and `family_of`."""
    return {"tokenizer": args.tokenizer, "config": args.config, "prediction_type": args.base_prediction_type}


def reading_arguments(parser: argparse.ArgumentParser, title: str) -> None:
    """How a student is sampled, for weights that do not say it themselves."""
    group = parser.add_argument_group(title, PUBLISHED)
    group.add_argument("--windows", type=positive, help="its number of windows")
    group.add_argument("--prediction-type", choices=["ddim_eps", "ddim_v", "diff_eps", "velocity"])
    group.add_argument("--network-time", choices=["index", "perflow"], help="default: perflow, as published")


def reading_given(args: argparse.Namespace) -> dict[str, Any]:
    """What of these arguments was written."""
    given = {"windows": args.windows, "prediction_type": args.prediction_type, "network_time": args.network_time}
    return {key: value for key, value in given.items() if value is not None}


def unsaid_reading(given: dict[str, Any], what: str) -> dict[str, Any]:
    """windows, prediction_type and network_time of weights that do not say them. Every file of this project says them,
    so such weights are PeRFlow's published ones unless network_time is given. Raises UserError where one is missing."""
    if "windows" not in given or "prediction_type" not in given:
        raise UserError(
            f"{what} does not say which windows and parameterisation its student has; add --windows and "
            f"--prediction-type ({PUBLISHED})."
        )
    if "network_time" not in given:
        print(
            f"reflow: {what} does not say its network time; taken as perflow (1000 t), that of PeRFlow's published "
            "weights. Write --network-time index for one that was trained at the base's own indices.",
            file=sys.stderr,
        )
    return {"network_time": "perflow", **given}


def open_run(run_dir: str) -> tuple[pathlib.Path, Recipe]:
    """A run directory and its recipe. Raises UserError where the folder holds no run."""
    folder = pathlib.Path(run_dir)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; give the --run-dir of a training run.")
    if not (folder / "recipe.toml").is_file():
        raise UserError(
            f"{folder} holds no run of reflow (there is no recipe.toml in it); give the --run-dir of a training run."
        )
    return folder, reading.load(str(folder / "recipe.toml"))


def student_file(folder: pathlib.Path, recipe: Recipe, stage: int | None) -> pathlib.Path:
    """The weights of a finished stage (counted from 1; None: the last finished one), a whole student's or a LoRA's.
    Raises UserError where there are none.
    """
    from reflow.weights.lora import stage_file

    files = [stage_file(folder, i) for i in range(len(recipe.stages))]
    done = [i + 1 for i, f in enumerate(files) if f.is_file()]
    if not done:
        raise UserError(
            f"No stage of {folder} is finished yet; run the training command again, it goes on where it stopped."
        )
    if stage is not None and stage not in done:
        count = "stage" if len(done) == 1 else "stages"
        raise UserError(
            f"--stage {stage}: {folder} has finished {count} {', '.join(map(str, done))} of {len(files)}; stages are "
            "counted from 1."
        )
    return files[(stage or done[-1]) - 1]


def stage_of(weights: pathlib.Path) -> int:
    """The stage, counted from 1, that wrote a run's weights file."""
    return stage_number(weights.parent)


def reading_of(weights: pathlib.Path, recipe: Recipe) -> dict[str, Any]:
    """windows, prediction_type and network_time of a run's student: what its file says, else what the recipe says."""
    from reflow.flow import Windows
    from reflow.weights.delta import student_settings

    student = recipe.student
    return student_settings(weights) or {
        "windows": Windows(tuple(recipe.stages[stage_of(weights) - 1].edges)),
        "prediction_type": student.prediction_type,
        "network_time": student.network_time,
    }


def push_arguments(parser: argparse.ArgumentParser) -> None:
    """Uploading to the hub, which happens only where it is asked for."""
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload what is written to this repository on the hub")
    parser.add_argument("--public", action="store_true", help="with --push: a new repository is public (default: private)")


def check_push(args: argparse.Namespace) -> None:
    """Raises UserError where --push cannot work, before anything is done for it."""
    if args.public and not args.push:
        raise UserError("--public belongs to --push; add --push OWNER/NAME, or leave it out.")
    if args.push:
        from reflow.export.hub import check

        check(args.push)


def push_written(args: argparse.Namespace, path: pathlib.Path, card: pathlib.Path | None = None) -> None:
    """Upload it if that was asked for, and say where it is."""
    if args.push:
        from reflow.export.hub import push

        print(f"on the hub: {push(path, args.push, card=card, private=not args.public)}")


def free_name(name: str) -> pathlib.Path:
    """`name`, or the first of name-2, name-3, ... where nothing lies yet."""
    path, number = pathlib.Path(name), 1
    while path.exists():
        number += 1
        path = pathlib.Path(f"{name}-{number}")
    return path
