"""What a single-file model says of itself and how other programs are to sample it.

ModelSpec metadata (Stability AI's keys for .safetensors files, which ComfyUI, kohya's scripts and AUTOMATIC1111 read),
marker tensors of v-prediction models, and the sampler settings of ComfyUI and AUTOMATIC1111 that step as the student
was trained. reflow/sampling/README.md derives the settings, and tests/sampling/test_other_programs.py checks them.
"""

from __future__ import annotations

import datetime
from typing import Any

import torch

from reflow.sampling import FlowWindowScheduler, PiecewiseFlowScheduler
from reflow.sampling.flow import even_before
from reflow.sampling.sampler import Scheduler

ARCHITECTURES = {"sd15": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}
PREDICTS = {"ddim_eps": "epsilon", "diff_eps": "epsilon", "ddim_v": "v", "velocity": "velocity"}
PAGE = "reflow/sampling/README.md"


def markers(scheduler: PiecewiseFlowScheduler) -> dict[str, torch.Tensor]:
    """Empty tensors by which programs know a v-prediction checkpoint ("v_pred") and zero terminal SNR ("ztsnr")."""
    if scheduler.config.prediction_type != "ddim_v":
        return {}
    zero_snr = scheduler.config.rescale_betas_zero_snr
    return {name: torch.zeros(0) for name in ("v_pred", *(["ztsnr"] if zero_snr else []))}


def other_programs(scheduler: Scheduler, stock: bool, guidance: float = 1.0) -> dict[str, str]:
    """Settings by program, or one sentence under "ComfyUI, AUTOMATIC1111" where none of their samplers fits.

    ``stock`` is whether stock DDIM samples the student exactly, one step a window.
    """
    count = len(scheduler.windows)
    if isinstance(scheduler, FlowWindowScheduler):
        shift = scheduler.config.shift
        if even_before(scheduler.windows, shift):
            sampler = f"KSampler: sampler_name euler, scheduler simple, steps {count}, cfg {guidance:g}, denoise 1"
            return {"ComfyUI": f"ModelSamplingSD3 with shift {shift:g}, then {sampler} (by its formulas; not tried there)"}
        return {"ComfyUI": f"no scheduler of its own starts at {', '.join(f'{t:g}' for t in scheduler.windows.t_start)}; use diffusers ({PAGE})"}
    if not stock:
        return {
            "ComfyUI, AUTOMATIC1111": f"no sampler of theirs steps as this student was trained; use diffusers ({PAGE})"
        }
    cfg = f"{guidance:g}"
    return {
        "ComfyUI": f"KSampler: sampler_name euler, scheduler simple, steps {count}, cfg {cfg}, denoise 1",
        "AUTOMATIC1111, Forge": f"sampling method Euler, schedule type Simple, {count} steps, CFG scale {cfg}",
    }


def model_spec(
    scheduler: PiecewiseFlowScheduler, family: str, *, title: str, resolution: int, usage: str, **more: Any
) -> dict[str, str]:
    """ModelSpec 1.0 metadata of a single file with the original key names. family is "sd15" or "sdxl"; ``more`` are
    further keys of the specification (author, license, description, ...)."""
    kind = PREDICTS[scheduler.config.prediction_type]
    fields = {
        "sai_model_spec": "1.0.0",
        "architecture": ARCHITECTURES[family],
        "implementation": "sgm",
        "title": title,
        "date": datetime.date.today().isoformat(),
        "resolution": f"{resolution}x{resolution}",
        "prediction_type": kind,
        "predict_key": kind,
        "usage_hint": usage,
    }
    return {f"modelspec.{key}": str(value) for key, value in {**fields, **more}.items() if value not in (None, "")}
