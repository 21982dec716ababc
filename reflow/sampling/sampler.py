"""A plain sampling loop in latents, for validation and evaluation: no pipeline object, one noise per seed.

Time runs from t=1 (noise) to t=0 (data). A sample depends on its own seed and prompt only: not on the batch it is
drawn in (beyond rounding), nor on the device that makes the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from reflow.errors import UserError
from reflow.flow import DiscreteVP, Windows, WindowSolver
from reflow.models.conditioning import Conditioning, denoise
from reflow.models.family import Base
from reflow.sampling.flow import FlowWindowScheduler
from reflow.sampling.guidance import Guidance, guidance_scales
from reflow.sampling.piecewise import PiecewiseFlowScheduler
from reflow_kernels import cfg_combine


@dataclass(frozen=True)
class Samples:
    """latents [B,C,h,w] fp32, scaled as the UNet sees them; images [B,c,H,W] fp32 in [-1,1], None if not decoded;
    evaluations: UNet rows spent on each sample. Tensors lie on the network's device."""

    latents: torch.Tensor
    images: torch.Tensor | None
    evaluations: int


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise [B, *shape] fp32 on the CPU; row i comes from a CPU generator of its own, seeded with
    seeds[i]."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])


# A side in pixels, (height, width), or None: the base's own.
Resolution = int | tuple[int, int] | None


def latent_shape(base: Base, resolution: Resolution = None) -> tuple[int, int, int]:
    """(C, h, w) of the latents of images of this size. Raises UserError for a side that does not fit the UNet."""
    height, width = resolution if isinstance(resolution, tuple) else (resolution, resolution)
    channels, rows, _ = base.latent_shape(height)
    return channels, rows, base.latent_shape(width)[2]


Scheduler = PiecewiseFlowScheduler | FlowWindowScheduler


def student_scheduler(
    config: Mapping[str, Any], windows: int | Windows, *, prediction_type: str | None = None, network_time: str | None = None
) -> Scheduler:
    """The scheduler of a student trained on ``windows`` of a base whose scheduler has this config; a student of a flow is known by its
    network_time "flow"."""
    kind = FlowWindowScheduler if network_time == "flow" else PiecewiseFlowScheduler
    return kind.for_student(config, windows, prediction_type=prediction_type, network_time=network_time)


def scheduler_for(
    base: Base, windows: int | Windows, *, prediction_type: str | None = None, network_time: str | None = None
) -> Scheduler:
    """The scheduler of a student trained on ``windows`` of this base, which is exported with it; None means as the base has it."""
    time = network_time if isinstance(base.schedule(), DiscreteVP) else "flow"
    return student_scheduler(base.scheduler_config, windows, prediction_type=prediction_type, network_time=time)


def scheduled_noise(scheduler: FlowWindowScheduler) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """diffusers' flow schedulers name their arguments in another order."""
    return lambda clean, noise, timestep: scheduler.scale_noise(clean, timestep.to(clean.device), noise)


def first_step(scheduler: Scheduler, strength: float) -> int:
    """The step that image to image starts with, after set_timesteps: what is left is steps * strength, rounded down by the pipelines of Stable
    Diffusion and SDXL and up by those of flows. Raises UserError where none would be left."""
    if not 0 < strength <= 1:
        raise UserError(f"strength is {strength:g}; write a number above 0 (little changes) and up to 1 (all is new).")
    steps = len(scheduler.timesteps)
    flow = isinstance(scheduler, FlowWindowScheduler)
    first = int(steps - steps * strength) if flow else steps - min(int(steps * strength), steps)
    scheduler.set_begin_index(first)
    return first


# z_start [B,C,h,w], the prompts' conditioning, the null prompt's (None if never guided) -> z at t=0
Solve = Callable[[torch.Tensor, Conditioning, Conditioning | None], torch.Tensor]


def sample(
    base: Base,
    unet: nn.Module,
    prompts: Sequence[str] | Conditioning,
    steps: int | Sequence[int],
    seeds: Sequence[int],
    *,
    windows: int | Windows | None = None,
    scheduler: Scheduler | None = None,
    prediction_type: str | None = None,
    network_time: str | None = None,
    guidance_scale: Guidance = 1.0,
    null: Conditioning | None = None,
    noise: torch.Tensor | None = None,
    resolution: Resolution = None,
    batch_size: int | None = None,
    decode: bool = True,
    init: torch.Tensor | None = None,
    strength: float = 1.0,
) -> Samples:
    """Draw len(seeds) samples from a few-step student.

    ``steps`` is how many in all, or how many in each window. Give ``windows`` (their number or the windows;
    prediction_type None is the base's own) or a ready ``scheduler``.
    guidance_scale is a number or one for each step, as in :func:`guidance_scales`; steps at 1 or below do not compute
    the unconditional half. ``prompts`` may be a ready Conditioning with one row a seed. ``null``, one row for all,
    replaces the base's null prompt: that of a negative prompt, for example. ``noise`` [B,C,h,w] replaces the seeds'
    own. ``resolution`` is a side in pixels, or (height, width).

    ``init`` [1,C,h,w], latents scaled as the UNet sees them, starts from an image instead of noise: it is noised to
    the start of the last steps * strength steps, rounded as in diffusers (:func:`first_step`), and only those are run;
    guidance_scale then counts from the first step that is run. Raises UserError for fewer steps than windows, for prompts and seeds that
    differ in number, and for a strength that leaves no step.
    """
    if (windows is None) == (scheduler is None):
        raise ValueError("sample needs either windows or a scheduler, not both")
    if scheduler is None:
        scheduler = scheduler_for(base, windows, prediction_type=prediction_type, network_time=network_time)
    parameter = next(unet.parameters())
    split = None if isinstance(steps, int) else tuple(steps)
    scheduler.set_timesteps(steps if isinstance(steps, int) else sum(steps), parameter.device, steps_per_window=split)
    first = 0 if init is None else first_step(scheduler, strength)
    timesteps = scheduler.timesteps[first:]
    scales = guidance_scales(guidance_scale, len(timesteps))

    def solve(z: torch.Tensor, prompt: Conditioning, null: Conditioning | None) -> torch.Tensor:
        both = null.cat(prompt) if null is not None else None
        if init is not None:
            noised = scheduler.add_noise if isinstance(scheduler, PiecewiseFlowScheduler) else scheduled_noise(scheduler)
            z = noised(init.to(z).expand(z.shape), z, timesteps[:1])
        for timestep, scale in zip(timesteps, scales, strict=True):
            if scale > 1:
                output = denoise(unet, torch.cat([z, z]).to(parameter.dtype), timestep.expand(2 * len(z)), both.guiding(scale))
                output = cfg_combine(output.float(), scale)
            else:
                output = denoise(unet, z.to(parameter.dtype), timestep.expand(len(z)), prompt)
            z = scheduler.step(output, timestep, z).prev_sample
        return z

    guided = any(scale > 1 for scale in scales)
    return collect(
        base,
        unet,
        prompts,
        seeds,
        solve,
        guided=guided,
        evaluations=sum(2 if scale > 1 else 1 for scale in scales),
        null=null,
        noise=noise,
        resolution=resolution,
        batch_size=batch_size,
        decode=decode,
    )


def sample_teacher(
    base: Base,
    unet: nn.Module,
    prompts: Sequence[str] | Conditioning,
    steps: int,
    seeds: Sequence[int],
    *,
    method: str = "ddim",
    guidance_scale: float = 1.0,
    null: Conditioning | None = None,
    noise: torch.Tensor | None = None,
    resolution: Resolution = None,
    batch_size: int | None = None,
    decode: bool = True,
) -> Samples:
    """Draw samples from the pre-trained base itself: ``steps`` steps of the solver ("ddim" or "heun") over one window.

    The solver goes from index to index, also where ``steps`` does not divide 1000 (stock DDIM floors 1000/32). Other
    arguments are those of :func:`sample`; guidance is one number. Raises UserError for steps that do not fit the
    schedule.
    """
    parameter = next(unet.parameters())
    guided = guidance_scale > 1
    try:
        solver = WindowSolver(
            base.schedule(resolution),
            Windows.uniform(1),
            steps,
            prediction_type=base.prediction_type,
            method=method,
            guidance_scale=guidance_scale if guided else None,
            device=parameter.device,
        )
    except ValueError as error:
        raise UserError(str(error)) from error

    def solve(z: torch.Tensor, prompt: Conditioning, null: Conditioning | None) -> torch.Tensor:
        return one_window(solver, unet, z, prompt, null)

    return collect(
        base,
        unet,
        prompts,
        seeds,
        solve,
        guided=guided,
        evaluations=solver.evaluations,
        null=null,
        noise=noise,
        resolution=resolution,
        batch_size=batch_size,
        decode=decode,
    )


def one_window(
    solver: WindowSolver, network: nn.Module, z: torch.Tensor, prompt: Conditioning, null: Conditioning | None
) -> torch.Tensor:
    """z [B,C,h,w] at the end of a solver's only window; the null prompt's rows are taken where the solver is guided."""
    rows = prompt
    if solver.guidance_scale is not None and null is not None:
        rows = null.cat(prompt).guiding(solver.guidance_scale)
    window = torch.zeros(len(z), dtype=torch.long, device=z.device)
    dtype = next(network.parameters()).dtype
    return solver.solve(lambda x, timestep: denoise(network, x, timestep, rows), z, window, input_dtype=dtype)


@torch.no_grad()
def collect(
    base: Base,
    unet: nn.Module,
    prompts: Sequence[str] | Conditioning,
    seeds: Sequence[int],
    solve: Solve,
    *,
    guided: bool,
    evaluations: int,
    null: Conditioning | None,
    noise: torch.Tensor | None,
    resolution: Resolution,
    batch_size: int | None,
    decode: bool,
) -> Samples:
    """Samples of all prompts, batch by batch, by ``solve``. guided: whether it is given the null prompt's rows."""
    if isinstance(prompts, str):
        raise TypeError("prompts is one string; give a list with one prompt for each seed")
    if len(prompts) != len(seeds):
        raise UserError(f"There are {len(prompts)} prompts and {len(seeds)} seeds; every sample needs one of each.")
    if not seeds:
        raise UserError("Nothing to sample: there are no prompts; give at least one.")
    parameter = next(unet.parameters())
    place = dict(device=parameter.device, dtype=parameter.dtype)
    if guided:
        null = (base.null_conditioning(1, resolution) if null is None else null).to(**place)
    latents, images = [], []
    size = batch_size or len(seeds)
    for first in range(0, len(seeds), size):
        rows = slice(first, first + size)
        z = (initial_noise(seeds[rows], latent_shape(base, resolution)) if noise is None else noise[rows]).to(
            parameter.device, torch.float32
        )
        prompt = (
            prompts.select(rows)
            if isinstance(prompts, Conditioning)
            else _encode(base, list(prompts[rows]), resolution)
        )
        z = solve(z, prompt.to(**place), null.expand(len(z)) if guided else None)
        latents.append(z)
        if decode:
            images.append(base.decode(z).to(parameter.device))
    return Samples(torch.cat(latents), torch.cat(images) if decode else None, evaluations)


def _encode(base: Base, prompts: list[str], resolution: Resolution) -> Conditioning:
    """Each different prompt is encoded once."""
    different = list(dict.fromkeys(prompts))
    encoded = base.encode_prompts(different, resolution)
    number = {prompt: i for i, prompt in enumerate(different)}
    return encoded.select(
        torch.tensor([number[prompt] for prompt in prompts], device=encoded.tensors[0].device)
    )
