"""diffusers' own schedulers around the bed's teacher: DDIM, DPM-Solver, DPM-Solver++, UniPC and Heun, as a user would sample the base.

Trailing spacing, the base's betas, and the table's index 0 as the clean end instead of sigma = 0, since that is where the bed's flow ends.
Time runs from t=1 (noise) to t=0 (data).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from reflow.experiments.beds.exact import SCHEDULE, ExactBed, Model
from reflow.experiments.beds.mixture import NULL

COMMON = {**SCHEDULE, "timestep_spacing": "trailing"}


def dpm(**settings: Any) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(**COMMON, final_sigmas_type="sigma_min", **{"solver_order": 2, **settings})


KINDS: dict[str, Callable[[], Any]] = {
    "DDIM": lambda: DDIMScheduler(**COMMON, clip_sample=False, set_alpha_to_one=False),
    "DPM-Solver": lambda: dpm(algorithm_type="dpmsolver"),
    "DPM-Solver++": lambda: dpm(algorithm_type="dpmsolver++"),
    "UniPC": lambda: UniPCMultistepScheduler(**COMMON, final_sigmas_type="sigma_min", solver_order=2),
    "Heun": lambda: HeunDiscreteScheduler(**COMMON),
}


def made(kind: str, steps: int) -> Any:
    """The scheduler, its steps set; Heun of diffusers always goes to sigma = 0, here to the table's end, by its first-order last step."""
    scheduler = KINDS[kind]()
    scheduler.set_timesteps(steps)
    if kind == "Heun":
        scheduler.sigmas[-1] = ((1 - scheduler.alphas_cumprod[0]) / scheduler.alphas_cumprod[0]) ** 0.5
    return scheduler


def evaluations(kind: str, steps: int) -> int:
    """Network rows an image, without guidance: Heun asks twice a step but for the last."""
    return len(made(kind, steps).timesteps)


@torch.no_grad()
def sample(bed: ExactBed, model: Model, scheduler: Any, noise: Tensor, labels: Tensor, *, guidance: float | None = None) -> Tensor:
    """z at the table's clean end [B, D] from noise [B, D], which is taken as the state at t = 1 as the bed takes it.

    Schedulers that count in sigma hold z / alpha = sqrt(1 + sigma^2) z and are asked in their own scale.
    """
    labels_of = labels if guidance is None else torch.cat([torch.full_like(labels, NULL), labels])
    in_sigma = isinstance(scheduler, HeunDiscreteScheduler)
    z = noise * (1.0 + scheduler.sigmas[0].to(noise) ** 2).sqrt() if in_sigma else noise
    for timestep in scheduler.timesteps:
        shown = scheduler.scale_model_input(z, timestep)
        rows = shown if guidance is None else torch.cat([shown, shown])
        output = model(rows.to(noise.dtype), timestep.to(noise).expand(len(rows)), labels_of)
        if guidance is not None:
            without, asked = output.chunk(2)
            output = without + guidance * (asked - without)
        z = scheduler.step(output, timestep, z).prev_sample
    return z * bed.clean()[0] if in_sigma else z
