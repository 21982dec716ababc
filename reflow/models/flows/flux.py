"""FLUX.1 dev and schnell: packed latents with position ids, CLIP and T5, a shift that follows the image's size.

dev is distilled from a guided teacher: its guidance is a number that the network is told (`model.guidance`, 3.5 as its pipeline has it), there
is no unconditional half at guidance 1, and the student keeps the input. schnell is told none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from reflow.models.conditioning import CALLS, Conditioning
from reflow.models.family import Family, Text
from reflow.models.flows.base import FlowBase, packed, unpacked

GUIDANCE = 3.5
T5_TOKENS = 512  # of the pipeline's default call


class FluxBase(FlowBase):
    call = "flux"
    patch = 2

    @property
    def latent_channels(self) -> int:
        return int(self.network_config["in_channels"]) // 4

    def encode(self, prompts: Sequence[str], null: bool, device: torch.device) -> dict[str, torch.Tensor]:
        states, pooled, _ = self.text_pipeline().encode_prompt(prompt=list(prompts), prompt_2=None, device=device)
        rows = {"encoder_hidden_states": states, "pooled_projections": pooled}
        if self.network_config.get("guidance_embeds"):
            rows["guidance"] = torch.full((len(prompts), 1), self.family.guidance or GUIDANCE, device=device)
        return rows

    def pipeline_call(self, scale: float) -> dict[str, Any]:
        told = {"guidance_scale": self.family.guidance or GUIDANCE} if self.network_config.get("guidance_embeds") else {}
        return told | ({"true_cfg_scale": scale, "negative_prompt": ""} if scale > 1 else {})

    def example_rows(self) -> dict[str, tuple[int, ...]]:
        config = self.network_config
        rows = {"encoder_hidden_states": (T5_TOKENS, config["joint_attention_dim"]), "pooled_projections": (config["pooled_projection_dim"],)}
        return rows | ({"guidance": (1,)} if config.get("guidance_embeds") else {})


def call_flux(network: Any, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    height, width = sample.shape[2:]
    states, guidance = conditioning.encoder_hidden_states, conditioning.guidance
    return unpacked(
        network(
            hidden_states=packed(sample),
            timestep=timestep.to(sample.dtype) / 1000,
            guidance=None if guidance is None else guidance[:, 0].to(sample.dtype),
            pooled_projections=conditioning.pooled_projections,
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, device=sample.device, dtype=sample.dtype),
            img_ids=image_ids(height // 2, width // 2, sample),
            return_dict=False,
        )[0],
        height,
        width,
    )


def image_ids(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """[rows * columns, 3]: 0, the token's row and its column."""
    ids = torch.zeros(rows, columns, 3, device=like.device, dtype=like.dtype)
    ids[..., 1] = torch.arange(rows, device=like.device, dtype=like.dtype)[:, None]
    ids[..., 2] = torch.arange(columns, device=like.device, dtype=like.dtype)[None, :]
    return ids.view(rows * columns, 3)


CALLS["flux"] = call_flux
FLUX = Family(
    "flux",
    ("FluxPipeline",),
    pooled=False,
    base=FluxBase,
    network=("transformer", "FluxTransformer2DModel"),
    texts=(
        Text("text_encoder", "CLIPTextModel", "tokenizer"),
        Text("text_encoder_2", "T5EncoderModel", "tokenizer_2", "T5TokenizerFast"),
    ),
)
