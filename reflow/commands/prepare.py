"""`reflow prepare`: captioned images encoded once, for `data.source = "cache"`; with --pairs, windows solved once."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shlex
import sys
from typing import Any

from reflow.commands import prepare_pairs
from reflow.commands.common import positive, single_file_arguments, single_file_options
from reflow.errors import UserError
from reflow.outputs import check_output

INTERRUPTED = "the same command goes on with what is done"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", help="of the base: sd15, sdxl, digits, sd3, flux, sana, qwen-image, z-image or a .py file")
    parser.add_argument("--base", default="builtin", help="diffusers folder or hub name ('builtin': the digits model)")
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="folder of images with .txt files or a metadata.jsonl, of webdataset tars or of parquet files, a saved "
        "`datasets` folder, or a dataset's name on the hub",
    )
    parser.add_argument("--image-column", default="", metavar="NAME", help="of parquet and datasets")
    parser.add_argument("--caption-column", default="", metavar="NAME", help="of parquet, datasets and a tar's .json")
    parser.add_argument("--split", default="train", help="of a dataset (default: train)")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder; the same command goes on with it")
    parser.add_argument("--resolution", type=positive, help="side in pixels (default: the base's own)")
    parser.add_argument(
        "--buckets",
        nargs="*",
        metavar="WIDTHxHEIGHT",
        help="bring every image to the size with the nearest aspect ratio, of these or of the usual table at the "
        "resolution's area",
    )
    parser.add_argument(
        "--null-prompt",
        choices=("base", "zeros", "empty"),
        default="base",
        help="what a dropped caption becomes: as the base's own pipeline has it (default), zeros, or an encoded ''",
    )
    parser.add_argument("--caption", metavar="TEXT", help="of images that have none (default: that is an error)")
    parser.add_argument(
        "--caption-lines", action="store_true", help="every line of a caption is a caption of the image"
    )
    parser.add_argument(
        "--shuffle-tags",
        type=positive,
        default=1,
        metavar="N",
        help="N orders of a caption's comma-separated tags, the first as it stands (default: 1)",
    )
    parser.add_argument("--keep-tags", type=int, default=0, metavar="K", help="the first K tags stay in front")
    parser.add_argument(
        "--batch-size", type=positive, help="images encoded at once (default: 8 at 512 x 512, fewer for larger ones)"
    )
    parser.add_argument("--shard-size", type=positive, default=256, help="images a shard (default: 256)")
    parser.add_argument("--text-dtype", choices=("fp32", "fp16"), default="fp32", help="of stored captions")
    parser.add_argument(
        "--workers", type=positive, help="processes, each on a GPU of its own (default: as many as GPUs, else 1)"
    )
    parser.add_argument(
        "--max-bad-share", type=float, default=0.05, help="share of images that may be unreadable (default: 0.05)"
    )
    single_file_arguments(parser)
    prepare_pairs.arguments(parser.add_argument_group("stored pairs: --pairs COUNT --recipe NAME --out DIR"))


def load(family: str, base: str, options: dict[str, str], device: str, null_prompt: str = "base") -> Any:
    """The base's encoders on a device; a worker process calls this too."""
    from reflow.models import registry

    found = dataclasses.replace(registry.family(family), null_prompt=null_prompt)
    return found.load(base, device=device, parts=("vae", "text"), **options)


class Bar:
    """A bar of images; what goes on beside them (captions, the sizes' reading) stands behind it."""

    def __init__(self, totals: dict[str, int]) -> None:
        from tqdm import tqdm

        # In a log file a line every 20 seconds instead of redrawing.
        interval = 0.5 if sys.stderr.isatty() else 20.0
        self.totals, self.done = totals, dict.fromkeys(totals, 0)
        self.bar = tqdm(total=totals["images"], desc="preparing", unit=" images", mininterval=interval,
                        dynamic_ncols=True, smoothing=0.05)  # fmt: skip

    def advance(self, kind: str, count: int) -> None:
        self.done[kind] = min(self.done[kind] + count, self.totals[kind])
        beside = [f"{self.done[k]} of {n} {k}" for k, n in self.totals.items() if k != "images" and self.done[k] < n]
        self.bar.set_postfix_str("; ".join(beside), refresh=kind != "images" and sys.stderr.isatty())
        if kind == "images":
            self.bar.update(self.done[kind] - self.bar.n)

    def close(self) -> None:
        self.bar.close()


def run(args: argparse.Namespace) -> int:
    if args.pairs:
        return prepare_pairs.run(args)
    for name in ("family", "data"):
        if getattr(args, name) is None:
            raise UserError(
                f"Write --{name} too: `reflow prepare` encodes the images of --data with the model of --base, or solves "
                "--pairs."
            )
    check_output(args.out)
    import os

    import torch

    from reflow.data import buckets, workers
    from reflow.data.prepare import Preparation
    from reflow.data.sources import open_source

    options = single_file_options(args)
    loader = functools.partial(load, args.family, args.base, options, null_prompt=args.null_prompt)
    source = open_source(args.data, caption=args.caption, image_column=args.image_column,
                         caption_column=args.caption_column, split=args.split, caption_lines=args.caption_lines,
                         shuffle_tags=args.shuffle_tags, keep_tags=max(args.keep_tags, 0))  # fmt: skip
    base = loader(workers.device_of(0))
    resolution = args.resolution or base.resolution
    sizes = [(resolution, resolution)]
    if args.buckets is not None:
        sizes = buckets.parse(args.buckets, base) if args.buckets else buckets.table(base, resolution)
    count = args.workers or max(1, torch.cuda.device_count())
    work = Preparation(base, source, args.out, sizes=sizes, batch_size=args.batch_size, shard_size=args.shard_size,
                       max_bad_share=args.max_bad_share, text=args.text_dtype,
                       threads=max(1, min(8, (os.cpu_count() or 1) // count)))  # fmt: skip
    bar = Bar(work.totals)
    try:
        manifest = work.run(bar.advance, count=count, loader=loader)
    finally:
        bar.close()
    counts = manifest["counts"]
    notes = {
        "skipped": "skipped (skipped.jsonl says why)",
        "empty_captions": "with an empty caption",
        "cut_captions": "captions longer than the tokenizer takes, whose end is not seen",
    }
    said = "".join(f", {counts[name]} {words}" for name, words in notes.items() if counts[name])
    print(f"{counts['images']} images and {counts['captions']} distinct captions in {args.out}{said}")
    if len(sizes) > 1:
        shapes = {tuple(s["shape"][1:]): 0 for s in manifest["shards"]["latents"]}
        for shard in manifest["shards"]["latents"]:
            shapes[tuple(shard["shape"][1:])] += shard["rows"]
        factor = base.vae_scale_factor
        print("; ".join(f"{w * factor}x{h * factor}: {rows}" for (h, w), rows in shapes.items()))
    print(f"Train on them with {hint(args)}")
    return 0


def hint(args: argparse.Namespace) -> str:
    """The options of `reflow train` that name this cache and the base that it was made for, ready for a shell."""
    keys = {"data.source": "cache", "data.path": args.out, "model.base": args.base}
    keys |= {"model.tokenizer": args.tokenizer, "model.config": args.config}
    keys |= {"model.prediction_type": args.base_prediction_type, "model.null_prompt": args.null_prompt}
    usual = {("model.base", "builtin"), ("model.null_prompt", "base")}
    given = {key: value for key, value in keys.items() if value and (key, value) not in usual}
    return " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in given.items())
