"""Files of a diffusers folder's parts, read with a sentence where one is missing or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reflow.errors import UserError, short
from reflow.weights.guard import REMEDY

WEIGHTS = ("diffusion_pytorch_model", "model")


def read_json(path: Path, *, infinite: bool = False) -> dict[str, Any]:
    """A JSON file of a diffusers folder; infinite: infinities are read too. Raises UserError that says what is wrong with the folder."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=unbounded if infinite else refused)
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
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({short(str(error))}). {REMEDY}") from error


def refused(name: str) -> float:
    """NaN and infinities are no JSON, though Python reads and writes them."""
    raise ValueError(f"it holds {name}, which is no number")


def unbounded(name: str) -> float:
    """Infinities, which schedulers of diffusers have among their settings and write as Python does."""
    return refused(name) if name == "NaN" else float(name)
