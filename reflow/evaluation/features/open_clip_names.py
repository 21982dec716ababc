"""The names of open_clip's checkpoints in a transformers CLIPModel, and its config from the shapes of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

State = Mapping[str, torch.Tensor]
WHOLE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
}
TURNED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
NORMS = {"ln_final": "text_model.final_layer_norm", "visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
BLOCKS = {"transformer.resblocks.": "text_model.encoder.layers.", "visual.transformer.resblocks.": "vision_model.encoder.layers."}
PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
HEADS = {1280: 80, 1408: 88, 1664: 104}  # widths of ViT-H, -g and -bigG to the width of one head; 64 in all others


def to_clip_model(state: State) -> dict[str, torch.Tensor]:
    """The state of a CLIPModel. A name that open_clip's CLIP does not have stays as it is."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        if name == "attn_mask":  # a constant
            continue
        if name in WHOLE:
            found[WHOLE[name]] = tensor
        elif name in TURNED:
            found[TURNED[name]] = tensor.T.contiguous()
        elif stem in NORMS:
            found[f"{NORMS[stem]}.{kind}"] = tensor
        else:
            found.update(_of_block(name, tensor))
    return found


def _of_block(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    for prefix, target in BLOCKS.items():
        if not name.startswith(prefix):
            continue
        number, _, rest = name.removeprefix(prefix).partition(".")
        part, _, kind = rest.rpartition(".")
        if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = rest.removeprefix("attn.in_proj_")
            return {f"{target}{number}.self_attn.{p}_proj.{kind}": piece.contiguous() for p, piece in zip("qkv", tensor.chunk(3), strict=True)}
        if part in PARTS:
            return {f"{target}{number}.{PARTS[part]}.{kind}": tensor}
    return {name: tensor}


def config_of(state: State) -> Any:
    """The CLIPConfig of an open_clip checkpoint, from its shapes. Raises KeyError where a tensor that tells them is missing."""
    import transformers

    def tower(prefix: str, width: int) -> dict[str, int]:
        layers = {name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)}
        return dict(
            hidden_size=width,
            intermediate_size=state[f"{prefix}0.mlp.c_fc.weight"].shape[0],
            num_hidden_layers=len(layers),
            num_attention_heads=width // HEADS.get(width, 64),
        )

    vocabulary, width = state["token_embedding.weight"].shape
    places, vision_width = state["visual.positional_embedding"].shape
    patch = state["visual.conv1.weight"].shape[-1]
    projection = state["text_projection"].shape[1]
    length = state["positional_embedding"].shape[0]
    text = dict(
        **tower("transformer.resblocks.", width), vocab_size=vocabulary, max_position_embeddings=length, hidden_act="gelu",
        # The text is read at its first end token, the last of the vocabulary.
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, projection_dim=projection,
    )  # fmt: skip
    vision = dict(
        **tower("visual.transformer.resblocks.", vision_width), image_size=patch * round((places - 1) ** 0.5), patch_size=patch, hidden_act="gelu",
        projection_dim=projection,
    )  # fmt: skip
    return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)
