"""`reflow merge`: base or custom fine-tune + delta weights = an accelerated custom model."""

from __future__ import annotations

import argparse
import math
import pathlib
from typing import Any

from reflow.commands.common import (
    check_push,
    positive,
    push_arguments,
    push_written,
    reading_arguments,
    reading_given,
    single_file_arguments,
    single_file_options,
    unsaid_reading,
)
from reflow.errors import UserError

# Few-step training changes weights by some per cent; the sum of two whole models by about 100.
LARGEST_CHANGE = 0.5


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        required=True,
        metavar="DIR",
        help="diffusers folder, single file or hub name of the base or of a custom fine-tune, or 'builtin' (the digits "
        "base)",
    )
    single_file_arguments(parser)
    parser.add_argument(
        "--delta",
        required=True,
        metavar="FILE",
        help="delta weights of `reflow export`, or published PeRFlow ones, a file or its folder",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new diffusers folder")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the delta (default: 1)")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="KEY",
        help="leave weights of this name as they are if they do not fit, such as 'conv_in.*'; may be repeated",
    )
    parser.add_argument(
        "--dtype", choices=["fp16", "bf16", "fp32"], default="fp16", help="of the written weights (default: fp16)"
    )
    parser.add_argument("--steps", type=positive, help="steps it is meant to be sampled with (default: one a window)")
    push_arguments(parser)
    reading_arguments(parser, "for a delta that does not say how its student is sampled")


def run(args: argparse.Namespace) -> int:
    check_push(args)
    import torch

    from reflow.commands.export import scheduler_line
    from reflow.weights import delta
    from reflow.weights.files import HUB_NAME, cast, read_state, refuse_existing

    refuse_existing(pathlib.Path(args.out))
    if not pathlib.Path(args.delta).exists():
        if HUB_NAME.fullmatch(args.delta) and pathlib.Path(args.delta).suffix != ".safetensors":
            raise UserError(
                f"There is no file or folder {args.delta}. A delta on the hub is downloaded first: hf download "
                f"{args.delta} --local-dir delta, then --delta delta."
            )
        raise UserError(f"There is no file {args.delta}; give the --delta that `reflow export --format delta` wrote.")
    says = delta.delta_metadata(args.delta)
    settings = delta.student_settings(args.delta)
    given = reading_given(args)
    settings = settings | given if settings else unsaid_reading(given, args.delta)

    from reflow.export import export_folder
    from reflow.models.digits import BUILTIN
    from reflow.models.folder import find_folder, read_index, read_scheduler

    # Any pipeline with a UNet of the delta's shape: also inpainting and other kinds that no family trains.
    folder = BUILTIN if args.base == "builtin" else find_folder(args.base, single_file_options(args))
    read_index(folder)
    scheduler = read_scheduler(folder)
    same_parameterisation(scheduler.get("prediction_type", "epsilon"), says, settings, args)
    # In fp32, so that the sum is rounded once, to the dtype that is written.
    custom = cast(read_state(folder), torch.float32)
    merged, report = delta.merge(custom, args.delta, args.scale, allow=tuple(args.allow))
    if report.size > LARGEST_CHANGE:
        raise UserError(
            f"{args.delta} would change the weights by {100 * report.size:.0f} % of their size, which few-step "
            "training does not do; it looks like the weights of a whole model. Give a delta, or a smaller --scale."
        )
    card = card_of(args, says)
    done = export_folder(folder, merged, args.out, **settings, steps=args.steps, dtype=args.dtype, card=card)
    print(report)
    print(f"diffusers folder: {done.path}")
    print(scheduler_line(done))
    push_written(args, done.path)
    return 0


def same_parameterisation(base: str, says: dict[str, str], settings: dict[str, Any], args: argparse.Namespace) -> None:
    """Raises UserError where the delta changes a network of another kind than the base's, whose prediction_type is
    given, noise- or v-prediction: the sum has the right shapes and makes noise."""
    from reflow.sampling import contradiction

    trained_on = says.get("base_prediction_type")
    if (trained_on and trained_on != base) or contradiction(base, settings["prediction_type"]):
        kind = trained_on if trained_on and trained_on != base else settings["prediction_type"]
        raise UserError(
            f"{args.base} is a model with prediction_type {base!r}, and {args.delta} was made for one "
            f"with {kind!r}; their sum makes noise. Merge into a fine-tune of the model that the delta belongs to."
        )


def scale_of(says: dict[str, str], key: str, delta: str) -> float:
    """A guidance scale in a delta's metadata. Raises UserError where it is no number."""
    from reflow.weights.delta import unreadable

    try:
        scale = float(says[key])
    except (KeyError, ValueError):
        scale = math.nan
    if not math.isfinite(scale):
        raise unreadable(delta, key, says.get(key), "a number")
    return scale


def card_of(args: argparse.Namespace, says: dict[str, str]) -> dict[str, Any]:
    """What README.md of the merged folder says of its making; ``says`` is the delta's metadata."""
    from reflow.commands.export import guidance_card
    from reflow.weights.files import public_name

    base = "the digits model of reflow" if args.base == "builtin" else public_name(args.base)
    delta = public_name(args.delta)
    card = {"base": base, "merged": f"The weights of {base} plus {args.scale:g} times the delta weights {delta}."}
    if "guidance_scale" in says:
        card["guidance"] = guidance_card(*(scale_of(says, key, args.delta) for key in ("guidance_scale", "teacher_guidance_scale")))
    return card
