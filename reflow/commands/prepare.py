"""`reflow prepare`: a folder of captioned images encoded once, for `data.source = "cache"`."""

from __future__ import annotations

import argparse

from reflow.commands.common import positive


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", required=True, help="of the base: sd15, sdxl or digits")
    parser.add_argument("--base", default="builtin", help="diffusers folder or hub name ('builtin': the digits model)")
    parser.add_argument("--data", required=True, metavar="DIR", help="images with .txt files or a metadata.jsonl")
    parser.add_argument("--out", required=True, metavar="DIR", help="the cache; the same command goes on with it")
    parser.add_argument("--resolution", type=positive, help="side in pixels (default: the base's own)")
    parser.add_argument("--caption", metavar="TEXT", help="of images that have none (default: that is an error)")
    parser.add_argument("--batch-size", type=positive, default=8, help="images encoded at once (default: 8)")
    parser.add_argument("--shard-size", type=positive, default=256, help="images a shard (default: 256)")
    parser.add_argument(
        "--max-bad-share", type=float, default=0.05, help="share of images that may be unreadable (default: 0.05)"
    )


def run(args: argparse.Namespace) -> int:
    import torch

    from reflow.data import sources
    from reflow.data.prepare import Preparation
    from reflow.models import registry
    from reflow.training.progress import Progress

    family = registry.family(args.family)
    items = sources.folder(args.data, args.caption)
    base = family.load(args.base, device="cuda" if torch.cuda.is_available() else "cpu", parts=("vae", "text"))
    work = Preparation(base, items, args.out, resolution=args.resolution or base.resolution, batch_size=args.batch_size,
                       shard_size=args.shard_size, max_bad_share=args.max_bad_share)  # fmt: skip
    bar = Progress("preparing", len(items), 0, True)
    try:
        counts = work.run(bar.advance)["counts"]
    finally:
        bar.close()
    skipped = f", {counts['skipped']} skipped (skipped.jsonl says why)" if counts["skipped"] else ""
    empty = f", {counts['empty_captions']} with an empty caption" if counts["empty_captions"] else ""
    print(f"{counts['images']} images and {counts['captions']} distinct captions in {args.out}{skipped}{empty}")
    print(f"Train on them with --set data.source=cache --set data.path={args.out}")
    return 0
