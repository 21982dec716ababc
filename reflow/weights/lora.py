"""LoRA files of students: diffusers' own format, and what reads one where a whole student's weights are wanted.

Keys are "unet.<layer>.lora_A.weight" and "...lora_B.weight", of a transformer "transformer.<layer>...", as
`pipe.load_lora_weights` takes them. alpha / rank is
in B, so that the file's scale is 1 for every reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from reflow.errors import UserError, short
from reflow.weights.files import State, read_state, write_state
from reflow.weights.guard import opened
from reflow.weights.kohya import PARTS, kohya_names
from reflow.weights.runs import stage_folder

WHOLE_FILE, LORA_FILE = "unet_ema.safetensors", "lora_ema.safetensors"
PREFIX, (A, B) = "unet.", PARTS
PREFIXES = (PREFIX, "transformer.")  # of what diffusers loads into a pipeline's unet or transformer


def stage_file(run_dir: Path, stage: int) -> Path:
    """The weights of a run's stage (a position, from 0): the LoRA file if that is there, else the whole student's."""
    folder = stage_folder(run_dir, stage)
    return folder / LORA_FILE if (folder / LORA_FILE).is_file() else folder / WHOLE_FILE


def is_lora(path: str | Path) -> bool:
    """Whether a .safetensors file holds LoRA weights for a UNet or a transformer."""
    if not Path(path).is_file():
        return False
    with opened(path) as file:
        keys = list(file.keys())
    return bool(keys) and all(key.startswith(PREFIXES) and key.endswith((A, B)) for key in keys)


def read_lora(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA file. Raises UserError where A and B of a layer do not belong together."""
    state = read_state(path)
    for key in sorted(state):
        other = key.removesuffix(A) + B if key.endswith(A) else key.removesuffix(B) + A
        down, up = (state.get(k) for k in ((key, other) if key.endswith(A) else (other, key)))
        if down is None or up is None or min(down.ndim, up.ndim) < 2 or len(down) != up.shape[1]:
            raise UserError(f"{path} is no whole LoRA: {short(key)} and {short(other)} do not belong together. Write or download it again.")
    return state


def bare(key: str) -> str:
    """A file's key without the part of the pipeline that it is for."""
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key


def lora_state(adapter: State, scale: float, part: str = "unet") -> dict[str, torch.Tensor]:
    """An adapter's own state ("<layer>.lora_A.weight") as a file has it; scale is its alpha / rank, part what it is of."""
    return {f"{part}.{key}": tensor * scale if key.endswith(B) else tensor for key, tensor in adapter.items()}


def adapter_state(state: State, scale: float) -> dict[str, torch.Tensor]:
    """The inverse of `lora_state`."""
    return {bare(key): tensor / scale if key.endswith(B) else tensor for key, tensor in state.items()}


def merge_lora(base: State, lora: State) -> dict[str, torch.Tensor]:
    """W + B A per target layer in fp32, the other weights as they are. Raises UserError where a layer does not fit."""
    merged, wrong = dict(base), []
    for key in (k for k in lora if k.endswith(A)):
        name = bare(key).removesuffix(A) + ".weight"
        down, up, weight = lora[key], lora.get(key.removesuffix(A) + B), base.get(name)
        if (
            up is None
            or weight is None
            or (up.shape[0], *down.shape[1:]) != tuple(weight.shape)
            or up.shape[1] != down.shape[0]
        ):
            wrong.append(name)
            continue
        delta = (up.flatten(1).float() @ down.flatten(1).float()).view(weight.shape).to(weight.device)
        merged[name] = weight.float() + delta
    if wrong:
        raise UserError(
            f"The LoRA does not fit the base: {len(wrong)} layers are missing there or have other shapes, the first is "
            f"{wrong[0]}. Give the base that this student was trained from."
        )
    return merged


def student_state(base: str | Path | State, weights: str | Path | State) -> dict[str, torch.Tensor]:
    """A whole student's state: `weights` as it is, or a LoRA file merged into the base's UNet. Raises UserError where
    the two do not fit; of a whole student and a base on the disk, whatever makes a network of them says so."""
    if not isinstance(weights, Mapping) and is_lora(weights):
        return merge_lora(read_state(base), read_lora(weights))
    state = read_state(weights)
    if isinstance(base, Mapping):
        wrong = sorted(base.keys() ^ state.keys()) or [key for key in base if base[key].shape != state[key].shape]
        if wrong:
            raise UserError(
                f"{weights} does not fit the base's UNet: {len(wrong)} weights differ in name or shape, the first is {short(wrong[0])}. Give the "
                "base that this student was trained from."
            )
    return state


def kohya_state(lora: State, unet_config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The same LoRA as kohya's scripts write one, for a UNet of this config; alpha is the rank, so the scale stays 1.
    Raises UserError for layers that have no such name."""
    names = kohya_names([key.removeprefix(PREFIX).removesuffix(A) for key in lora if key.endswith(A)], unet_config)
    result = {}
    for layer, name in names.items():
        for ours, theirs in PARTS.items():
            result[name + theirs] = lora[PREFIX + layer + ours]
        result[f"{name}.alpha"] = torch.tensor(len(lora[PREFIX + layer + A]))
    return result


def export_lora(weights: str | Path, out: str | Path, *, dtype: str | torch.dtype = "fp32",
                kohya: Mapping[str, Any] | None = None, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a stage's LoRA as one .safetensors file, in diffusers' names or, given the config of the base's UNet as
    ``kohya``, in those of kohya's scripts. Raises UserError for a student that is no LoRA."""
    if not is_lora(weights):
        raise UserError(
            f"{weights} is a whole student and no LoRA, and none is extracted from it; export --format delta instead, "
            "or train with model.lora_rank."
        )
    state = read_lora(weights)
    return write_state(state if kohya is None else kohya_state(state, kohya), out, dtype=dtype, metadata=metadata)
