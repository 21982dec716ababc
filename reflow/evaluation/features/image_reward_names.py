"""The names of ImageReward's checkpoint in transformers' BLIP classes, and their configs from the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

State = Mapping[str, torch.Tensor]
VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
CONSTANT = f"{TEXT}embeddings.position_ids"
WHOLE = {"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding"}
PARTS = {
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "blocks.": "encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
}


def vision_name(name: str) -> str:
    """A tensor of the checkpoint's image encoder, without its prefix, in BlipVisionModel."""
    if name in WHOLE:
        return WHOLE[name]
    if name.startswith("norm."):
        return f"post_layernorm.{name.removeprefix('norm.')}"
    for part, target in PARTS.items():
        name = name.replace(part, target)
    return name


def split(state: State) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """States of the BlipVisionModel, the BlipTextModel and the head of linear layers; a name of none of them stays whole in the head's."""
    vision, text, head = {}, {}, {}
    for name, tensor in state.items():
        if name == CONSTANT or name.startswith("blip.") and not name.startswith((VISION, TEXT)):
            continue  # projections of BLIP's pre-training, which the score does not use
        if name.startswith(VISION):
            vision[vision_name(name.removeprefix(VISION))] = tensor
        elif name.startswith(TEXT):
            text[name.removeprefix(TEXT)] = tensor  # named alike, both being BERT's
        else:
            head[name.removeprefix(HEAD)] = tensor
    return vision, text, head


def configs_of(state: State) -> tuple[Any, Any]:
    """(BlipVisionConfig, BlipTextConfig) from shapes; heads are 64 wide. Raises KeyError where a tensor that tells them is missing."""
    import transformers

    def layers(prefix: str) -> int:
        return len({name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)})

    width, _, _, patch = state[f"{VISION}patch_embed.proj.weight"].shape
    vision = transformers.BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state[f"{VISION}blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=layers(f"{VISION}blocks."),
        num_attention_heads=width // 64,
        patch_size=patch,
        image_size=patch * round((state[f"{VISION}pos_embed"].shape[1] - 1) ** 0.5),
        layer_norm_eps=1e-6,
    )
    vocabulary, hidden = state[f"{TEXT}embeddings.word_embeddings.weight"].shape
    text = transformers.BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        encoder_hidden_size=width,
        intermediate_size=state[f"{TEXT}encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=layers(f"{TEXT}encoder.layer."),
        num_attention_heads=hidden // 64,
        max_position_embeddings=state[f"{TEXT}embeddings.position_embeddings.weight"].shape[0],
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # builds cross attention; the mask is an encoder's all the same
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        sep_token_id=None,
    )
    return vision, text
