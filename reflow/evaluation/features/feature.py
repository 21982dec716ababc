"""What every network of an evaluation is: its name, what it computes and with which weights.

A feature of kind "features" has `features(images) -> fp32 [B, D]`, one of kind "score" `scores(images, prompts) -> fp32 [B]`, the higher the
better, one of kind "distance" `distances(images, others) -> fp32 [B]`. Images are uint8 [B, 3, H, W]; they and all results lie on the CPU.
Networks compute in fp32 without TF32, so that a number does not depend on the card that it came from beyond rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch


@runtime_checkable
class Feature(Protocol):
    """name: what people type, kind: which call it has. implementation: of what library and version, with which preprocessing, of which
    paper; digest: sha256 of the weights. Both belong beside every number that comes of it."""

    name: str
    kind: str
    implementation: str
    digest: str


class SetFeature(Feature, Protocol):
    def features(self, images: torch.Tensor) -> torch.Tensor: ...


class ScoreFeature(Feature, Protocol):
    truncated: int

    def scores(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor: ...


class DistanceFeature(Feature, Protocol):
    def distances(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor: ...


@dataclass
class Cut:
    """Prompts longer than a text encoder reads, each counted once; `what` they were cut to is said in the implementation."""

    prompts: set[str] = field(default_factory=set)

    def note(self, prompts: Sequence[str], lengths: Sequence[int], limit: int) -> None:
        self.prompts |= {prompt for prompt, length in zip(prompts, lengths, strict=True) if length > limit}


def need_images(images: torch.Tensor) -> torch.Tensor:
    """The images. ValueError unless they are uint8 [B, 3, H, W]."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"Images are uint8 of shape [B, 3, H, W], got {images.dtype} {list(images.shape)}")
    return images


def need_prompts(images: torch.Tensor, prompts: Sequence[str]) -> None:
    if len(images) != len(prompts):
        raise ValueError(f"Each image needs its prompt; there are {len(images)} images and {len(prompts)} prompts")


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """No gradients, and full fp32 in convolutions and products on every card; the settings of before come back."""
    before = torch.backends.cuda.matmul.allow_tf32
    cudnn = torch.backends.cudnn
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        with torch.inference_mode(), cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
