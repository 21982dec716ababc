"""sha256 of what a pipeline is loaded from, each file read once while it stays as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reflow.weights.files import choose_variant, variant_of

_DONE: dict[tuple[str, int, int], str] = {}
WEIGHTS = (".safetensors", ".bin", ".ckpt")


def digest(file: Path) -> str:
    """sha256 of a file, kept by its path, size and time of change."""
    stat = file.stat()
    key = (str(file.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _DONE:
        with open(file, "rb") as handle:
            _DONE[key] = hashlib.file_digest(handle, "sha256").hexdigest()
    return _DONE[key]


def folder_digests(folder: Path, parts: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of the weight files of these parts of a diffusers folder, by their place in it, of the variant that is read; "configs" is that
    of all their other files, tokenizers with them."""
    found: dict[str, str] = {}
    others = hashlib.sha256()
    for part in sorted(name for name, made in parts.items() if made is not None and (folder / name).is_dir()):
        files = sorted(file for file in (folder / part).rglob("*") if file.is_file())
        kinds = [[file for file in files if file.suffix == ending] for ending in WEIGHTS]
        weights = next((kind for kind in kinds if kind), [])
        variants = {variant_of(file.name) for file in weights}
        chosen = choose_variant((file.name for file in weights), folder / part) if len(variants) > 1 else None
        for file in weights:
            if chosen is None or variant_of(file.name) == chosen:
                found[file.relative_to(folder).as_posix()] = digest(file)
        for file in files:
            if file.suffix in (".json", ".txt", ".model") and ".index." not in file.name:
                others.update(f"{file.relative_to(folder).as_posix()} {digest(file)}\n".encode())
    return {**found, "configs": others.hexdigest()}
