"""Scores learned from people's choices between images, made of a CLIP ViT-H/14: PickScore and HPS v2.1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from reflow.evaluation.features.clip import pair_of, said
from reflow.evaluation.features.clip_pair import ClipPair
from reflow.evaluation.features.files import digest_of, fill, state_of, tokenizer_of, weights_file
from reflow.evaluation.features.needed import refuse
from reflow.evaluation.features.open_clip_names import config_of, to_clip_model
from reflow.evaluation.features.preprocessing import longest_edge

FILTER = "the longer edge by torch's smoothing bicubic filter as in HPSv2 1.2"


class PickScore:
    """exp(logit_scale) cos, near 20 to 23 for images of today's models (Kirstain et al. 2023)."""

    name = "pickscore"
    kind = "score"

    def __init__(self, path: Path, device: torch.device) -> None:
        self._pair, self.digest = pair_of(self.name, path, device)
        self._scale = float(self._pair.model.logit_scale.detach().exp())
        self.implementation = f"{self._scale:.4g} cos, {said(self._pair)}"

    @property
    def truncated(self) -> int:
        return len(self._pair.cut.prompts)

    def scores(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self._scale * self._pair.cosines(images, prompts)


class HpsScore:
    """cos, near 0.25 to 0.33 for HPS v2.1 (Wu et al. 2023); papers print it times 100 as well. Weights are told apart by their digest alone."""

    name = "hpsv2"
    kind = "score"

    def __init__(self, path: Path, device: torch.device) -> None:
        if (path / "config.json").is_file():
            self._pair, self.digest = pair_of(self.name, path, device)
        else:
            self._pair, self.digest = self._of_checkpoint(path, device)
        size = self._pair.model.config.vision_config.image_size
        self._pair.pixels = lambda images: longest_edge(images, size)
        self.implementation = f"cos, {said(self._pair, FILTER)}"

    def _of_checkpoint(self, path: Path, device: torch.device) -> tuple[ClipPair, str]:
        import transformers

        file = weights_file(self.name, path)
        state = state_of(self.name, file)
        try:
            config = config_of(state)
        except KeyError as error:
            raise refuse(self.name, file, f"it holds no CLIP of open_clip, which has {error.args[0]}") from error
        model = fill(self.name, transformers.CLIPModel(config), to_clip_model(state), file)
        tokenizer = tokenizer_of(self.name, file.parent, transformers.CLIPTokenizer)
        return ClipPair(model, tokenizer, lambda images: images, device), digest_of([file])

    @property
    def truncated(self) -> int:
        return len(self._pair.cut.prompts)

    def scores(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self._pair.cosines(images, prompts)
