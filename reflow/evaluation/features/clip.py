"""CLIP: image embeddings for CMMD, and the CLIP score of an image and its prompt (Hessel et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from reflow.evaluation.features.clip_pair import ClipPair
from reflow.evaluation.features.files import model_of, tokenizer_of
from reflow.evaluation.features.preprocessing import of_folder, processed


def pair_of(name: str, folder: Path, device: torch.device) -> tuple[ClipPair, str]:
    """(the pair of encoders of a CLIPModel's folder, the digest of its weights)."""
    import transformers

    model, digest = model_of(name, folder, transformers.CLIPModel, "clip")
    tokenizer = tokenizer_of(name, folder, transformers.CLIPTokenizer)
    processor = of_folder(name, folder, model.config.vision_config.image_size)
    return ClipPair(model, tokenizer, lambda images: processed(processor, images), device), digest


def said(pair: ClipPair, how: str = "Pillow's bicubic filter as the folder says") -> str:
    import transformers

    vision = pair.model.config.vision_config
    return (
        f"transformers {transformers.__version__} CLIPModel, vision of {vision.num_hidden_layers} layers, width {vision.hidden_size}, "
        f"{vision.image_size} pixels, {how}, prompts cut at {pair.length} tokens, fp32"
    )


class Clip:
    """Image embeddings as the projection gives them, whose directions CMMD takes, and CLIP scores: 100 max(cos, 0) of an image's and its
    prompt's. Numbers of different CLIPs do not compare."""

    name = "clip"
    kind = "features"

    def __init__(self, pair: ClipPair, digest: str) -> None:
        self._pair, self.digest, self.implementation = pair, digest, said(pair)

    @property
    def truncated(self) -> int:
        return len(self._pair.cut.prompts)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self._pair.images(images)

    def scores(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return 100 * self._pair.cosines(images, prompts).clamp_min(0)


class ClipScore(Clip):
    """The same network asked for its score."""

    name = "clip_score"
    kind = "score"
