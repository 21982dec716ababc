"""A prepared folder: memory-mapped Arrow shards of latents and encoded captions, with a manifest that says what made "
"them."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from reflow.data.shapes import Shaped, grouped
from reflow.data.shards import Column
from reflow.errors import UserError
from reflow.models.conditioning import OF_IMAGE, UNET, Conditioning
from reflow.models.family import Base
from reflow.weights.files import weight_files

VERSION = 2  # of the code that encodes: raised when the same image would give other numbers
MANIFEST = "manifest.json"
# Columns of the shards that have other names than the rows they hold, and the order that rows of these names have.
COLUMNS = {"encoder_hidden_states": "hidden", "text_embeds": "pooled"}
ORDER = ("encoder_hidden_states", "text_embeds")
HEAD = 1024  # elements of each tensor that identify a UNet, which is not loaded to encode


def digest_of(networks: Any, *settings: Any) -> str:
    """Hash of networks' tensors, as they are loaded, and of settings."""
    total = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            total.update(f"{name} {tuple(tensor.shape)}".encode())
            total.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return total.hexdigest()


def fingerprint(base: Base) -> dict[str, Any]:
    """What decides the numbers in a cache, of a base in fp32: family, and hashes of its VAE and of its text "
    "encoders; and its UNet, which decides none of them but is the one that a run trains."""
    vae = {k: base.configs["vae"].get(k) for k in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")}
    words = [(sorted(t.get_vocab().items()), t.model_max_length) for t in base.tokenizers]
    told = base.configs["pipeline"].get("force_zeros_for_empty_prompt", True)
    own = base.family.pooled and bool(told)
    null = "zeros" if base.zero_null else "empty"
    return {
        "version": VERSION,
        "family": base.family.name,
        "vae": digest_of([base.vae], vae),
        "text": digest_of(base.text_encoders, words, told if base.zero_null == own else null),
        "null": null,
        "unet": digest_of_unet(base),
    }


def digest_of_unet(base: Base) -> str | None:
    """Hash of names, shapes and first elements (as fp32) of the UNet's tensors on disk, read without loading it; None
    where the base holds no safetensors file of it."""
    files = weight_files(Path(base.path) / base.family.network[0])
    if not files:
        return None
    total, found = hashlib.sha256(), {}
    for path in files:
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                shape = part.get_shape()
                # A slice of the first axis is what is read; the rest of the row costs memory for one tensor only.
                head = part[:1] if shape else file.get_tensor(name)
                found[name] = (shape, head.flatten()[:HEAD].float().contiguous().numpy().tobytes())
    for name, (shape, head) in sorted(found.items()):
        total.update(f"{name} {shape}".encode())
        total.update(head)
    return total.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is no prepared data set: {folder / MANIFEST} is missing or not readable. Write the --out of "
            f"`reflow prepare` as data.path."
        ) from error


def check_base(manifest: dict[str, Any], base: Base, folder: Path, other_unet: bool = False) -> None:
    """Refuse a cache that another model made; other_unet: one with the same VAE and text encoders will do."""
    made, now = manifest["fingerprint"], fingerprint(base)
    names = {"version": "version of the encoding code", "family": "family", "vae": "VAE", "text": "text encoders"}
    wrong = [name for key, name in names.items() if made.get(key) != now[key]]
    if made.get("null", now["null"]) != now["null"]:
        wrong = [
            f"null prompt ({made['null']} there, {now['null']} here: model.null_prompt, and --null-prompt of prepare)"
            if name == "text encoders"
            else name
            for name in wrong
        ]
    if wrong:
        raise UserError(
            f"The cache {folder} was made by {made.get('family')} at {manifest.get('base')}, and this is "
            f"{now['family']} at "
            f"{base.path}: they differ in {', '.join(wrong)}. Use that base, or run `reflow prepare` into another "
            f"folder."
        )
    theirs, ours = made.get("unet"), now["unet"]
    if theirs is None and manifest.get("base") != str(base.path) and os.environ.get("RANK", "0") == "0":
        print(
            f"reflow: the cache {folder} is of an earlier version and does not say which UNet it was made beside; it was "
            f"made with {manifest.get('base')}, and this is {base.path}.",
            file=sys.stderr,
        )
    if theirs and ours and theirs != ours and not other_unet:
        raise UserError(
            f"The cache {folder} was made with the base {manifest.get('base')}, and this run trains the UNet of "
            f"{base.path}, which is another model. Write --set model.base={manifest.get('base')}; or, if this UNet is meant "
            f"(VAE and text encoders are the same, so its latents and captions fit), --set data.other_unet=true."
        )


class CachedDataset(Shaped):
    """A prepared folder with the interface of `LatentDataset`. Raises UserError for a folder that is not whole or "
    "fits another base."""

    def __init__(self, path: str | Path, base: Base, *, other_unet: bool = False) -> None:
        import datasets

        folder = Path(path)
        manifest = read_manifest(folder)
        if not manifest["complete"]:
            raise UserError(
                f"The cache {folder} is not finished; run the same `reflow prepare` again, it goes on where it was."
            )
        check_base(manifest, base, folder, other_unet)
        tables: dict[str, list[Any]] = {"latents": [], "text": []}
        for kind, shards in manifest["shards"].items():
            for shard in shards:
                file = folder / shard["file"]
                if not file.is_file() or os.path.getsize(file) != shard["bytes"]:
                    raise UserError(
                        f"The shard {file} is missing or cut short; run the same `reflow prepare` again, it makes the "
                        f"shards "
                        f"that are not whole."
                    )
                tables[kind].append(datasets.Dataset.from_file(str(file)).data)
        shapes = manifest["shapes"]
        latents = manifest["shards"]["latents"]
        kinds = list(dict.fromkeys(tuple(s["shape"]) for s in latents))
        self.latents = [
            Column(
                [t for t, s in zip(tables["latents"], latents, strict=True) if tuple(s["shape"]) == kind],
                "latent",
                kind,
            )
            for kind in kinds
        ]
        self.groups = grouped([len(column) for column in self.latents], kinds)
        self.latents = [column for column in self.latents if len(column)]
        self.text = tables["text"]
        null = load_file(str(folder / "null.safetensors"))
        # In the order of the null prompt's own rows, which is that of the family.
        names = sorted(null, key=lambda name: (name in OF_IMAGE, ORDER.index(name) if name in ORDER else len(ORDER), name))
        self.null = Conditioning(call=manifest.get("call", UNET), **{name: null[name] for name in names})
        self.told = {n: Column(tables["text"], COLUMNS.get(n, n), shapes[COLUMNS.get(n, n)]) for n in names if n not in OF_IMAGE}
        self.own = {n: Column(tables["latents"], n, list(null[n].shape[1:])) for n in names if n in OF_IMAGE}
        self.caption_of = torch.cat(
            [torch.tensor(t.column("caption").to_pylist(), dtype=torch.long) for t in tables["latents"]]
        )

    def __len__(self) -> int:
        return len(self.caption_of)

    def latent(self, items: torch.Tensor) -> torch.Tensor:
        """Latents [B,C,h,w] fp32 of items of one shape."""
        group = self.group_of(items)
        return self.latents[self.groups.index(group)].rows(items - group.first)

    def conditioning(self, items: torch.Tensor, dropped: torch.Tensor | None = None) -> Conditioning:
        """Captions of the items [B]; where `dropped` [B] bool is set, the null prompt with the image's own time ids."""
        caption = self.caption_of[items]
        told = {name: column.rows(caption) for name, column in self.told.items()}
        rows = Conditioning(call=self.null.call, **told, **self.own_rows(items))
        return rows if dropped is None else self.null_rows(items).where(dropped, rows)

    def words(self, items: torch.Tensor) -> list[str]:
        """The captions of items [B] as text."""
        found = []
        for row in self.caption_of[items].tolist():
            for table in self.text:
                if row < len(table):
                    found.append(table.column("text")[row].as_py())
                    break
                row -= len(table)
        return found

    def null_rows(self, items: torch.Tensor) -> Conditioning:
        """The null prompt [B] of items, with each image's own time ids where the family has them."""
        return self.null.select(torch.zeros_like(items)).with_rows(**self.own_rows(items))

    def own_rows(self, items: torch.Tensor) -> dict[str, torch.Tensor]:
        """What belongs to each image itself."""
        return {name: column.rows(items) for name, column in self.own.items()}
