"""A LoRA, or a whole network, from a local file put into a pipeline, with a sentence where it does not fit.

LoRA files of diffusers, kohya's scripts and PEFT are read as diffusers reads them, and fused: what is measured is the model that a user of
the file would run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from reflow.errors import UserError, quote, short
from reflow.evaluation.contenders.calls import denoisers
from reflow.weights import guard

ADAPTER = "compared"
PEFT = "base_model.model."
# Ends of the names of the first of a layer's two matrices, in the spellings of diffusers, PEFT and kohya's scripts.
FIRST = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight", ".lora_linear_layer.down.weight", "_lora.down.weight")


def need_lora(file: Path) -> None:
    """Raises UserError where there is no file that a LoRA can be read from."""
    if not file.is_file():
        inside = sorted(file.glob("*.safetensors")) if file.is_dir() else []
        hint = f"give the file in it, {inside[0]}" if inside else "give the path of a .safetensors file on this disk"
        raise UserError(f"There is no LoRA file {file}: {hint}.")
    if file.suffix != ".safetensors":
        raise UserError(f"{file} does not end in .safetensors; a LoRA is read from no other format here, since pickles can run code. Convert it, "
                        f"or download its .safetensors form.")  # fmt: skip


def read_lora(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA or a network. Raises UserError for a file that is missing, damaged, or no .safetensors."""
    need_lora(file)
    state, _ = guard.load(file)
    guard.need_weights(((k, t) for k, t in state.items() if t.is_floating_point()), str(file))
    return state


def put_in(pipe: Any, file: Path, scale: float, label: str) -> str:
    """Put a file's weights into the pipeline: "lora" fused at this scale, or "network", all weights of the denoiser itself. Raises UserError
    for a file that fits nothing of it, or only in part."""
    state = read_lora(file)
    name, denoiser = next(iter(denoisers(pipe).items()))
    if not any("lora" in key.lower() or key.startswith(PEFT) for key in state):
        _replace(denoiser, state, file, name, label)
        return "network"
    if not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"{label}: {type(pipe).__name__} takes no LoRA in this version of diffusers. Leave the LoRA out.")
    state = _from_peft(state, file, name)
    wanted = sum(key.endswith(FIRST) for key in state)
    try:
        pipe.load_lora_weights(state, adapter_name=ADAPTER)
    except Exception as error:  # what peft and diffusers raise on tensors of another model is of many kinds
        raise UserError(
            f"{file.name} does not fit {label}: it is a LoRA of another base, or of parts that {type(pipe).__name__} does not have "
            f"({_reason(error)}). Give the base that it was trained from."
        ) from error
    got = sum(ADAPTER in getattr(module, "lora_A", {}) for part in pipe.components.values() if isinstance(part, torch.nn.Module)
              for module in part.modules())  # fmt: skip
    if got < max(wanted, 1):
        example = next((key for key in state if key.endswith(FIRST)), next(iter(state), "nothing"))
        raise UserError(f"{file.name} does not fit {label}: {got} of its {wanted} layers are there (its names are like {short(example)}). Give the "
                        f"base that it was trained from.")  # fmt: skip
    if scale:
        pipe.fuse_lora(components=_loadable(pipe), lora_scale=scale)
    pipe.unload_lora_weights()
    return "lora"


def _loadable(pipe: Any) -> list[str]:
    return [name for name in pipe._lora_loadable_modules if isinstance(getattr(pipe, name, None), torch.nn.Module)]


def _reason(error: Exception) -> str:
    """The first mismatch that torch's or peft's long message names."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return short(next((line for line in lines if "size mismatch" in line), guard.reason_of(error)))


def _replace(denoiser: torch.nn.Module, state: dict[str, torch.Tensor], file: Path, name: str, label: str) -> None:
    wanted = denoiser.state_dict()
    odd = sorted(wanted.keys() ^ state.keys()) + [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    if odd:
        raise UserError(
            f"{file.name} holds no LoRA, and as a whole {name} it does not fit {label}: {len(odd)} of its weights differ in name or shape, the "
            f"first is {short(odd[0])}. Give a LoRA, or the base that this network was trained from."
        )
    denoiser.load_state_dict(state)


def _from_peft(state: dict[str, torch.Tensor], file: Path, name: str) -> dict[str, torch.Tensor]:
    """A file that PEFT saved, under the names that diffusers reads, its alpha (of adapter_config.json beside it) multiplied in."""
    if not any(key.startswith(PEFT) for key in state):
        return state
    config = file.with_name("adapter_config.json")
    try:
        read = json.loads(config.read_text(encoding="utf-8"))
        plain, alphas, ranks = float(read["lora_alpha"]), dict(read.get("alpha_pattern") or {}), dict(read.get("rank_pattern") or {})
        if alphas or ranks or read.get("use_rslora") or read.get("use_dora"):
            raise ValueError("it has alphas or ranks of single layers, rsLoRA or DoRA, which are not read here")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} was saved by PEFT, and its scale, lora_alpha of {config}, cannot be read ({quote(str(error))}). Put that file "
                        f"beside it.") from error  # fmt: skip
    named = {}
    for key, tensor in state.items():
        rank = tensor.shape[1] if ".lora_B." in key else 1
        named[f"{name}.{key.removeprefix(PEFT)}"] = tensor * (plain / rank) if ".lora_B." in key else tensor
    return named
