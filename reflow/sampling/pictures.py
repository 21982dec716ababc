"""Images on disk: PNG files that carry their settings, and a grid of them."""

from __future__ import annotations

import errno
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from reflow.data.pictures import fit
from reflow.outputs import written

KEY = "reflow"
GRID_SIDE = 4096  # pixels, at most
ENLARGED = 128  # pixels, of small pictures in a grid
NARROWEST = 48  # pixels, of a picture with a label
GAP, LINE = 8, 16  # pixels: between pictures, of a line of a label


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
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    with written(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)


def read_note(path: str | pathlib.Path) -> dict[str, Any]:
    """The note of :func:`write_png`; {} for a picture without one."""
    with Image.open(path, formats=("PNG",)) as picture:
        return json.loads(picture.info.get(KEY, "{}"))


def grid(pictures: Sequence[Image.Image], labels: Sequence[Sequence[str]], columns: int | None = None) -> Image.Image:
    """All pictures of one size in rows of `columns` (default: as square as it gets) with white gaps, small ones enlarged and large
    ones reduced. Below each stand its label's lines, cut to its width; tiles too small to carry one go without.
    """
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows, size = math.ceil(len(pictures) / columns), pictures[0].size
    text = LINE * max(map(len, labels))
    width, height = tile(size, columns, rows, text)
    if width < NARROWEST:
        labels, text = [()] * len(pictures), 0
        width, height = tile(size, columns, rows, text)
    gap = GAP if text else GAP // 4
    whole = Image.new(pictures[0].mode, (columns * (width + gap) + gap, rows * (height + gap + text) + gap), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(size=LINE - 4)
    how = Image.Resampling.NEAREST if width >= size[0] else Image.Resampling.LANCZOS
    for i, (picture, lines) in enumerate(zip(pictures, labels, strict=True)):
        left, top = gap + i % columns * (width + gap), gap + i // columns * (height + gap + text)
        whole.paste(picture.resize((width, height), how), (left, top))
        for n, line in enumerate(lines):
            pen.text((left, top + height + n * LINE), fitted(line, width, font), fill="black", font=font)
    return whole


def tile(size: tuple[int, int], columns: int, rows: int, text: int) -> tuple[int, int]:
    """(width, height) of a picture of this size in a grid whose labels take `text` pixels: a whole multiple, or reduced."""
    gap = GAP if text else GAP // 4
    room = min((GRID_SIDE - gap) / columns - gap, GRID_SIDE), min((GRID_SIDE - gap) / rows - gap - text, GRID_SIDE)
    scale = min(room[0] / size[0], room[1] / size[1])
    scale = max(1, min(ENLARGED // max(size), int(scale))) if scale >= 1 else scale
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def fitted(line: str, width: int, font: Any) -> str:
    """A line of text, without breaks, cut to so many pixels."""
    line = " ".join(line.split())
    if font.getlength(line) <= width:
        return line
    low, high = 0, len(line)  # the longest beginning that fits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(line[:middle] + "...") <= width else (low, middle - 1)
    return line[:low].rstrip() + "..."
