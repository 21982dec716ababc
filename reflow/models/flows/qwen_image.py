"""Qwen-Image: packed latents, masked text of one vision language model, a VAE of videos with statistics for every channel, guidance with a
negative prompt of its own, a shift that follows the image's size.

Its pipeline asks text for at most 512 tokens and pads a call's prompts to the longest; here every row has 512 with its mask, which rounding
alone can tell from that. The network masks what is padded, so it sees the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from reflow.models.conditioning import CALLS, OWN_GUIDANCE, Conditioning
from reflow.models.family import Family, Text
from reflow.models.flows.base import FlowBase, packed, unpacked

TOKENS = 512  # the most of the pipeline's default call
NEGATIVE = " "  # what its authors guide away from


class QwenImageBase(FlowBase):
    call = "qwen_image"
    patch = 2

    @property
    def vae_scale_factor(self) -> int:
        return 2 ** len(self.configs["vae"].get("temperal_downsample") or (0,) * 3)

    @property
    def latent_channels(self) -> int:
        return int(self.network_config["in_channels"]) // 4

    def encode(self, prompts: Sequence[str], null: bool, device: torch.device) -> dict[str, torch.Tensor]:
        asked = [NEGATIVE] * len(prompts) if null else list(prompts)
        states, mask = self.text_pipeline().encode_prompt(asked, device=device, max_sequence_length=TOKENS)
        mask = states.new_ones(states.shape[:2]) if mask is None else mask.to(states.dtype)  # None: nothing is padded
        left = TOKENS - states.shape[1]
        pad = torch.nn.functional.pad
        return {"encoder_hidden_states": pad(states, (0, 0, 0, left)), "encoder_hidden_states_mask": pad(mask, (0, left))}

    def pipeline_call(self, scale: float) -> dict[str, Any]:
        return {"true_cfg_scale": scale} | ({"negative_prompt": NEGATIVE} if scale > 1 else {})

    def example_rows(self) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (TOKENS, self.network_config["joint_attention_dim"]), "encoder_hidden_states_mask": (TOKENS,)}

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """As the family's, of a video of one frame."""
        vae = self._vae()
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)[:, :, None]).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        scale, shift = self._latent_scale()
        return (latents[:, :, 0].float() - shift) * scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self._vae()
        scale, shift = self._latent_scale()
        return vae.decode((latents.to(vae.device).float() / scale + shift).to(vae.dtype)[:, :, None]).sample[:, :, 0].float().clamp(-1, 1)


def call_qwen_image(network: Any, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    height, width = sample.shape[2:]
    tokens = network(
        hidden_states=packed(sample),
        timestep=timestep.to(sample.dtype) / 1000,
        encoder_hidden_states=conditioning.encoder_hidden_states,
        encoder_hidden_states_mask=conditioning.encoder_hidden_states_mask.bool(),
        img_shapes=[[(1, height // 2, width // 2)]] * len(sample),
        return_dict=False,
    )[0]
    if conditioning.guided_by is not None:
        tokens = rescaled(tokens, conditioning.guided_by)
    return unpacked(tokens, height, width)


def rescaled(tokens: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[null; prompt] tokens [2B,N,C] guided by scale [2B,1] as the pipeline's true_cfg_scale does it, twice: every token keeps the norm that it
    has without guidance."""
    null, prompt = tokens.float().chunk(2)
    guided = null + scale[: len(null), :, None].float() * (prompt - null)
    guided = guided * (torch.norm(prompt, dim=-1, keepdim=True) / torch.norm(guided, dim=-1, keepdim=True))
    return torch.cat([guided, guided]).to(tokens.dtype)


CALLS["qwen_image"] = call_qwen_image
OWN_GUIDANCE.add("qwen_image")
QWEN_IMAGE = Family(
    "qwen-image",
    ("QwenImagePipeline",),
    pooled=False,
    base=QwenImageBase,
    network=("transformer", "QwenImageTransformer2DModel"),
    vae="AutoencoderKLQwenImage",
    texts=(Text("text_encoder", "Qwen2_5_VLForConditionalGeneration", "tokenizer", "Qwen2Tokenizer"),),
)
