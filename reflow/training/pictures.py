"""The validation's picture: rows of samples under their prompts, in a file that carries its settings."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from reflow.outputs import written
from reflow.sampling.pictures import KEY

SIDE = 96  # pixels that a small image is enlarged to, so that its prompt fits above it
LINES = 4  # of a prompt


def labelled_grid(rows: Sequence[tuple[str, torch.Tensor]], prompts: Sequence[str]) -> np.ndarray:
    """Rows of images [B,c,H,W] in [-1,1] under each other with a label at the left and, above all, one prompt a column: uint8 [H,W,3]."""
    scale = max(1, SIDE // rows[0][1].shape[-1])
    lines = []
    for _, images in rows:
        pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu().expand(-1, 3, -1, -1)
        line = torch.nn.functional.pad(pixels, (1, 1, 1, 1), value=128).permute(2, 0, 3, 1).flatten(1, 2).numpy()
        lines.append(line.repeat(scale, 0).repeat(scale, 1))
    width = lines[0].shape[1] // len(rows[0][1])
    font = ImageFont.load_default(size=max(11, width // 32))
    step = round(1.3 * font.size)
    left = round(max(font.getlength(line) for label, _ in rows for line in label.split("\n"))) + 2 * step
    words = [wrapped(prompt, font, width - step // 2) for prompt in prompts]
    top = step * max((len(w) for w in words), default=0) + step // 2
    canvas = Image.new("RGB", (left + lines[0].shape[1], top + sum(line.shape[0] for line in lines)), "white")
    pen = ImageDraw.Draw(canvas)
    for column, said in enumerate(words):
        pen.multiline_text((left + column * width + step // 4, step // 4), "\n".join(said), fill="black", font=font, spacing=step - font.size)
    for (label, _), line in zip(rows, lines, strict=True):
        pen.multiline_text((step // 2, top + line.shape[0] // 2), label, fill="black", font=font, anchor="lm", spacing=step - font.size)
        canvas.paste(Image.fromarray(line), (left, top))
        top += line.shape[0]
    return np.asarray(canvas)


def wrapped(text: str, font: Any, width: float) -> list[str]:
    """A text in lines of at most so many pixels, at most LINES of them; words alone are never cut, and "..." stands for what is left out."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines if len(lines) <= LINES else [*lines[:LINES - 1], f"{lines[LINES - 1]} ..."]


def save(picture: np.ndarray, path: pathlib.Path, note: Mapping[str, Any]) -> None:
    """Write a PNG whose text metadata (key "reflow", JSON) is the note, over one of an earlier start."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, json.dumps(dict(note)))
    with written(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG", pnginfo=info)
