"""Aspect-ratio buckets: the sizes that images are brought to, at one area, and which size an image goes to."""

from __future__ import annotations

import math
import re

import numpy as np

from reflow.errors import UserError
from reflow.models.family import Base

Size = tuple[int, int]  # (height, width) in pixels


def latent_shape(base: Base, size: Size) -> tuple[int, int, int]:
    """(C, h, w) of the latents of images of (height, width) pixels. Raises UserError where a side does not fit the "
    "base."""
    (channels, high, _), (_, _, wide) = (base.latent_shape(side) for side in size)
    return channels, high, wide


def cell(base: Base) -> int:
    """Pixels that a side must be a multiple of: the VAE's factor times the UNet's."""
    return base.cell


def table(base: Base, resolution: int) -> list[Size]:
    """Sizes of at most resolution^2 pixels, in steps of resolution/16 (or the base's cell); up to 4 to 1.

    Source: the idea of SDXL's table (arXiv 2307.01952, appendix I); at 1024 the rule gives 33 of its 40 sizes.
    """
    step = cell(base) * max(1, math.ceil(resolution / 16 / cell(base)))
    sizes = {(resolution, resolution)}
    for side in range(math.ceil(resolution / step) * step, 2 * resolution + 1, step):
        other = resolution**2 // side // step * step
        if other and side <= 4 * other:
            sizes |= {(side, other), (other, side)}
    return sorted(sizes)


def parse(texts: list[str], base: Base) -> list[Size]:
    """Sizes written as WIDTHxHEIGHT. Raises UserError for one that is not, or that the base cannot take."""
    sizes = []
    for text in texts:
        match = re.fullmatch(r"(\d+)x(\d+)", text)
        if not match:
            raise UserError(
                f"--buckets {text} is no size; write WIDTHxHEIGHT, such as 832x1216, or no size at all for the usual "
                f"table."
            )
        sizes.append((int(match[2]), int(match[1])))
        latent_shape(base, sizes[-1])
    return sorted(set(sizes))


def nearest(sizes: list[Size], images: np.ndarray) -> np.ndarray:
    """For images [n, 2] (height, width) the number of the size with the nearest aspect ratio [n]; an unknown size (0 "
    "or less) goes to 0."""
    ratios = np.log([w / h for h, w in sizes])
    known = (images > 0).all(1)
    safe = np.where(known[:, None], images, 1)
    wanted = np.log(safe[:, 1] / safe[:, 0])
    return np.where(known, np.abs(wanted[:, None] - ratios[None]).argmin(1), 0)
