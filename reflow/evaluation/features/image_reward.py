"""ImageReward (Xu et al. 2023): a reward for an image and its prompt, learned from people's rankings.

BLIP's ViT-L/16 reads the image at 224 pixels, a BERT with cross attention to it reads the prompt, and five linear layers without
activations turn its first token into a number, which is scaled to mean 0 and deviation 1 over the authors' images. Around 0 to 1 for
today's models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from reflow.evaluation.features.feature import Cut, exact, need_images, need_prompts
from reflow.evaluation.features.files import digest_of, fill, state_of, tokenizer_of, weights_file
from reflow.evaluation.features.image_reward_names import configs_of, split
from reflow.evaluation.features.needed import refuse
from reflow.evaluation.features.preprocessing import pillow, processed

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072  # of the published code
LENGTH = 35  # tokens
WIDTHS = (1024, 128, 64, 16, 1)
NUMBERS = ("0", "2", "4", "6", "7")  # of the linear layers between the published head's dropouts


class ImageReward:
    name = "image_reward"
    kind = "score"

    def __init__(self, path: Path, device: torch.device) -> None:
        import transformers

        file = weights_file(self.name, path)
        state = state_of(self.name, file)
        try:
            vision, text = configs_of(state)
        except KeyError as error:
            raise refuse(self.name, file, f"it holds no ImageReward, which has {error.args[0]}") from error
        states = split(state)
        inputs = (text.hidden_size, *WIDTHS)
        head = nn.Sequential()
        for number, width, outputs in zip(NUMBERS, inputs, WIDTHS, strict=False):
            head.add_module(number, nn.Linear(width, outputs))
        networks = (transformers.BlipVisionModel(vision), transformers.BlipTextModel(text, add_pooling_layer=False), head)
        self._vision, self._text, self._head = (
            fill(self.name, network, part, file).to(device) for network, part in zip(networks, states, strict=True)
        )
        self._tokenizer = tokenizer_of(self.name, file.parent, transformers.BertTokenizer)
        self._processor, self._device, self._cut = pillow(vision.image_size), device, Cut()
        self.digest = digest_of([file])
        self.implementation = (
            f"transformers {transformers.__version__} BLIP classes with ImageReward-v1.0's head and scale, {vision.image_size} pixels by Pillow's "
            f"bicubic filter, prompts cut at {LENGTH} tokens, fp32"
        )

    @property
    def truncated(self) -> int:
        return len(self._cut.prompts)

    def scores(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        need_prompts(images, prompts)
        self._cut.note(prompts, [len(self._tokenizer(prompt)["input_ids"]) for prompt in prompts], LENGTH)
        given = self._tokenizer(list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").to(self._device)
        pixels = processed(self._processor, need_images(images)).to(self._device)
        with exact():
            seen = self._vision(pixel_values=pixels).last_hidden_state
            read = self._text(
                input_ids=given["input_ids"], attention_mask=given["attention_mask"], encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self._device), is_decoder=False,
            ).last_hidden_state[:, 0]  # fmt: skip
            return ((self._head(read).flatten() - MEAN) / DEVIATION).float().cpu()
