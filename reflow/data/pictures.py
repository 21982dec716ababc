"""One image made ready for the VAE: colours, crop, size, and what SDXL is told of them."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

Image.init()
# Left out of what Pillow can open: formats of which it reads no pixels, or only by starting another program.
NO_PIXELS = ("MPEG", "EPS")
SUFFIXES = tuple(
    sorted(
        suffix
        for suffix, kind in Image.EXTENSION.items()
        if kind in Image.OPEN
        and kind not in NO_PIXELS
        and not (isinstance(Image.OPEN[kind][0], type) and issubclass(Image.OPEN[kind][0], ImageFile.StubImageFile))
    )
)
# A PNG with a long compressed text (a workflow, say) or colour profile has good pixels. Pillow's own limit for one is
# 1 MB; it is raised, for the whole process, to what Pillow allows all texts of a file: 64 MB.
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)

# What is ever opened, whatever a file is called: an EPS named .png would start Ghostscript.
FORMATS = tuple(sorted({Image.EXTENSION[suffix] for suffix in SUFFIXES}))

TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
ORIENTATION = 0x0112


def open_picture(file: str | Path | IO[bytes]) -> Image.Image:
    """The image of a file, opened and not yet decoded. Raises OSError, or what else PIL raises, for what is none of FORMATS."""
    return Image.open(file, formats=FORMATS)


def stored_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) as it is shown, from an opened image's header. Raises ValueError for an image without pixels."""
    width, height = image.size
    if not width or not height:
        raise ValueError(f"it has {width} x {height} pixels")
    if ORIENTATION in getattr(image, "tag_v2", ()):
        return height, width  # Pillow gives a TIFF's size as its own tag turns it
    # A PNG's own getexif() would decode the whole picture where its header has no EXIF data.
    told = Image.Image.getexif(image).get(ORIENTATION)
    return (width, height) if told in TURNED else (height, width)


def pixels_of(image: Image.Image) -> int:
    """How many pixels decoding an opened image holds at most."""
    # These formats hold pictures of other formats, whose size their own header need not tell.
    return 2**62 if image.format in ("ICO", "ICNS") else image.width * image.height


def upright(image: Image.Image) -> Image.Image:
    """The decoded image, turned as its EXIF data says. Raises OSError or what else PIL raises."""
    if ORIENTATION in getattr(image, "tag_v2", ()):
        image.filename = ""  # Pillow maps an uncompressed file into memory by its turned size, which mixes its rows up
    image.load()
    # Pillow's own function copies what needs no turn.
    return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION) in range(2, 9) else image


def plain(image: Image.Image, channels: int) -> Image.Image:
    """The image in mode L (channels 1) or RGB on white. Raises ValueError for a mode without a known range."""
    if image.mode == "F":
        raise ValueError("mode F (floating point) has no known range")
    if image.mode.startswith("I"):
        deep, clear = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray(eight_bits(deep))
        if clear is not None:  # the one level of all 65536 that is transparent
            image.putalpha(Image.fromarray(np.where(deep == clear, 0, 255).astype(np.uint8)))
    if "A" in image.mode.upper() and image.mode != "LAB" or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def eight_bits(deep: np.ndarray) -> np.ndarray:
    """Whole numbers [h, w] as uint8: 16-bit levels scaled, or as they are where all lie below 256. Row by row, or it takes 30 bytes a pixel."""
    scale, out = (257 if deep.max() > 255 else 1), np.empty(deep.shape, np.uint8)
    for row, levels in zip(out, deep, strict=True):
        row[:] = (levels / scale).clip(0, 255).round()
    return out


def fit(image: Image.Image, size: tuple[int, int], channels: int) -> tuple[np.ndarray, list[int]]:
    """Grey levels [channels, h, w] uint8 of the centre, and SDXL's [orig_h, orig_w, crop_top, crop_left, h, w].

    size: (h, w). The largest centred part with that aspect ratio is taken; the crop counts in the image resized so that
    it just covers h x w. Transparency becomes white. Raises ValueError for an image that cannot be used.
    """
    width, height = image.size
    if not width or not height:
        raise ValueError(f"it has {width} x {height} pixels")
    image = plain(image, channels)
    h, w = size
    wide = width * h >= height * w
    inner_w, inner_h = (height * w / h, height) if wide else (width, width * h / w)
    left, top = (width - inner_w) / 2, (height - inner_h) / 2
    if (width, height) != (w, h):
        # Crop and resize in one, so that a very long image is never enlarged as a whole.
        image = image.resize((w, h), Image.Resampling.LANCZOS, box=(left, top, left + inner_w, top + inner_h))
    pixels = np.asarray(image, np.uint8).reshape(h, w, -1).transpose(2, 0, 1)
    scale = h / inner_h
    return pixels, [height, width, round(top * scale), round(left * scale), h, w]
