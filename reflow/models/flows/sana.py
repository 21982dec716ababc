"""Sana: linear attention on latents of 32 pixels a cell, masked text of one language model, a static shift; cheap enough to train for real."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from reflow.models.conditioning import CALLS, Conditioning
from reflow.models.family import Family, Text
from reflow.models.flows.base import FlowBase

TOKENS = 300  # of the pipeline's default call


class SanaBase(FlowBase):
    call = "sana"

    def encode(self, prompts: Sequence[str], null: bool, device: torch.device) -> dict[str, torch.Tensor]:
        pipe = self.text_pipeline()
        asked = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
        states, mask, _, _ = pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=device, complex_human_instruction=None if null else asked
        )
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask.to(states.dtype)}

    def example_rows(self) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (TOKENS, self.network_config["caption_channels"]), "encoder_attention_mask": (TOKENS,)}

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """As the family's; the autoencoder has no posterior to draw from."""
        vae = self._vae()
        return vae.encode(pixels.to(vae.device, vae.dtype)).latent.float() * self._latent_scale()[0]


def call_sana(network: Any, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    scale = getattr(network, "config", None)
    return network(
        sample,
        encoder_hidden_states=conditioning.encoder_hidden_states,
        encoder_attention_mask=conditioning.encoder_attention_mask,
        timestep=timestep * (getattr(scale, "timestep_scale", 1.0) if scale is not None else 1.0),
        return_dict=False,
    )[0]


CALLS["sana"] = call_sana
SANA = Family(
    "sana",
    ("SanaPipeline",),
    pooled=False,
    base=SanaBase,
    network=("transformer", "SanaTransformer2DModel"),
    vae="AutoencoderDC",
    texts=(Text("text_encoder", "Gemma2Model", "tokenizer", "GemmaTokenizerFast"),),
)
