"""`reflow export`: a run's student as a diffusers folder, a single file, delta weights or a LoRA file."""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import re
from typing import Any

from reflow.commands.common import (
    check_push,
    open_run,
    positive,
    push_arguments,
    push_written,
    reading_of,
    stage_of,
    student_file,
)
from reflow.errors import UserError
from reflow.outputs import undone, write_text
from reflow.recipes.settings import Recipe

SUFFIX = ".safetensors"
DIGITS_DATA = (
    "The 1,797 scans of handwritten digits that scikit-learn ships (UCI, Optical Recognition of Handwritten Digits)."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-dir", required=True, metavar="DIR", help="the folder that training wrote")
    parser.add_argument("--out", required=True, metavar="PATH", help=f"new folder, or new {SUFFIX} file")
    parser.add_argument("--stage", type=positive, help="whose student, from 1 (default: the last finished stage)")
    parser.add_argument(
        "--format",
        choices=["diffusers", "single-file", "delta", "lora", "lora-kohya"],
        default="diffusers",
        help="a folder that diffusers loads (default), one file with the original checkpoint's names for ComfyUI and "
        "AUTOMATIC1111, or the difference to the base, for `reflow merge`; of a LoRA student, the file for "
        "diffusers' pipe.load_lora_weights, or the same with kohya's names for ComfyUI and AUTOMATIC1111 too. Beside a "
        "file lies its card, NAME.md",
    )
    parser.add_argument(
        "--dtype",
        choices=["fp16", "bf16", "fp32"],
        help="of the written weights (default: fp16; for a delta or LoRA fp32)",
    )
    parser.add_argument(
        "--steps", type=positive, help="steps that a folder is meant to be sampled with (default: one a window)"
    )
    push_arguments(parser)


def run(args: argparse.Namespace) -> int:
    check_push(args)
    path = write(args)
    push_written(args, path, None if path.is_dir() else card_file(path))
    return 0


def write(args: argparse.Namespace) -> pathlib.Path:
    """Write what was asked for, say what it is, and return where it lies."""
    from reflow.weights.files import refuse_existing

    folder, recipe = open_run(args.run_dir)
    weights = student_file(folder, recipe, args.stage)
    if (pathlib.Path(args.out).suffix == SUFFIX) == (args.format == "diffusers"):
        wanted = "a folder" if args.format == "diffusers" else f"a file that ends in {SUFFIX}"
        raise UserError(
            f"--format {args.format} writes {wanted}, so --out {args.out} does not fit; change one of them."
        )
    refuse_existing(pathlib.Path(args.out))
    if args.format != "diffusers":
        refuse_existing(card_file(args.out))

    from reflow.export import export_folder, export_single_file, stock_scheduler
    from reflow.export.spec import other_programs
    from reflow.models import base_path, family_for
    from reflow.sampling import PiecewiseFlowScheduler
    from reflow.weights.delta import student_metadata, write_delta
    from reflow.weights.lora import export_lora, student_state

    settings, stage = reading_of(weights, recipe), stage_of(weights)
    says = student_metadata(
        **settings, recipe=recipe.name, stage=stage, family=recipe.model.family, base=recipe.model.base,
        guidance_scale=recipe.validate_.guidance_scale, teacher_guidance_scale=recipe.guidance_of(stage - 1),
    )  # fmt: skip
    base = family_for(recipe.model).load(base_path(recipe.model), parts=())
    says["base_prediction_type"] = base.prediction_type
    card = card_of(folder, recipe, weights)
    if base.prediction_type == "velocity":  # pipelines of flows name their guidance in different ways
        card["call"] = base.pipeline_call(recipe.validate_.guidance_scale)
    count = len(settings["windows"])
    which = f"stage {stage} of {len(recipe.stages)}, {count} window{'s' * (count != 1)}"
    if args.format.startswith("lora"):
        kohya = base.network_config if args.format == "lora-kohya" else None
        if kohya is not None and base.prediction_type == "velocity":
            raise UserError("--format lora-kohya is kohya's spelling for UNets; ComfyUI reads a transformer's LoRA in diffusers' own: write lora.")
        path = export_lora(weights, args.out, dtype=args.dtype or "fp32", kohya=kohya, metadata=says)
        write_card(args.format, path, base.scheduler_config, settings, card)
        print(f"LoRA of {recipe.name} ({which}) for {recipe.model.base}: {path}")
        print(lora_scheduler(base.scheduler_config, settings))
        print(lora_elsewhere(base.scheduler_config, settings, args.format, recipe.validate_.guidance_scale))
        return path
    student = student_state(base.path, weights)
    if args.format == "delta":
        path = write_delta(base.path, student, args.out, dtype=args.dtype or "fp32", metadata=says)
        write_card("delta", path, base.scheduler_config, settings, card)
        print(f"Delta weights of {recipe.name} ({which}) against {recipe.model.base}: {path}")
        return path
    if args.format == "single-file":
        if base.prediction_type == "velocity":
            raise UserError("--format single-file writes SD1.5 and SDXL checkpoints; for a student of a flow write diffusers, delta or lora.")
        scheduler = PiecewiseFlowScheduler.for_student(base.scheduler_config, **settings)
        guidance = recipe.validate_.guidance_scale
        told = dict(metadata=says, scheduler=scheduler, guidance=guidance)
        path = export_single_file(base.path, student, args.out, dtype=args.dtype or "fp16", **told)
        write_card("single-file", path, base.scheduler_config, settings, card)
        print(f"Single file of {recipe.name} ({which}): {path}")
        for program, how in other_programs(scheduler, stock_scheduler(scheduler)[0] is not None, guidance).items():
            print(f"{program}: {how}")
        return path
    # What the student knows as the null prompt is what guidance must take in the folder too.
    null = {"force_zeros_for_empty_prompt": base.zero_null} if base.family.pooled else {}
    done = export_folder(
        base, student, args.out, **settings, steps=args.steps, dtype=args.dtype or "fp16", card=card, pipeline=null,
        guidance=recipe.validate_.guidance_scale,
    )  # fmt: skip
    print(f"diffusers folder of {recipe.name} ({which}): {done.path}")
    print(scheduler_line(done))
    return done.path


def lora_scheduler(config: Any, settings: dict[str, Any]) -> str:
    """What to write in diffusers, so that a pipeline of the base samples with the LoRA as it was trained."""
    from reflow.export import stock_scheduler
    from reflow.export.card import scheduler_code
    from reflow.sampling import student_scheduler

    windows = len(settings["windows"])
    scheduler = student_scheduler(config, **settings)
    if settings["network_time"] == "flow":
        return f"scheduler: reflow.sampling.{scheduler_code(scheduler, False)}"
    if stock_scheduler(scheduler)[0] is not None:
        return (
            f"scheduler, for exactly {windows} steps: DDIMScheduler.from_config(pipe.scheduler.config, "
            'clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing")'
        )
    return (
        "scheduler: reflow.sampling.PiecewiseFlowScheduler.for_student(pipe.scheduler.config, "
        f"reflow.flow.Windows({tuple(settings['windows'].boundaries)}), "
        f"prediction_type={settings['prediction_type']!r}, network_time={settings['network_time']!r})"
    )


def lora_elsewhere(config: Any, settings: dict[str, Any], format: str, guidance: float) -> str:
    """How other programs sample with a LoRA of this format, or which format to write for them."""
    from reflow.export import stock_scheduler
    from reflow.export.card import OTHER_LORA
    from reflow.export.spec import other_programs
    from reflow.sampling import student_scheduler

    scheduler = student_scheduler(config, **settings)
    stock = stock_scheduler(scheduler)[0] is not None
    if format == "lora" and stock:
        return f"ComfyUI, AUTOMATIC1111: {OTHER_LORA}"
    return "\n".join(f"{program}: {how}" for program, how in other_programs(scheduler, stock, guidance).items())


def card_file(out: str | pathlib.Path) -> pathlib.Path:
    """Where the card of a single file lies: beside it, NAME.md."""
    return pathlib.Path(out).with_suffix(".md")


def write_card(kind: str, path: pathlib.Path, config: Any, settings: dict[str, Any], card: dict[str, Any]) -> None:
    """Write the card of a file; ``config`` is the base's scheduler config, ``settings`` how the student is read."""
    from reflow.export import stock_scheduler
    from reflow.export.card import model_card
    from reflow.sampling import student_scheduler

    scheduler = student_scheduler(config, **settings)
    stock, reason = stock_scheduler(scheduler)
    text = model_card(
        card, name=path.name, scheduler=scheduler, steps=None, stock=stock is not None, reason=reason, kind=kind
    )
    with undone(path):
        write_text(card_file(path), text)


def scheduler_line(done: Any) -> str:
    """Which scheduler an exported folder carries, and why."""
    if done.stock:
        return f"scheduler: {done.scheduler}, so it needs no package of ours. {done.reason}"
    return f"scheduler: {done.scheduler}, so `import reflow.sampling` before loading it. {done.reason}"


def card_of(folder: pathlib.Path, recipe: Recipe, weights: pathlib.Path) -> dict[str, Any]:
    """What README.md of an export says of this student, for :func:`reflow.export.card.model_card`.

    Its evaluation is that of <run>/report/report.json, if that measured these very weights.
    """
    import reflow
    from reflow.recipes.reading import dump
    from reflow.weights.files import public_name

    stage = stage_of(weights)
    builtin = recipe.model.base == "builtin"
    data = ", ".join(public_name(place.path) for place in recipe.data.places if place.path)
    # Of paths that lead out of the working folder only the last name.
    toml = re.sub(r'"((?:/|~|\.\.?/)[^"]*)"', lambda found: f'"{public_name(found[1])}"', dump(recipe))
    card: dict[str, Any] = {
        "title": f"{recipe.name}, {len(recipe.stages[stage - 1].edges) - 1}-step student",
        "base": f"the {recipe.model.family} model of reflow" if builtin else public_name(recipe.model.base),
        "family": public_name(recipe.model.family),
        "recipe": f"Stage {stage} of {len(recipe.stages)}, reflow {reflow.__version__}.\n\n```toml\n{toml}```",
        "data": DIGITS_DATA if recipe.data.source == "digits" else f"{recipe.data.source}: {data}",
        "guidance": guidance_card(recipe.validate_.guidance_scale, recipe.guidance_of(stage - 1)),
    }
    if builtin:
        card["license"] = "apache-2.0"
    return card | evaluation_of(folder / "report" / "report.json", weights)


def guidance_card(scale: Any, teacher: Any) -> dict[str, Any]:
    """A card's rows on guidance: what to sample with, and what the teacher had."""
    return {"guidance_scale": scale, "guidance_scale of the teacher in training": teacher}


def evaluation_of(report_file: pathlib.Path, weights: pathlib.Path) -> dict[str, Any]:
    """The report's rows for these weights and for the teacher; {} without a report of these very weights."""
    try:
        report = json.loads(report_file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    with open(weights, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    known = report.get("weights", {})
    number = stage_of(weights) - ("stage-0" in known)  # reports of earlier versions count from 0
    if known.get(f"stage-{number}") != digest:
        return {}
    from reflow.evaluation.table import HEAD, rows

    methods = [m for m in report["methods"] if m["stage"] in (None, number)]
    settings = report["settings"]
    return {
        "evaluation": [dict(zip(HEAD, cells, strict=True)) for cells in rows(methods, report["differences"])],
        "measures": (
            f"Paired error: RMS pixel distance (pixels -1 to 1) to the teacher's {settings['teacher_steps']} steps "
            f"from the same noise. FD: Fréchet distance to {report['real_scans']} real scans by classifier features. "
            f"{settings['samples']} samples with each of {settings['seeds']} sampling seeds; ± is half a 95 % "
            "interval."
        ),
    }
