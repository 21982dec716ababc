"""From uint8 images to what a network reads, each way as its paper's code has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from reflow.evaluation.features.needed import refuse
from reflow.quiet import quiet_imports
from reflow.weights.guard import reason_of

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pillow(size: int, *, square: bool = False, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> Any:
    """A processor that resizes with Pillow's bicubic filter, in 8 bits: the shorter edge to `size` and the middle cut out, or to a square."""
    quiet_imports()
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    edges = {"height": size, "width": size}
    return CLIPImageProcessorPil(
        size=edges if square else {"shortest_edge": size}, do_center_crop=not square, crop_size=edges, image_mean=list(mean), image_std=list(std)
    )


def of_folder(name: str, folder: Path, size: int) -> Any:
    """The processor that a CLIP folder's preprocessor_config.json describes, with Pillow; CLIP's own at `size` where it has none."""
    if not (folder / "preprocessor_config.json").is_file():
        return pillow(size)
    quiet_imports()
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    try:
        return CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise refuse(name, folder, f"preprocessor_config.json there cannot be read ({reason_of(error)})") from error


def processed(processor: Any, images: torch.Tensor) -> torch.Tensor:
    """fp32 [B, 3, h, w] of uint8 images [B, 3, H, W]."""
    pictures = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images]
    return processor(images=pictures, return_tensors="pt")["pixel_values"].float()


def longest_edge(images: torch.Tensor, size: int) -> torch.Tensor:
    """HPS v2's own: values from 0 to 1, the longer edge to `size` by bicubic filtering of floats, black borders to a square, CLIP's
    normalisation after that."""
    x = images.float() / 255
    height, width = images.shape[2:]
    scale = size / max(height, width)
    if scale != 1:
        to = (round(height * scale), round(width * scale))
        x = F.interpolate(x, to, mode="bicubic", align_corners=False, antialias=True)
        down, right = size - to[0], size - to[1]
        x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (x - mean) / std
