"""Stable Diffusion 3 and 3.5, medium and large: spatial latents, two CLIPs and T5, classifier-free guidance, a static shift of 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from reflow.models.conditioning import CALLS, Conditioning
from reflow.models.family import Family, Text
from reflow.models.flows.base import FlowBase

T5_TOKENS = 256  # of the pipeline's default call, also where there is no T5


class SD3Base(FlowBase):
    call = "sd3"

    def encode(self, prompts: Sequence[str], null: bool, device: torch.device) -> dict[str, torch.Tensor]:
        states, _, pooled, _ = self.text_pipeline().encode_prompt(
            prompt=list(prompts), prompt_2=None, prompt_3=None, device=device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def example_rows(self) -> dict[str, tuple[int, ...]]:
        config, clip = self.network_config, self.configs["text_encoder"].get("max_position_embeddings", 77)
        return {"encoder_hidden_states": (clip + T5_TOKENS, config["joint_attention_dim"]), "pooled_projections": (config["pooled_projection_dim"],)}


def call_sd3(network: Any, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    return network(
        hidden_states=sample,
        timestep=timestep,
        encoder_hidden_states=conditioning.encoder_hidden_states,
        pooled_projections=conditioning.pooled_projections,
        return_dict=False,
    )[0]


CALLS["sd3"] = call_sd3
CLIP = "CLIPTextModelWithProjection"
CLIPS = (Text("text_encoder", CLIP, "tokenizer"), Text("text_encoder_2", CLIP, "tokenizer_2"))
SD3 = Family(
    "sd3",
    ("StableDiffusion3Pipeline",),
    pooled=False,
    base=SD3Base,
    network=("transformer", "SD3Transformer2DModel"),
    texts=(
        *CLIPS,
        Text("text_encoder_3", "T5EncoderModel", "tokenizer_3", "T5TokenizerFast", optional=True),
    ),
)
