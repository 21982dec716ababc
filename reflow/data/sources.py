"""Captioned images on disk: which there are, in an order that does not change, and how each is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from reflow.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLES = ("metadata.jsonl", "captions.jsonl")


@dataclass(frozen=True)
class Item:
    """One image: its name in the source, where it lies and its caption."""

    key: str
    path: Path
    caption: str

    def load(self) -> Image.Image:
        """The image as it is stored, turned as its EXIF data says. Raises OSError or what else PIL raises."""
        with Image.open(self.path) as image:
            image.load()
            return ImageOps.exif_transpose(image)


def folder(path: str | Path, caption: str | None = None) -> list[Item]:
    """The images under a folder, sorted by name.

    A caption is the `text` (or `caption`) of the image's line in a metadata.jsonl or captions.jsonl beside it or above
    it, else the .txt file of the same name; an image without one gets `caption`. Raises UserError where that is None,
    and for a folder without images or a table that cannot be read.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"--data {root} is no folder; give a folder of images with captions.")
    files = [f for f in root.rglob("*") if not any(part.startswith(".") for part in f.relative_to(root).parts)]
    captions = {f: None for f in files if f.suffix.lower() in SUFFIXES and f.is_file()}
    for table in sorted(f for f in files if f.name in TABLES):
        captions |= dict(read_table(table))
    if not captions:
        raise UserError(f"There are no images under {root}; it takes files that end in {', '.join(SUFFIXES)}.")
    items, missing = [], []
    for file in sorted(captions, key=lambda f: f.relative_to(root).as_posix()):
        text = captions[file] if captions[file] is not None else read_text(file.with_suffix(".txt"))
        if text is None:
            missing.append(file)
            text = caption or ""
        items.append(Item(file.relative_to(root).as_posix(), file, text))
    if missing and caption is None:
        raise UserError(f"{len(missing)} of {len(items)} images have no caption, the first is {missing[0]}: write {missing[0].stem}.txt "
                        f"beside it or a line in metadata.jsonl, or give all of them one with --caption TEXT (\"\" for none).")
    return items


def read_text(path: Path) -> str | None:
    """A caption file's text without surrounding blanks; None where there is no such file."""
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The caption file {path} cannot be read ({error}); write it again as UTF-8 text.") from error


def read_table(path: Path) -> Iterator[tuple[Path, str]]:
    """(image, caption) of each line of a JSONL table whose file names are relative to its folder."""
    for number, line in enumerate((read_text(path) or "").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"] if "text" in row else row["caption"]
            if not isinstance(name, str) or not isinstance(text, str) or ".." in Path(name).parts or Path(name).is_absolute():
                raise ValueError(line)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path}, line {number} is not like {{"file_name": "a.png", "text": "a caption"}} with a name inside that '
                            f"folder; correct it.") from error
        yield path.parent / name, text.strip()


def square(image: Image.Image, resolution: int, channels: int) -> tuple[np.ndarray, list[int]]:
    """Pixels [channels, R, R] fp32 in [-1,1] of the centre square, and SDXL's [orig_h, orig_w, crop_top, crop_left, R, R].

    The crop counts in the image resized so that its shorter side is R. Transparency becomes white. Raises ValueError
    for an image without pixels or of a mode without a known range.
    """
    width, height = image.size
    if not width or not height:
        raise ValueError(f"it has {width} x {height} pixels")
    if image.mode == "F":
        raise ValueError("mode F (floating point) has no known range")
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.float64)
        image = Image.fromarray((deep / (257 if deep.max() > 255 else 1)).clip(0, 255).round().astype(np.uint8))
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    if (width, height) != (resolution, resolution):
        # Crop and resize in one, so that a very long image is never enlarged as a whole.
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + short, top + short))
    pixels = np.asarray(image, np.float32).reshape(resolution, resolution, -1).transpose(2, 0, 1) / 127.5 - 1
    scale = resolution / short
    return pixels, [height, width, round(top * scale), round(left * scale), resolution, resolution]
