"""Pieces of images at their full size, for a patch FID: what an Inception network sees of large images without shrinking them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from reflow.evaluation.features.feature import need_images


def patches(images: torch.Tensor, numbers: Sequence[int] | None = None, size: int = 299, seed: int = 0) -> torch.Tensor:
    """[B, 3, size, size] of uint8 images [B, 3, H, W]: of each one place drawn evenly from all by the seed and the image's number, so that
    images of one number are cut alike whatever batch or set they are in; without numbers, the middle.

    SDXL-Lightning (Lin et al. 2024) takes 299 pixels of 1024 and does not say where: say which it was beside the number. Raises ValueError
    for smaller images.
    """
    height, width = need_images(images).shape[2:]
    if min(height, width) < size:
        raise ValueError(f"Patches of {size} pixels need images of that size or more, got {height} x {width}")
    if numbers is None:
        top, left = (height - size) // 2, (width - size) // 2
        return images[:, :, top : top + size, left : left + size]
    pieces = []
    for image, number in zip(images, numbers, strict=True):
        # A generator's seed keeps 32 bits on the CPU, too few for both.
        drawn = hashlib.sha256(f"{seed} {number}".encode()).digest()
        y, x = int.from_bytes(drawn[:8]) % (height - size + 1), int.from_bytes(drawn[8:16]) % (width - size + 1)
        pieces.append(image[:, y : y + size, x : x + size])
    return torch.stack(pieces)
