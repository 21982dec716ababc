"""Images on disk: PNG files that carry their settings, and a grid of them."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, PngImagePlugin

from reflow.data.pictures import fit

KEY = "reflow"
GRID_SIDE = 4096  # pixels, at most


def to_pil(image: torch.Tensor) -> Image.Image:
    """[c,H,W] in [-1,1], one or three channels, as a picture."""
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    return Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy())


def from_pil(picture: Image.Image, base: Any, size: tuple[int, int]) -> torch.Tensor:
    """[1,c,H,W] in [-1,1] of a picture scaled to (height, width), its middle cut out, in the base's channels.

    It is what training sees of the same picture. Raises ValueError for one that cannot be used.
    """
    pixels, _ = fit(picture, size, base.configs["vae"].get("in_channels", 3))
    return torch.from_numpy(pixels.astype("float32")).div(127.5).sub(1)[None]


def write_png(picture: Image.Image, path: pathlib.Path, note: Mapping[str, Any]) -> None:
    """Write a PNG with its note as text metadata (key "reflow", JSON). Raises FileExistsError if the file exists."""
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, json.dumps(dict(note)))
    with open(path, "xb") as handle:
        picture.save(handle, format="PNG", pnginfo=info)


def read_note(path: str | pathlib.Path) -> dict[str, Any]:
    """The note of :func:`write_png`; {} for a picture without one."""
    with Image.open(path) as picture:
        return json.loads(picture.info.get(KEY, "{}"))


def grid(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """All pictures of one size in rows of `columns` (default: as square as it gets), small ones enlarged and large
    ones reduced.
    """
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    room = GRID_SIDE / max(columns * width, rows * height)
    scale = max(1, min(64 // max(width, height), int(room))) if room >= 1 else room
    width, height = max(1, int(width * scale)), max(1, int(height * scale))
    whole = Image.new(pictures[0].mode, (columns * width, rows * height))
    for i, picture in enumerate(pictures):
        how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
        whole.paste(picture.resize((width, height), how), (i % columns * width, i // columns * height))
    return whole
