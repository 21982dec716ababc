"""DINOv2's class token, for the Fréchet distance that Stein et al. (2023) found closest to people's judgement (FD-DINOv2)."""

from __future__ import annotations

from pathlib import Path

import torch

from reflow.evaluation.features.feature import exact, need_images
from reflow.evaluation.features.files import model_of
from reflow.evaluation.features.preprocessing import IMAGENET_MEAN, IMAGENET_STD, pillow, processed

SIZE = 224  # pixels, as in the paper's code, whatever size the model was trained at


class DinoFeature:
    name = "dinov2"
    kind = "features"

    def __init__(self, path: Path, device: torch.device) -> None:
        import transformers

        model, self.digest = model_of(self.name, path, transformers.Dinov2Model, "dinov2")
        self._model, self._device = model.to(device), device
        self._processor = pillow(SIZE, square=True, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        config = model.config
        self.implementation = (
            f"transformers {transformers.__version__} Dinov2Model of {config.num_hidden_layers} layers, width {config.hidden_size}, class "
            f"token after the last norm, images to {SIZE} x {SIZE} by Pillow's bicubic filter as in dgm-eval, fp32"
        )

    def features(self, images: torch.Tensor) -> torch.Tensor:
        pixels = processed(self._processor, need_images(images)).to(self._device)
        with exact():
            return self._model(pixel_values=pixels).last_hidden_state[:, 0].float().cpu()
