"""A student as one file with the original checkpoint's key names, and what the file says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from reflow.errors import UserError
from reflow.export.spec import markers, model_spec, other_programs
from reflow.export.stock import stock_scheduler
from reflow.export.student import checked_unet, same_reading
from reflow.models import Family, family
from reflow.models.folder import read_index
from reflow.sampling import PiecewiseFlowScheduler
from reflow.weights.files import State, cast, dtype_of, read_state, refuse_existing, write_state
from reflow.weights.original_names import (
    SD_CLIP_PREFIX,
    SDXL_CLIP_PREFIX,
    original_clip,
    original_open_clip,
    original_unet,
    original_vae,
)


def _single_file_family(base_path: Path) -> Family:
    index = read_index(base_path)
    names = {"StableDiffusionPipeline": "sd15", "StableDiffusionXLPipeline": "sdxl"}
    if index.get("_class_name") not in names:
        raise UserError(
            f"{base_path} holds a {index.get('_class_name')}; one file with original key names exists for "
            f"{' and '.join(names)} only."
        )
    return family(names[index["_class_name"]])


def single_file_state(
    base_path: str | Path, unet_state: str | Path | State, *, dtype: str | torch.dtype = "fp16"
) -> dict[str, torch.Tensor]:
    """UNet, VAE and text encoders of an SD1.5 or SDXL model as one state with the original checkpoint's key names.

    Left out is what diffusers does not keep: OpenCLIP's logit_scale and the schedule's constants, which no program
    needs. Raises UserError for models that have no such format: SD2 bases, block layouts of other kinds, an SDXL with
    two text encoders of one width.
    """
    base_path = Path(base_path)
    base = _single_file_family(base_path).load(base_path, parts=("vae", "text"))
    encoders = base.text_encoders
    if not base.family.pooled and encoders[0].config.hidden_act != "quick_gelu":
        raise UserError(
            f"{base_path} has the text encoder of SD2, whose original checkpoint holds a layer that diffusers "
            "dropped, so it cannot be written as one file; export a diffusers folder instead."
        )
    if base.family.pooled and encoders[0].config.hidden_size == encoders[1].config.hidden_size:
        raise UserError(
            f"{base_path} has two text encoders of one width, which readers of single SDXL files cannot tell apart; "
            "export a diffusers folder instead."
        )
    dtype = dtype_of(dtype)
    state = original_unet(checked_unet(read_state(unet_state), base.configs["unet"], dtype), base.configs["unet"])
    state |= original_vae(base.vae.state_dict(), base.configs["vae"])
    if base.family.pooled:
        state |= original_clip(encoders[0].state_dict(), SDXL_CLIP_PREFIX)
        state |= original_open_clip(encoders[1].state_dict())
    else:
        state |= original_clip(encoders[0].state_dict(), SD_CLIP_PREFIX)
    return cast(state, dtype)


def export_single_file(
    base_path: str | Path,
    unet_state: str | Path | State,
    out: str | Path,
    *,
    dtype: str | torch.dtype = "fp16",
    metadata: Mapping[str, Any] | None = None,
    scheduler: PiecewiseFlowScheduler | None = None,
    guidance: float = 1.0,
) -> Path:
    """Write one .safetensors file with the original checkpoint's key names; ``metadata`` is stored with it as text.

    Such a file has no scheduler. Give the student's own, from PiecewiseFlowScheduler.for_student, and the file says
    in ModelSpec metadata what the network predicts and how it is to be sampled, with ``guidance``; v-prediction is
    marked as programs expect it. Raises UserError as :func:`single_file_state` does, and if ``out`` exists.
    """
    refuse_existing(Path(out))
    state, says = single_file_state(base_path, unet_state, dtype=dtype), dict(metadata or {})
    if scheduler is not None:
        same_reading(unet_state, scheduler)
        base = _single_file_family(Path(base_path)).load(base_path, parts=())
        settings = other_programs(scheduler, stock_scheduler(scheduler)[0] is not None, guidance)
        usage = ". ".join(f"{program}: {how}" for program, how in settings.items())
        spec = model_spec(
            scheduler, base.family.name, title=Path(out).stem, resolution=base.resolution, usage=usage
        )
        state, says = state | markers(scheduler), spec | says
    return write_state(state, out, metadata={key: str(value) for key, value in says.items()})
