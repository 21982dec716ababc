"""Names of weights in original single-file checkpoints of SD1.5 and SDXL, from diffusers' and transformers' names.

diffusers converts the other way when it reads such a file; each mapping here is its inverse and is checked against it,
name by name and shape by shape, on every export.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from reflow.errors import UserError
from reflow.weights.files import State

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
SD_CLIP_PREFIX = "cond_stage_model.transformer."
SDXL_CLIP_PREFIX = "conditioner.embedders.0.transformer."
SDXL_OPEN_CLIP_PREFIX = "conditioner.embedders.1.model."

UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
CLIP_TO_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def _unknown(part: str, key: str) -> UserError:
    return UserError(
        f"The {part} weight {key} has no name in the original checkpoint format, so this model cannot be written as "
        "one file; export a diffusers folder instead."
    )


def _renamed(keys: Iterable[str], name: Callable[[str], str]) -> dict[str, str]:
    names = {key: name(key) for key in keys}
    if len(set(names.values())) < len(names):
        raise UserError(
            "Two weights of this model have one name in the original checkpoint format; export a diffusers folder "
            "instead."
        )
    return names


def unet_names(keys: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers name -> original name (with prefix) of a UNet2DConditionModel. Raises UserError for a layout that has
    no original."""
    keys = list(keys)
    layers = config.get("layers_per_block", 2)
    if not isinstance(layers, int):
        raise UserError(
            "A UNet with a different number of layers in each block has no original checkpoint format; export a "
            "diffusers folder."
        )
    # An up block without attention keeps its upsampler in the place where attention would be.
    attended = {int(m[1]) for key in keys if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", key))}

    def name(key: str) -> str:
        module, _, leaf = key.rpartition(".")
        if module in UNET_ENDS:
            return f"{UNET_PREFIX}{UNET_ENDS[module]}.{leaf}"
        if m := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", key):
            place = int(m[2]) * (layers + 1) + int(m[4])
            block = f"input_blocks.{place + 1}" if m[1] == "down" else f"output_blocks.{place}"
            kind, rest = m[3], m[5]
        elif m := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(\w+)", key):
            return f"{UNET_PREFIX}input_blocks.{(int(m[1]) + 1) * (layers + 1)}.0.op.{m[2]}"
        elif m := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(\w+)", key):
            block = f"output_blocks.{int(m[1]) * (layers + 1) + layers}"
            return f"{UNET_PREFIX}{block}.{2 if int(m[1]) in attended else 1}.conv.{m[2]}"
        elif m := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", key):
            kind, rest = m[1], m[3]
            if kind == "resnets":
                return f"{UNET_PREFIX}middle_block.{2 * int(m[2])}.{resnet(key, rest)}"
            return f"{UNET_PREFIX}middle_block.{2 * int(m[2]) + 1}.{rest}"
        else:
            raise _unknown("UNet", key)
        return f"{UNET_PREFIX}{block}.0.{resnet(key, rest)}" if kind == "resnets" else f"{UNET_PREFIX}{block}.1.{rest}"

    def resnet(key: str, rest: str) -> str:
        layer, _, leaf = rest.rpartition(".")
        if layer not in UNET_RESNET:
            raise _unknown("UNet", key)
        return f"{UNET_RESNET[layer]}.{leaf}"

    return _renamed(keys, name)


def vae_names(keys: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers name -> original name (with prefix) of an AutoencoderKL."""
    blocks = len(config["up_block_types"])

    def name(key: str) -> str:
        if re.fullmatch(r"((encoder|decoder)\.conv_(in|out)|(post_)?quant_conv)\.\w+", key):
            return VAE_PREFIX + key
        if m := re.fullmatch(r"(encoder|decoder)\.conv_norm_out\.(\w+)", key):
            return f"{VAE_PREFIX}{m[1]}.norm_out.{m[2]}"
        if m := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d+)\.(.+)", key):
            return f"{VAE_PREFIX}{m[1]}.mid.block_{int(m[2]) + 1}.{m[3].replace('conv_shortcut', 'nin_shortcut')}"
        if (m := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)\.(\w+)", key)) and m[
            2
        ] in VAE_ATTENTION:
            return f"{VAE_PREFIX}{m[1]}.mid.attn_1.{VAE_ATTENTION[m[2]]}.{m[3]}"
        if m := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.(.+)", key):
            side = f"{VAE_PREFIX}encoder.down.{m[1]}"
        elif m := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(.+)", key):
            side = f"{VAE_PREFIX}decoder.up.{blocks - 1 - int(m[1])}"
        else:
            raise _unknown("VAE", key)
        if r := re.fullmatch(r"resnets\.(\d+)\.(.+)", m[2]):
            return f"{side}.block.{r[1]}.{r[2].replace('conv_shortcut', 'nin_shortcut')}"
        if r := re.fullmatch(r"(down|up)samplers\.0\.conv\.(\w+)", m[2]):
            return f"{side}.{r[1]}sample.conv.{r[2]}"
        raise _unknown("VAE", key)

    return _renamed(keys, name)


def original_unet(state: State, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A UNet's state under its original names, checked against diffusers' own reading of them."""
    names = unet_names(state, config)
    result = {names[key]: tensor for key, tensor in state.items()}
    _check("UNet", state, result, "convert_ldm_unet_checkpoint", config)
    return result


def original_vae(state: State, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A VAE's state under its original names; linear weights [C,C] of its attention become 1x1 convolutions."""
    names = vae_names(state, config)
    result = {}
    for key, tensor in state.items():
        pointwise = ".mid.attn_1." in names[key] and tensor.ndim == 2
        result[names[key]] = tensor[:, :, None, None] if pointwise else tensor
    _check("VAE", state, result, "convert_ldm_vae_checkpoint", config)
    return result


def _check(part: str, state: State, original: State, reader: str, config: Mapping[str, Any]) -> None:
    from diffusers.loaders import single_file_utils

    # Meta tensors: names and shapes say it all, and nothing is copied.
    back = getattr(single_file_utils, reader)(
        {key: torch.empty_like(t, device="meta") for key, t in original.items()}, dict(config)
    )
    wrong = sorted(back.keys() ^ state.keys()) + [
        key for key in state if key in back and back[key].shape != state[key].shape
    ]
    if wrong:
        raise UserError(
            f"diffusers would read {len(wrong)} weights of this {part} back under another name or shape, for example "
            f"{wrong[0]}; its block layout has no original checkpoint format, so export a diffusers folder instead."
        )


def original_clip(state: State, prefix: str) -> dict[str, torch.Tensor]:
    """A CLIPTextModel's state under its original names: "text_model." before each, as transformers < 5.6 had it, and
    position_ids."""
    result = {
        prefix + (key if key.startswith("text_model.") else f"text_model.{key}"): tensor
        for key, tensor in state.items()
    }
    name = "embeddings.position_embedding.weight"
    positions = state[name if name in state else f"text_model.{name}"]
    result[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(len(positions))[None]
    return result


def original_open_clip(state: State, prefix: str = SDXL_OPEN_CLIP_PREFIX) -> dict[str, torch.Tensor]:
    """A CLIPTextModelWithProjection's state as OpenCLIP's: q, k, v fused to in_proj [3D,D], text_projection transposed
    to [D,P]."""
    plain = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    result: dict[str, torch.Tensor] = {}
    for key, tensor in plain.items():
        if key == "text_projection.weight":
            result[f"{prefix}text_projection"] = tensor.T.contiguous()
        elif key == "embeddings.token_embedding.weight":
            result[f"{prefix}token_embedding.weight"] = tensor
        elif key == "embeddings.position_embedding.weight":
            result[f"{prefix}positional_embedding"] = tensor
        elif m := re.fullmatch(r"final_layer_norm\.(\w+)", key):
            result[f"{prefix}ln_final.{m[1]}"] = tensor
        elif m := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", key):
            fused = [plain[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")]
            result[f"{prefix}transformer.resblocks.{m[1]}.attn.in_proj_{m[2]}"] = torch.cat(fused)
        elif re.fullmatch(r"encoder\.layers\.\d+\.self_attn\.[kv]_proj\.(weight|bias)", key):
            continue  # fused with q
        elif (m := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)) and m[2] in CLIP_TO_OPEN_CLIP:
            result[f"{prefix}transformer.resblocks.{m[1]}.{CLIP_TO_OPEN_CLIP[m[2]]}.{m[3]}"] = tensor
        else:
            raise _unknown("second text encoder", key)
    return result
