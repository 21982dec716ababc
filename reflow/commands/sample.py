"""`reflow sample`: images from prompts, with a run's student, an exported folder or a base."""

from __future__ import annotations

import argparse
import io
import pathlib
import sys
from typing import Any

from reflow.commands.common import (
    free_name,
    positive,
    reading_arguments,
    single_file_arguments,
)
from reflow.commands.sampled import TEACHER_STEPS, find_source, load, refuse_parts, student_scheduler
from reflow.errors import UserError
from reflow.lines import lines_of, read_lines

INTERRUPTED = "images of finished batches are kept; the same command with another --out draws all of them again"


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
        "--steps", type=step_counts, metavar="N", help="in all, or of each window from noise to data as 1,9 (default: one for "
        f"each window of a student, {TEACHER_STEPS} for a base)",
    )
    parser.add_argument(
        "--teacher-windows", type=step_counts, metavar="K", help="with --run-dir: windows, from 1 at the noisy end, that the "
        "base solves instead of the student, as 2 or 3,4",
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


def step_counts(text: str) -> tuple[int, ...]:
    """An argparse type: whole numbers of at least 1, with commas between them."""
    return tuple(positive(part.strip()) for part in text.split(","))


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


def image_size(args: argparse.Namespace, base: Any, picture: Any) -> tuple[int, int] | None:
    """(height, width) that is asked for, or that of the image to start from, cut to what fits; None: the base's."""
    if args.width is None and args.height is None:
        if picture is None:
            return None
        cell = base.cell
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
    from reflow.sampling import guidance_scales, sample, sample_parts, sample_teacher
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
    if args.teacher_windows:
        refuse_parts(args, scheduler, scales)
    if scheduler is None and len(set(scales)) > 1:
        raise UserError(f"--guidance {args.guidance}: a base is guided by one scale at all steps; write one number.")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("fp16" if device.type == "cuda" else "fp32")
    base = load(source, device, dtype)
    teacher = load(source, device, dtype, student=False) if args.teacher_windows else None
    not_read = say_cuts(base, prompts, args.negative_prompt)
    null = None if args.negative_prompt is None else base.encode_prompts([args.negative_prompt], size)
    start = {} if picture is None else {"strength": strength, "init": base.encode_images(from_pil(picture, base, size))}

    counts = args.steps if args.steps and len(args.steps) > 1 else None  # of each window
    name = public_name(source.name) if args.model else source.name
    note = {"model": name, "steps": steps, "guidance": list(scales) if len(set(scales)) > 1 else scales[0]}
    note |= {"windows": None if scheduler is None else list(scheduler.windows.boundaries), "dtype": dtype}
    note |= {"steps_per_window": list(counts)} if counts else {}
    note |= {"teacher_windows": list(args.teacher_windows)} if args.teacher_windows else {}
    note |= {"negative_prompt": args.negative_prompt} if args.negative_prompt is not None else {}
    note |= {"height": size[0], "width": size[1]} if size else {}
    note |= {"init_image": public_name(args.init_image), "strength": strength} if picture else {}
    how_to = dict(scheduler=scheduler, null=null, resolution=size)

    def draw(some: list[str], seeds: range) -> Any:
        """A batch of the student, which shares the windows with the base where that is asked for."""
        if teacher is None:
            return sample(base, base.unet, some, counts or steps, seeds, guidance_scale=scales, **how_to, **start)
        taught = [number - 1 for number in args.teacher_windows]
        split = counts or scheduler.counts(steps)
        scale = dict(guidance_scale=scales[0], teacher_guidance_scale=scales[0])
        return sample_parts(teacher, base.unet, some, split, seeds, teacher_windows=taught, **scale, **how_to)

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
                drawn = draw(some, seeds)
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
