"""Files of a diffusers folder's parts, read with a sentence where one is missing or damaged."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from reflow.errors import UserError

REMEDY = "Download or export the folder again, or point the recipe at a complete one."
WEIGHTS = ("diffusion_pytorch_model", "model")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a diffusers folder. Raises UserError that says what is wrong with the folder."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__} where a table {{...}} belongs")
        return found
    except FileNotFoundError:
        if path.name == "model_index.json" and (path.parent / "recipe.toml").is_file():
            raise UserError(
                f"{path.parent} is a training run and no diffusers folder. Give it as --run-dir, or export it first."
            ) from None
        if path.name == "model_index.json":
            raise UserError(
                f"{path.parent} is no diffusers pipeline: it has no model_index.json. "
                "Write the folder that save_pretrained made."
            ) from None
        raise UserError(f"{path} is missing. {REMEDY}") from None
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON ({error}). {REMEDY}") from error


def need_finite(tensors: Iterable[tuple[str, torch.Tensor]], place: str) -> None:
    """Raises UserError that counts the named floating-point tensors with a NaN or an infinity; one pass, no copies."""
    bad = []
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() and not torch.isfinite(torch.stack(tensor.detach().aminmax())).all():
            bad.append(name)
    if bad:
        raise UserError(
            f"{len(bad)} tensors of {place} are not finite, the first is {bad[0]}: its weights are damaged, or were cast to fp16 beyond "
            f"its range. {REMEDY}"
        )
