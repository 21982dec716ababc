"""A CLIP model of transformers, read as pairs of embeddings of unit length: what CLIP score and the preference scores are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from reflow.evaluation.features.feature import Cut, exact, need_images, need_prompts


class ClipPair:
    """model: a CLIPModel; tokenizer: its CLIPTokenizer; pixels: uint8 images to what the model reads. Prompts are cut at the text encoder's
    length (77 tokens) and counted in `cut`."""

    def __init__(self, model: Any, tokenizer: Any, pixels: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
        self.model, self.tokenizer, self.pixels, self.device, self.cut = model.to(device), tokenizer, pixels, device, Cut()

    @property
    def length(self) -> int:
        return int(self.model.config.text_config.max_position_embeddings)

    def images(self, images: torch.Tensor) -> torch.Tensor:
        """fp32 [B, D] projected embeddings, of the length that the model gives them, on the CPU."""
        pixels = self.pixels(need_images(images)).to(self.device)
        with exact():
            return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output).float().cpu()

    def texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """The same of prompts; each different one is encoded once."""
        different = list(dict.fromkeys(prompts))
        tokens = [self.tokenizer(prompt)["input_ids"] for prompt in different]
        self.cut.note(different, [len(ids) for ids in tokens], self.length)
        given = self.tokenizer(different, padding=True, truncation=True, max_length=self.length, return_tensors="pt").to(self.device)
        with exact():
            text = self.model.text_model(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
            found = self.model.text_projection(text.pooler_output).float().cpu()
        place = {prompt: i for i, prompt in enumerate(different)}
        return found[[place[prompt] for prompt in prompts]]

    def cosines(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """fp32 [B] cosine of each image and its prompt."""
        need_prompts(images, prompts)
        return F.cosine_similarity(self.images(images), self.texts(prompts), dim=1)
