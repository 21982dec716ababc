"""Z-Image and Z-Image-Turbo: a list of images and a list of captions of their own lengths, a network that is told 1 - t and answers
data - noise, a static shift.

Its positions begin where a caption ends, so padding cannot stand in for a caption's length: rows have 512 tokens with their mask, and each
caption is cut to its own length when the network is called. That reads the lengths back from the device, once a call, so a solve cannot be
recorded as a CUDA graph. Its pipeline guides as pos + w (pos - neg): `guidance_scale` w there is w + 1 here and everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from reflow.models.conditioning import CALLS, Conditioning
from reflow.models.family import Family, Text
from reflow.models.flows.base import FlowBase

TOKENS = 512  # the most of the pipeline's default call


class ZImageBase(FlowBase):
    call = "z_image"
    patch = 2

    def encode(self, prompts: Sequence[str], null: bool, device: torch.device) -> dict[str, torch.Tensor]:
        # The pipeline writes into the list that it is given.
        captions, _ = self.text_pipeline().encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False, max_sequence_length=TOKENS)
        rows = captions[0].new_zeros(len(captions), TOKENS, captions[0].shape[-1])
        mask = rows.new_zeros(len(captions), TOKENS)
        for i, caption in enumerate(captions):
            rows[i, : len(caption)] = caption
            mask[i, : len(caption)] = 1
        return {"cap_feats": rows, "cap_mask": mask}

    def pipeline_call(self, scale: float) -> dict[str, Any]:
        return {"guidance_scale": max(scale - 1.0, 0.0)}

    def pipeline_prompt(self, rows: Conditioning) -> dict[str, Any]:
        return {"prompt_embeds": captions_of(rows)}

    def example_rows(self) -> dict[str, tuple[int, ...]]:
        return {"cap_feats": (TOKENS, self.network_config["cap_feat_dim"]), "cap_mask": (TOKENS,)}


def call_z_image(network: Any, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    output = network(list(sample[:, :, None].unbind(0)), (1000 - timestep) / 1000, captions_of(conditioning), return_dict=False)[0]
    return -torch.stack(list(output))[:, :, 0]


def captions_of(conditioning: Conditioning) -> list[torch.Tensor]:
    """Each caption [T,D] at its own length."""
    return [rows[:length] for rows, length in zip(conditioning.cap_feats, lengths(conditioning.cap_mask), strict=True)]


def lengths(mask: torch.Tensor) -> list[int]:
    """Of captions, from their mask [B,T]; at least 1, of a null prompt that is zeros. Without values, on the meta device, all have T."""
    if mask.is_meta:
        return [mask.shape[1]] * len(mask)
    found: list[int] = mask.sum(1).clamp(min=1).long().tolist()
    return found


CALLS["z_image"] = call_z_image
Z_IMAGE = Family(
    "z-image",
    ("ZImagePipeline",),
    pooled=False,
    base=ZImageBase,
    network=("transformer", "ZImageTransformer2DModel"),
    texts=(Text("text_encoder", "Qwen3Model", "tokenizer", "Qwen2Tokenizer"),),
)
