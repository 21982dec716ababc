"""`reflow sample`: images from prompts, with a run's student, an exported folder or a base."""

from __future__ import annotations

import argparse
import io
import pathlib
import sys
from dataclasses import dataclass
from typing import Any

from reflow.commands.common import (
    free_name,
    open_run,
    positive,
    reading_arguments,
    reading_given,
    reading_of,
    single_file_arguments,
    single_file_options,
    stage_of,
    student_file,
    unsaid_reading,
)
from reflow.errors import UserError
from reflow.lines import lines_of, read_lines

TEACHER_STEPS = 32
INTERRUPTED = "images of finished batches are kept; the same command with another --out draws all of them again"
SCHEDULERS = ("PiecewiseFlowScheduler", "PeRFlowScheduler")


def arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run-dir", metavar="DIR", help="a training run: its last finished student")
    source.add_argument(
        "--model",
        "--base",
        dest="model",
        metavar="PATH",
        help="a base or an exported student: a diffusers folder, single file or hub name, or 'builtin' (the digits "
        "base)",
    )
    single_file_arguments(parser)
    reading_arguments(parser, "for a student's folder or file that does not say how it is sampled")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--stage", type=positive, help="with --run-dir: the student of this stage, from 1")
    which.add_argument(
        "--teacher", action="store_true", help="with --run-dir: the base that was trained from, not a student"
    )
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    parser.add_argument("--prompts", metavar="FILE", help="a file with one prompt a line; '-' reads standard input")
    parser.add_argument(
        "--negative-prompt", metavar="TEXT", help="what guidance moves away from, in all images (default: no text)"
    )
    parser.add_argument("--count", type=positive, default=1, help="images of each prompt (default: 1)")
    parser.add_argument(
        "--steps", type=positive, help=f"default: one for each window of a student, {TEACHER_STEPS} for a base"
    )
    parser.add_argument(
        "--guidance", default="1", metavar="SCALE", help="one scale, or one for each step as 7.5,4,4 (default: 1, none)"
    )
    size = parser.add_argument_group("size, and starting from an image")
    size.add_argument("--width", type=positive, metavar="PIXELS", help="default: the base's own, or the image's")
    size.add_argument("--height", type=positive, metavar="PIXELS", help="default: the base's own, or the image's")
    size.add_argument("--init-image", metavar="FILE", help="change this image instead of starting from noise")
    size.add_argument(
        "--strength",
        type=float,
        metavar="SHARE",
        help="with --init-image: the share of the steps that are run, above 0 and up to 1 (default: 0.5)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the others count on (default: 0)")
    parser.add_argument("--batch-size", type=positive, default=16, help="images drawn at once (default: 16)")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], help="default: fp32 on a CPU, fp16 on a GPU")
    parser.add_argument(
        "--out", metavar="DIR", help="new folder for the images and grid.png (default: samples, samples-2, ...)"
    )


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts of --prompt, then of --prompts (a file or standard input); blank lines are passed over."""
    lines = list(args.prompt)
    if args.prompts == "-" and sys.stdin.isatty():
        print("Reading one prompt a line from standard input, up to Ctrl-D.", file=sys.stderr)
    if args.prompts:
        try:
            if args.prompts == "-":
                if isinstance(sys.stdin, io.TextIOWrapper):
                    sys.stdin.reconfigure(encoding="utf-8-sig", newline="\n")
                lines += lines_of(sys.stdin.read())
            else:
                lines += read_lines(pathlib.Path(args.prompts))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--prompts {args.prompts} cannot be read ({getattr(error, 'strerror', None) or 'it is no UTF-8'}); "
                "give a text file with one prompt a line, or '-' for standard input."
            ) from error
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise UserError("There is no prompt; give --prompt TEXT, or --prompts with a file or '-' for standard input.")
    return lines


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
    elif args.stage or args.teacher:
        raise UserError("--stage and --teacher choose within a training run; give --run-dir, or leave them out.")

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
    files = weight_files(folder / "unet")
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
    from reflow.sampling import PiecewiseFlowScheduler, contradiction

    told, says = [], source.settings
    if contradiction(config.get("prediction_type"), says["prediction_type"]):
        told.append(("prediction_type", config["prediction_type"], says["prediction_type"]))
    if config.get("_class_name") in SCHEDULERS:
        other = PiecewiseFlowScheduler.from_config(config)
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


def student_scheduler(source: Source, config: Any, steps: int | None) -> tuple[Any, int]:
    """(the student's scheduler or None for a base, steps). Raises UserError for fewer steps than windows."""
    from reflow.sampling import PiecewiseFlowScheduler

    if source.settings:
        if source.weights is None:
            refuse_contradiction(source, config)
        scheduler = PiecewiseFlowScheduler.for_student(config, **source.settings)
    elif config.get("_class_name") in SCHEDULERS:
        scheduler = PiecewiseFlowScheduler.from_config(config)
    else:
        return None, steps or TEACHER_STEPS
    count = len(scheduler.windows)
    if steps is not None and steps < count:
        raise UserError(
            f"--steps {steps} is fewer than the student's {count} windows, and every window needs a step; write "
            f"--steps {count} or more, or sample a stage with fewer windows."
        )
    scheduler.set_timesteps(steps or count)
    return scheduler, steps or count


def image_size(args: argparse.Namespace, base: Any, picture: Any) -> tuple[int, int] | None:
    """(height, width) that is asked for, or that of the image to start from, cut to what fits; None: the base's."""
    if args.width is None and args.height is None:
        if picture is None:
            return None
        cell = base.vae_scale_factor * 2 ** (len(base.configs["unet"]["block_out_channels"]) - 1)
        return max(picture.height // cell, 1) * cell, max(picture.width // cell, 1) * cell
    own = base.resolution
    return args.height or own, args.width or own


def open_image(path: str, channels: int) -> Any:
    """The picture that --init-image names, upright and in the base's colours. Raises UserError where it cannot be
    used."""
    from PIL import UnidentifiedImageError

    from reflow.data.pictures import open_picture, plain, upright

    try:
        with open_picture(path) as picture:
            return plain(upright(picture), channels)
    except Exception as error:  # PIL's readers raise almost anything on damaged files
        known = "it is no image" if isinstance(error, UnidentifiedImageError) else getattr(error, "strerror", None)
        raise UserError(
            f"--init-image {path} cannot be read ({known or error}); give a picture, such as a PNG or JPEG file."
        ) from error


def check_images(args: argparse.Namespace, student: bool) -> None:
    """Raises UserError for --strength and --init-image that do not go together or with what is sampled."""
    if args.strength is not None and not args.init_image:
        raise UserError("--strength belongs to --init-image; give an image, or leave --strength out.")
    if args.init_image and not student:
        raise UserError("--init-image is for few-step students; for a base use diffusers' image-to-image pipeline.")


def load(source: Source, device: Any, dtype: str) -> Any:
    """The base with the student's weights in it. Raises UserError where they do not fit."""
    from reflow.weights.files import dtype_of
    from reflow.weights.lora import student_state

    base = source.family.load(source.folder, device=device, dtype=dtype_of(dtype))
    if source.weights is not None:
        base.unet.load_state_dict(student_state(base.unet.state_dict(), source.weights))
    return base


def say_cuts(base: Any, prompts: list[str], negative: str | None) -> dict[str, int]:
    """How many tokens of each prompt are not read; said once on standard error, with what they are, if there are
    any."""
    from reflow.sampling.prompts import cut, cut_sentence

    named = {prompt: f"prompt {i + 1}" for i, prompt in enumerate(dict.fromkeys(prompts))}
    if negative:
        named.setdefault(negative, "the negative prompt")
    cuts = {prompt: cut(base.tokenizers, prompt) for prompt in named}
    told = cut_sentence([(name, cuts[prompt]) for prompt, name in named.items()])
    if told:
        print(f"reflow: {told}", file=sys.stderr)
    return {prompt: lost for prompt, (_, lost, _) in cuts.items()}


class StepCount:
    """A hook of the UNet that shows in the progress bar which step of a batch is running."""

    def __init__(self, bar: Any, steps: int):
        self.bar, self.steps, self.calls = bar, steps, 0

    def __call__(self, *_: Any) -> None:
        self.bar.set_postfix_str(f"step {self.calls % self.steps + 1} of {self.steps}", refresh=sys.stderr.isatty())
        self.calls += 1


def run(args: argparse.Namespace) -> int:
    prompts = [prompt for prompt in read_prompts(args) for _ in range(args.count)]
    if not 0 <= args.seed < 2**63 - len(prompts):
        raise UserError(f"--seed {args.seed} is out of range; write a number from 0 to 2^63.")
    # Everything that can be wrong is found before weights are read.
    source = find_source(args)

    import torch
    from tqdm import tqdm

    from reflow.outputs import undone
    from reflow.quiet import quiet_imports
    from reflow.weights.files import make_folder, public_name, refuse_existing

    out = pathlib.Path(args.out) if args.out else free_name("samples")
    refuse_existing(out)
    quiet_imports()
    from reflow.sampling import guidance_scales, sample, sample_teacher
    from reflow.sampling.pictures import from_pil, grid, to_pil, write_png
    from reflow.sampling.sampler import first_step, latent_shape

    config = source.family.load(source.folder, parts=())
    scheduler, steps = student_scheduler(source, config.scheduler_config, args.steps)
    check_images(args, scheduler is not None)
    channels = config.configs["vae"].get("in_channels", 3)
    picture = open_image(args.init_image, channels) if args.init_image else None
    size, strength = image_size(args, config, picture), 0.5 if args.strength is None else args.strength
    latent_shape(config, size)
    scales = guidance_scales(args.guidance, steps - (first_step(scheduler, strength) if picture else 0))
    if args.negative_prompt is not None and max(scales) <= 1:
        raise UserError("--negative-prompt does nothing without guidance; add --guidance with a number above 1.")
    if scheduler is None and len(set(scales)) > 1:
        raise UserError(f"--guidance {args.guidance}: a base is guided by one scale at all steps; write one number.")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("fp16" if device.type == "cuda" else "fp32")
    base = load(source, device, dtype)
    not_read = say_cuts(base, prompts, args.negative_prompt)
    null = None if args.negative_prompt is None else base.encode_prompts([args.negative_prompt], size)
    start = {} if picture is None else {"strength": strength, "init": base.encode_images(from_pil(picture, base, size))}

    name = public_name(source.name) if args.model else source.name
    note = {"model": name, "steps": steps, "guidance": list(scales) if len(set(scales)) > 1 else scales[0]}
    note |= {"windows": None if scheduler is None else list(scheduler.windows.boundaries), "dtype": dtype}
    note |= {"negative_prompt": args.negative_prompt} if args.negative_prompt is not None else {}
    note |= {"height": size[0], "width": size[1]} if size else {}
    note |= {"init_image": public_name(args.init_image), "strength": strength} if picture else {}
    pictures = []
    # One batch is over soon, but at a terminal its steps are worth seeing.
    few = len(prompts) <= args.batch_size and not sys.stderr.isatty()
    # In a log file a line now and then, as in training.
    interval = 0.5 if sys.stderr.isatty() else 20.0
    bar = tqdm(total=len(prompts), unit=" images", disable=few, dynamic_ncols=True, mininterval=interval)
    with bar, undone(out):
        base.unet.register_forward_pre_hook(StepCount(bar, len(scales)))
        for first in range(0, len(prompts), args.batch_size):
            some = prompts[first : first + args.batch_size]
            seeds = range(args.seed + first, args.seed + first + len(some))
            if scheduler is not None:
                drawn = sample(
                    base, base.unet, some, steps, seeds, scheduler=scheduler, guidance_scale=scales, null=null,
                    resolution=size, **start,
                )  # fmt: skip
            else:
                drawn = sample_teacher(
                    base, base.unet, some, steps, seeds, guidance_scale=scales[0], null=null, resolution=size
                )
            if not torch.isfinite(drawn.latents).all():
                hint = "try --dtype fp32" if dtype != "fp32" else "its weights are damaged, or its scheduler is wrong"
                raise UserError(f"{source.name} gives values that are not finite at {steps} steps in {dtype}; {hint}.")
            make_folder(out)  # not before: an interrupted command leaves no empty folder
            for prompt, seed, image in zip(some, seeds, drawn.images, strict=True):
                picture = to_pil(image)
                lost = {"tokens_not_read": not_read[prompt]} if not_read[prompt] else {}
                write_png(picture, out / f"{len(pictures):05d}.png", {"prompt": prompt, "seed": seed, **note, **lost})
                pictures.append(picture)
            bar.update(len(some))
    how = f"{steps} step{'s' * (steps != 1)} by {source.name}"
    if len(pictures) == 1:
        print(f"1 image, {how}: {out / '00000.png'}")
        return 0
    labels = [(prompt, f"{steps} step{'s' * (steps != 1)}, seed {args.seed + i}") for i, prompt in enumerate(prompts)]
    with undone(out):
        write_png(grid(pictures, labels, args.count if args.count > 1 else None), out / "grid.png", note)
    print(f"{len(pictures)} images, {how}: {out}, together in {out / 'grid.png'}")
    return 0
