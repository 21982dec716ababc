"""Images and captions in, a cache of latents and encoded captions out, one whole shard after another."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from safetensors.torch import save_file

from reflow.data.cache import MANIFEST, check_base, fingerprint, read_manifest
from reflow.data.sources import Item, square
from reflow.errors import UserError
from reflow.models.family import Base


def write_json(path: Path, content: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def write_shard(path: Path, table: pyarrow.Table, notes: dict[str, Any]) -> None:
    """A shard and its notes; the shard appears last and whole, and its size in the notes shows later damage."""
    from datasets.arrow_writer import ArrowWriter

    temporary = path.with_name(f".{path.name}.tmp")
    writer = ArrowWriter(path=str(temporary), schema=table.schema)
    writer.write_table(table)
    writer.finalize()
    write_json(path.with_suffix(".json"), {"file": path.name, "rows": len(table), "bytes": os.path.getsize(temporary), **notes})
    os.replace(temporary, path)


def notes_of(path: Path) -> dict[str, Any] | None:
    """The notes of a whole shard; None where it is missing or damaged."""
    try:
        notes = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return notes if os.path.getsize(path) == notes["bytes"] else None
    except (OSError, ValueError, KeyError):
        return None


def vectors(rows: np.ndarray) -> pyarrow.Array:
    """[n, ...] fp32 as a column of fixed-size lists."""
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1).astype(np.float32)), int(np.prod(rows.shape[1:])))


class Preparation:
    """One cache in the making. The same call goes on after a kill; finished shards are never made again."""

    def __init__(self, base: Base, items: list[Item], out: str | Path, *, resolution: int, batch_size: int = 8, shard_size: int = 256,
                 max_bad_share: float = 0.05) -> None:
        self.base, self.items, self.out, self.resolution = base, items, Path(out), resolution
        self.batch, self.size, self.max_bad = batch_size, shard_size, max_bad_share
        self.captions = list(dict.fromkeys(item.caption for item in items))
        self.row_of = {caption: row for row, caption in enumerate(self.captions)}
        self.latent_shape = base.latent_shape(resolution)

    def begin(self) -> dict[str, Any]:
        """The manifest of the new or unfinished cache in `out`. Raises UserError for another cache's folder."""
        listed = [(i.key, i.caption, os.path.getsize(i.path) if i.path.exists() else -1) for i in self.items]
        source = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        settings = {"resolution": self.resolution, "source": source, "shard_size": self.size, "images": len(self.items)}
        if (self.out / MANIFEST).exists():
            manifest = read_manifest(self.out)
            check_base(manifest, self.base, self.out)
            other = [f"{k}: {manifest['settings'].get(k)} -> {v}" for k, v in settings.items() if manifest["settings"].get(k) != v]
            if other:
                raise UserError(f"{self.out} holds a cache of other settings or images ({'; '.join(other)}); give another --out.")
            return manifest
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"--out {self.out} is not empty and holds no cache; give a new folder.")
        self.out.mkdir(parents=True, exist_ok=True)
        manifest = {"complete": False, "fingerprint": fingerprint(self.base), "base": str(self.base.path), "settings": settings}
        write_json(self.out / MANIFEST, manifest)
        return manifest

    def run(self, progress: Callable[[int], None] = lambda images: None) -> dict[str, Any]:
        """Make what is missing and return the finished manifest. `progress` hears of every shard's images."""
        manifest = self.begin()
        shards: dict[str, list[dict[str, Any]]] = {"latents": [], "text": []}
        null = self.base.null_conditioning(1, self.resolution).to("cpu", torch.float32)
        for first in range(0, len(self.captions), self.size):
            path = self.out / f"text-{first // self.size:05d}.arrow"
            if notes_of(path) is None:
                write_shard(path, self.text(self.captions[first:first + self.size]), {})
            shards["text"].append(notes_of(path))
        skipped: list[dict[str, str]] = []
        for first in range(0, len(self.items), self.size):
            path, part = self.out / f"latents-{first // self.size:05d}.arrow", self.items[first:first + self.size]
            if notes_of(path) is None:
                table, bad = self.latents(part)
                write_shard(path, table, {"skipped": bad})
            shards["latents"].append(notes_of(path))
            skipped += shards["latents"][-1].pop("skipped")
            self.check_bad(skipped)
            progress(len(part))
        tensors = {"encoder_hidden_states": null.encoder_hidden_states, "text_embeds": null.text_embeds, "time_ids": null.time_ids}
        temporary = self.out / ".null.tmp"
        save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, str(temporary))
        os.replace(temporary, self.out / "null.safetensors")
        pooled = null.text_embeds
        shapes = {"latent": list(self.latent_shape), "hidden": list(null.encoder_hidden_states.shape[1:]),
                  "pooled": None if pooled is None else list(pooled.shape[1:])}
        counts = {"images": sum(s["rows"] for s in shards["latents"]), "skipped": len(skipped), "captions": len(self.captions),
                  "empty_captions": sum(not i.caption for i in self.items)}
        if not counts["images"]:
            raise UserError(f"None of the {len(self.items)} images can be used; {self.out / 'skipped.jsonl'} says why of each.")
        manifest |= {"complete": True, "shards": shards, "shapes": shapes, "counts": counts}
        write_json(self.out / MANIFEST, manifest)
        return manifest

    def check_bad(self, skipped: list[dict[str, str]]) -> None:
        """Keep the list of skipped images, and stop where they are more than the share that is allowed."""
        if skipped:
            (self.out / "skipped.jsonl").write_text("".join(json.dumps(s) + "\n" for s in skipped), encoding="utf-8")
        if len(skipped) > self.max_bad * len(self.items):
            raise UserError(f"{len(skipped)} of {len(self.items)} images cannot be used, more than --max-bad-share {self.max_bad:g} allows "
                            f"(the first is {skipped[0]['file']}: {skipped[0]['reason']}); {self.out / 'skipped.jsonl'} lists them. Mend "
                            f"them, or allow a larger share.")

    def text(self, captions: list[str]) -> pyarrow.Table:
        """Both encoders' output of each caption; longer ones are cut by the tokenizer as the pipeline cuts prompts."""
        parts = [self.base.encode_prompts(captions[i:i + self.batch], self.resolution).to("cpu", torch.float32)
                 for i in range(0, len(captions), self.batch)]
        columns = {"text": pyarrow.array(captions), "hidden": vectors(torch.cat([p.encoder_hidden_states for p in parts]).numpy())}
        if parts[0].text_embeds is not None:
            columns["pooled"] = vectors(torch.cat([p.text_embeds for p in parts]).numpy())
        return pyarrow.table(columns)

    def latents(self, items: list[Item]) -> tuple[pyarrow.Table, list[dict[str, str]]]:
        """Latents of a shard's images, and which were skipped and why."""
        good, encoded, ids, bad = [], [], [], []
        for first in range(0, len(items), self.batch):
            pixels, names = [], []
            for item in items[first:first + self.batch]:
                try:
                    image, time_ids = square(item.load(), self.resolution, self.base.configs["vae"].get("in_channels", 3))
                except Exception as error:  # PIL's readers raise almost anything on damaged files
                    bad.append({"file": item.key, "reason": f"{type(error).__name__}: {error}"})
                    continue
                pixels.append(image)
                names.append(item)
                ids.append(time_ids)
            if pixels:
                encoded.append(self.encode(np.stack(pixels), names))
                good += names
        rows = np.concatenate(encoded) if encoded else np.zeros((0, *self.latent_shape), np.float32)
        times = np.asarray(ids, np.float32).reshape(-1, 6)
        columns = {"key": pyarrow.array([i.key for i in good], pyarrow.string()), "latent": vectors(rows), "time_ids": vectors(times),
                   "caption": pyarrow.array([self.row_of[i.caption] for i in good], pyarrow.int32())}
        return pyarrow.table(columns), bad

    def encode(self, pixels: np.ndarray, items: list[Item]) -> np.ndarray:
        latents = self.base.encode_images(torch.from_numpy(pixels)).float().cpu()
        finite = torch.isfinite(latents).flatten(1).all(1)
        if not finite.all():
            raise UserError(f"The VAE at {self.base.path}, in fp32, gives NaN or infinity for {items[int((~finite).nonzero()[0])].path}; check "
                            f"the VAE's weights, or take that image away.")
        return latents.numpy()
