"""The digits flow model: a Stable Diffusion 3 in miniature, small enough to train from scratch on CPU cores.

Every part of SD3 without its T5 encoder is there, only smaller: two CLIP text encoders with projections, an MMDiT with
normalised queries and keys, an AutoencoderKL without 1x1 convolutions but with a shift of its latents, a rectified flow
with a static shift of time. An unmodified diffusers loads the folder as it loads every SD3 without T5:
`StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)`.

Time runs from t=1 (noise) to t=0 (data): x_t = (1-t) x_0 + t eps, the network gives eps - x_0 and is told 1000 t.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from reflow.models import digits

BUILTIN = Path(__file__).parent / "weights" / "digits-flow"
# Zeros that StableDiffusion3Pipeline appends to the states of CLIP in place of T5's: its default `max_sequence_length`.
MISSING_TOKENS = 256
# Keywords of `from_pretrained`: diffusers 0.42.1 asks for both although the folder's model_index.json says null.
WITHOUT_T5 = dict(text_encoder_3=None, tokenizer_3=None)
NETWORKS = ("transformer", "text_encoder", "text_encoder_2", "vae")

# Patches of 2: sixteen image tokens; with patches of 1 a step costs two and a half times as much.
TRANSFORMER = dict(
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=4,
    num_attention_heads=3,
    attention_head_dim=32,
    caption_projection_dim=96,
    # Twice the states' width, which the pipeline pads with zeros, as 768 + 1280 of 4096 in SD3.
    joint_attention_dim=4 * digits.TEXT_WIDTH,
    pooled_projection_dim=2 * digits.TEXT_WIDTH,
    pos_embed_max_size=8,
    qk_norm="rms_norm",
)
VAE = dict(**digits.VAE, use_quant_conv=False, use_post_quant_conv=False)
SCHEDULER = dict(num_train_timesteps=1000, shift=2.0)


def new_parts(seed: int = 0) -> dict[str, Any]:
    """The untrained parts, named as StableDiffusion3Pipeline names them; initial weights are fixed by the seed."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tokenizer, tokenizer_2 = digits.build_tokenizers()
    text = digits.text_settings(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dict(
            vae=AutoencoderKL(**VAE),
            text_encoder=CLIPTextModelWithProjection(
                CLIPTextConfig(**text, hidden_act="quick_gelu", pad_token_id=tokenizer.pad_token_id)
            ),
            text_encoder_2=CLIPTextModelWithProjection(
                CLIPTextConfig(**text, hidden_act="gelu", pad_token_id=tokenizer_2.pad_token_id)
            ),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            transformer=SD3Transformer2DModel(**TRANSFORMER),
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            **WITHOUT_T5,
        )


class OneForMany:
    """Joint attention in which the last text token stands for `count` equal ones.

    Text tokens have no positions of their own, so the zeros in place of T5 stay equal to each other in every layer:
    one of them, weighted by their count, gives what all of them would, for a fraction of the cost. For
    `SD3Transformer2DModel.set_attn_processor`; `count` may change between calls.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def heads(image: Any, text: Any, image_norm: Any = None, text_norm: Any = None) -> torch.Tensor:
            both = []
            for layer, tokens, norm in ((image, hidden_states, image_norm), (text, encoder_hidden_states, text_norm)):
                split = layer(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                both.append(split if norm is None else norm(split))
            return torch.cat(both, 2)

        query = heads(attn.to_q, attn.add_q_proj, attn.norm_q, attn.norm_added_q)
        key = heads(attn.to_k, attn.add_k_proj, attn.norm_k, attn.norm_added_k)
        bias = query.new_zeros(query.shape[2])
        bias[-1] = math.log(self.count)
        mixed = F.scaled_dot_product_attention(
            query, key, heads(attn.to_v, attn.add_v_proj), attn_mask=bias.expand(len(bias), -1)
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        image, text = mixed.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def encode_text(parts: dict[str, Any], ids: list[torch.Tensor], missing: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(states [R,16+missing,128], pooled [R,64]) of token ids [R,16] of both tokenizers, as StableDiffusion3Pipeline's
    `encode_prompt` makes them with `max_sequence_length=missing`; one zero is enough for `OneForMany`.
    """
    outputs = [
        parts[name](tokens, output_hidden_states=True)
        for name, tokens in zip(("text_encoder", "text_encoder_2"), ids, strict=True)
    ]
    states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    states = F.pad(states, (0, TRANSFORMER["joint_attention_dim"] - states.shape[-1], 0, missing))
    return states, torch.cat([output.text_embeds for output in outputs], -1)
