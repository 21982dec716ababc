"""Images and captions in, a cache of latents and encoded captions out, one batch after another and by several "
"processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch

from reflow.data import buckets, workers
from reflow.data.cache import COLUMNS, MANIFEST, check_base, fingerprint, read_manifest
from reflow.data.encode import Encoder, cut_captions
from reflow.data.shards import Skipped, grow, notes_of, npy, tidy, vectors, write_json
from reflow.data.source import Source
from reflow.errors import UserError
from reflow.locks import alone
from reflow.models.conditioning import UNET
from reflow.models.family import Base
from reflow.outputs import others, write_text, written
from reflow.weights.files import save_tensors

Progress = Callable[[str, int], None]  # (kind as in `Preparation.totals`, how many more)
SCAN = 256  # image headers read at once
FLOATS = {"fp32": np.float32, "fp16": np.float16}


@dataclass(frozen=True)
class Task:
    """One shard: captions or images `rows` (of the plan's order), images fitted to (height, width) `size`."""

    file: str
    rows: range
    size: buckets.Size | None = None

    @property
    def kind(self) -> str:
        return "captions" if self.size is None else "images"


class Preparation:
    """One cache in the making. The same call goes on after a kill; no batch that was finished is made again.

    sizes: (height, width) that images are brought to; more than one: each image goes to the nearest aspect ratio.
    batch_size: images encoded at once, by default 8 at 512 x 512 and fewer for larger ones. text: of stored captions,
    fp32 or fp16.
    """

    def __init__(
        self,
        base: Base,
        source: Source,
        out: str | Path,
        *,
        sizes: list[buckets.Size],
        batch_size: int | None = None,
        shard_size: int = 256,
        max_bad_share: float = 0.05,
        text: str = "fp32",
        threads: int = 4,
    ) -> None:
        self.source, self.out, self.sizes, self.text, self.threads = source, Path(out), sizes, text, threads
        self.batch = batch_size or max(1, min(8, 8 * 512**2 // max(h * w for h, w in sizes)))
        self.size, self.max_bad = shard_size, max_bad_share
        self.shapes = {size: buckets.latent_shape(base, size) for size in sizes}
        words = [source.caption(number) for number in range(len(source))]
        self.captions = list(dict.fromkeys(words))
        row_of = {caption: row for row, caption in enumerate(self.captions)}
        self.caption_of = np.array([row_of[w] for w in words], np.int32)
        self.empty = sum(not words[number] and not source.fault(number) for number in range(len(words)))
        self.cut = cut_captions(base, self.captions)
        self.use(base)

    def use(self, base: Base) -> None:
        """Encode with this base: a worker's own copy."""
        self.base, self.encoder = base, Encoder(base, self.source, self.threads)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("base", "encoder")}

    @property
    def totals(self) -> dict[str, int]:
        """What `progress` counts to, by kind: with buckets the images' sizes, which are read first; captions; images."""
        sizes = {"sizes": len(self.source)} if len(self.sizes) > 1 else {}
        return {**sizes, "captions": len(self.captions), "images": len(self.source)}

    def begin(self) -> dict[str, Any]:
        """The manifest of the new or unfinished cache in `out`. Raises UserError for another cache's folder."""
        settings = {
            "sizes": [list(s) for s in self.sizes],
            "source": self.source.digest(),
            "shard_size": self.size,
            "images": len(self.source),
            "text": self.text,
        }
        if (self.out / MANIFEST).exists():
            manifest = read_manifest(self.out)
            check_base(manifest, self.base, self.out, other_unet=True)
            if manifest["fingerprint"].get("unet") not in (None, fingerprint(self.base)["unet"]):
                raise UserError(
                    f"--out {self.out} holds a cache that was made with the base {manifest.get('base')}, whose UNet is "
                    "another; give another --out, or train this UNet on that cache with --set data.other_unet=true."
                )
            other = [
                f"{k}: {manifest['settings'].get(k)} -> {v}"
                for k, v in settings.items()
                if manifest["settings"].get(k) != v
            ]
            if other:
                raise UserError(
                    f"{self.out} holds a cache of other settings or images ({'; '.join(other)}); give another --out."
                )
        elif others(self.out):
            raise UserError(f"--out {self.out} is not empty and holds no cache; give a new folder.")
        else:
            manifest = {
                "complete": False,
                "fingerprint": fingerprint(self.base),
                "base": str(self.base.path),
                "settings": settings,
            }
            write_json(self.out / MANIFEST, manifest)
        (self.out / "skipped.jsonl").unlink(missing_ok=True)
        return manifest

    def run(
        self,
        progress: Progress = lambda *_: None,
        *,
        count: int = 1,
        loader: workers.Loader | None = None,
    ) -> dict[str, Any]:
        """Make what is missing and return the finished manifest. `progress` hears of every batch.

        count: processes; those after this one load their base by `loader(device)`.
        """
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file; give a new folder.")
        new = not self.out.exists()
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            with alone(self.out, "A `reflow prepare`"):
                return self.work(self.begin(), progress, count, loader)
        except (UserError, OSError):
            if new and not (self.out / MANIFEST).exists():
                shutil.rmtree(self.out, ignore_errors=True)
            raise

    def work(
        self, manifest: dict[str, Any], progress: Progress, count: int, loader: workers.Loader | None
    ) -> dict[str, Any]:
        self.order = self.plan(progress)
        tasks = self.tasks()
        missing, skipped = [], []
        for task in tasks:
            notes = notes_of(self.out / task.file)
            if notes is None:
                missing.append(task)
            else:
                progress(task.kind, len(task.rows))
                skipped += notes["skipped"]
        self.check_bad(skipped)
        for kind, done, bad in workers.share(self, missing, count, loader):
            progress(kind, done)
            skipped += bad
            self.check_bad(skipped)
        return self.finish(manifest, tasks)

    def plan(self, progress: Progress) -> list[np.ndarray]:
        """For every size the numbers of its images. What the headers say is kept, so that they are read once."""
        if len(self.sizes) == 1:
            return [np.arange(len(self.source))]
        kept = self.out / "sizes.npy"
        if kept.exists():
            found = np.load(kept)
            progress("sizes", len(found))
        else:
            parts = [range(first, min(first + SCAN, len(self.source))) for first in range(0, len(self.source), SCAN)]
            rows = []
            for part in self.encoder.pool.map(self.source.sizes, parts):
                rows.append(part)
                progress("sizes", len(part))
            found = np.concatenate(rows)
            with written(kept) as temporary, open(temporary, "wb") as file:
                file.write(npy(found))
        bucket = buckets.nearest(self.sizes, found)
        return [np.flatnonzero(bucket == b) for b in range(len(self.sizes))]

    def tasks(self) -> list[Task]:
        """Every shard, in the order in which a data set holds them."""
        found = [Task(f"text-{n:05d}.arrow", rows) for n, rows in enumerate(parts(len(self.captions), self.size))]
        for (h, w), numbers in zip(self.sizes, self.order, strict=True):
            name = "latents" if len(self.sizes) == 1 else f"latents-{w}x{h}"
            found += [
                Task(f"{name}-{n:05d}.arrow", rows, (h, w)) for n, rows in enumerate(parts(len(numbers), self.size))
            ]
        return found

    def make(self, task: Task) -> Iterator[tuple[str, int, Skipped]]:
        """Make one shard; yields (kind, items, skipped) as they are done."""
        batches = self.text_batches if task.size is None else self.image_batches
        for items, skipped in grow(self.out / task.file, len(task.rows), lambda done: batches(task, done)):
            yield task.kind, items, skipped

    def text_batches(self, task: Task, done: int) -> Iterator[tuple[int, pyarrow.Table, Skipped]]:
        """Both encoders' output of each caption."""
        for rows in parts(len(task.rows), self.batch, done):
            captions = [self.captions[task.rows[r]] for r in rows]
            encoded = self.encoder.text(captions)
            columns = {"text": pyarrow.array(captions)}
            columns |= {COLUMNS.get(name, name): vectors(self.floats(rows_of)) for name, rows_of in encoded.parts(of_image=False)}
            yield rows.stop, pyarrow.table(columns), []

    def floats(self, values: torch.Tensor) -> np.ndarray:
        stored = values.numpy().astype(FLOATS[self.text])
        if not np.isfinite(stored).all():
            raise UserError(
                f"A caption's encoding does not fit {self.text} or is not finite; write --text-dtype fp32, or look at "
                f"the "
                f"text encoders' weights at {self.base.path}."
            )
        return stored

    def image_batches(self, task: Task, done: int) -> Iterator[tuple[int, pyarrow.Table, Skipped]]:
        """Latents of a shard's images, and which were skipped and why."""
        numbers = self.order[self.sizes.index(task.size)][task.rows.start : task.rows.stop]
        spans = list(parts(len(numbers), self.batch, done))
        for span, pictures in zip(
            spans, self.encoder.pictures((numbers[s.start : s.stop].tolist() for s in spans), task.size), strict=True
        ):
            pairs = list(zip(numbers[span.start : span.stop].tolist(), pictures, strict=True))
            bad = [{"file": self.source.key(n), "reason": p} for n, p in pairs if isinstance(p, str)]
            good = [(n, *p) for n, p in pairs if not isinstance(p, str)]
            numbers_of = [n for n, _, _ in good]
            rows = np.zeros((0, *self.shapes[task.size]), np.float32)
            if good:
                rows = self.encoder.latents(np.stack([p for _, p, _ in good]), numbers_of)
            times = np.asarray([t for _, _, t in good], np.float32).reshape(-1, 6)
            columns = {
                "key": pyarrow.array([self.source.key(n) for n in numbers_of], pyarrow.string()),
                "latent": vectors(rows),
                "time_ids": vectors(times),
                "caption": pyarrow.array(self.caption_of[numbers_of], pyarrow.int32()),
            }
            yield span.stop, pyarrow.table(columns), bad

    def check_bad(self, skipped: Skipped) -> None:
        """Stop where more images are skipped than the share that is allowed."""
        if len(skipped) > self.max_bad * len(self.source):
            self.list_bad(skipped)
            raise UserError(
                f"{len(skipped)} of {len(self.source)} images cannot be used, more than --max-bad-share "
                f"{self.max_bad:g} allows "
                f"(the first is {skipped[0]['file']}: {skipped[0]['reason']}); {self.out / 'skipped.jsonl'} lists "
                f"them. Allow a "
                f"larger share, or mend them and prepare into another --out."
            )

    def list_bad(self, skipped: Skipped) -> None:
        if skipped:
            write_text(self.out / "skipped.jsonl", "".join(json.dumps(s) + "\n" for s in skipped))

    def finish(self, manifest: dict[str, Any], tasks: list[Task]) -> dict[str, Any]:
        """The null prompt and the finished manifest."""
        shards: dict[str, list[dict[str, Any]]] = {"latents": [], "text": []}
        skipped: Skipped = []
        for task in tasks:
            notes = notes_of(self.out / task.file)
            skipped += notes.pop("skipped")
            shards["latents" if task.size else "text"].append(
                notes | ({"shape": list(self.shapes[task.size])} if task.size else {})
            )
        self.list_bad(skipped)
        counts = {
            "images": sum(s["rows"] for s in shards["latents"]),
            "skipped": len(skipped),
            "captions": len(self.captions),
            "empty_captions": self.empty,
            "cut_captions": self.cut,
        }
        if not counts["images"]:
            raise UserError(
                f"None of the {len(self.source)} images can be used; {self.out / 'skipped.jsonl'} says why of each."
            )
        rows = {size: sum(notes_of(self.out / t.file)["rows"] for t in tasks if t.size == size) for size in self.sizes}
        commonest = max(self.sizes, key=rows.get)
        null = self.base.null_conditioning(1, commonest).to("cpu", torch.float32)
        with written(self.out / "null.safetensors") as temporary:
            save_tensors({name: rows_of.contiguous() for name, rows_of in null.rows.items()}, temporary)
        tidy(self.out)
        told = {COLUMNS.get(name, name): list(rows_of.shape[1:]) for name, rows_of in null.parts(of_image=False)}
        shapes = {"hidden": None, "pooled": None, **told}
        call = {} if null.call == UNET else {"call": null.call}  # earlier manifests are of UNets and do not say so
        left = {reason: {"count": count, "first": name} for reason, (count, name) in self.source.left.items()}
        manifest |= {"complete": True, "shards": shards, "shapes": shapes, "counts": counts, "left_out": left, **call}
        write_json(self.out / MANIFEST, manifest)
        return manifest


def parts(total: int, size: int, first: int = 0) -> Iterator[range]:
    """Consecutive ranges of at most `size` from `first` to `total`, on the same grid wherever `first` lies."""
    while first < total:
        end = min((first // size + 1) * size, total)
        yield range(first, end)
        first = end
