"""The stock-scheduler question, asked of schedulers alone: which of diffusers step exactly as a student's?"""

from __future__ import annotations

from typing import Any

import torch

from reflow.sampling import FlowWindowScheduler, PiecewiseFlowScheduler
from reflow.sampling.sampler import Scheduler

STOCK_TYPES = {"ddim_eps": "epsilon", "ddim_v": "v_prediction"}
STOCK_TOLERANCE = 1e-6
BETA_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


def flow_candidates(scheduler: FlowWindowScheduler, steps: int) -> list[Any]:
    """The schedulers of diffusers that some pipeline's default call may step with exactly as a student of a flow.

    With the windows' shift: right for pipelines that pass even sigmas. For one step a window also shift 1 ending at 1/K: right for windows
    even in sigma where a pipeline passes a number of steps alone, whose call with any other shift spends the last step at almost no noise
    (diffusers #13243).
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    made = [FlowMatchEulerDiscreteScheduler(shift=scheduler.config.shift)]
    if 1 < steps == len(scheduler.windows):
        made.append(FlowMatchEulerDiscreteScheduler(shift=1.0, shift_terminal=1 / steps))
    return made


def stock_flow(scheduler: FlowWindowScheduler, steps: int) -> tuple[Any | None, str]:
    """The scheduler of diffusers that starts its steps at the student's own noise levels however a pipeline calls it, with even sigmas or with
    a number of steps alone, or None; and why."""
    wanted = torch.tensor([*scheduler.grid(steps), scheduler.windows.t_end[-1]])
    found = []
    for stock in flow_candidates(scheduler, steps):
        off = 0.0
        for passed in ({"num_inference_steps": steps}, {"sigmas": [1 - i / steps for i in range(steps)]}):
            stock.set_timesteps(**passed)
            off = max(off, float((stock.sigmas - wanted).abs().max()))
        if off <= STOCK_TOLERANCE:
            return stock, f"{type(stock).__name__} with {steps} steps starts at the student's own noise levels, to {off:.0e}"
        found.append(off)
    return None, (
        f"diffusers' own FlowMatchEulerDiscreteScheduler, called with {steps} steps, is up to {min(found):.2g} away from the student's noise levels"
    )


def stock_scheduler(scheduler: Scheduler, steps: int | None = None) -> tuple[Any | None, str]:
    """The scheduler of diffusers that samples this scheduler's student exactly in ``steps`` steps (None: one a window),
    or None, and why: DDIMScheduler, or for a flow its Euler where every pipeline's call is right with it.

    The claim is tried, not assumed: both schedulers take all steps on one random input and must agree to 1e-6 of the
    result's size; a flow's must start its steps at the same noise levels. No pipeline takes part, so this is for files,
    which have none; a folder's scheduler is tried through its pipeline, `reflow.export.trial`.
    """
    if isinstance(scheduler, FlowWindowScheduler):
        return stock_flow(scheduler, len(scheduler.windows) if steps is None else steps)
    from diffusers import DDIMScheduler

    count, kind = len(scheduler.windows), scheduler.config.prediction_type
    steps = count if steps is None else steps
    if kind not in STOCK_TYPES:
        return None, f"stock DDIM has no {kind} parameterisation"
    if steps != count:
        return None, f"{steps} steps on {count} windows are no DDIM steps; stock DDIM is right for {count} steps only"
    stock = DDIMScheduler(
        **{key: scheduler.config[key] for key in BETA_KEYS},
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
        prediction_type=STOCK_TYPES[kind],
    )
    trial = PiecewiseFlowScheduler.from_config(scheduler.config)
    stock.set_timesteps(steps)
    trial.set_timesteps(steps)
    if stock.timesteps.tolist() != trial.timesteps.tolist():
        return None, (
            f"the student is called at timesteps {[round(t, 3) for t in trial.timesteps.tolist()]} and stock DDIM "
            f"would use {stock.timesteps.tolist()}"
        )
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(2, 4, 32, 32, generator=generator)
    for timestep in stock.timesteps:
        output = torch.randn(ours.shape, generator=generator)
        ours = trial.step(output, timestep, ours).prev_sample
        theirs = stock.step(output, timestep, theirs).prev_sample
    error = ((ours - theirs).norm() / ours.norm()).item()
    if not error <= STOCK_TOLERANCE:
        return None, f"stock DDIM with {steps} steps differs by {error:.1e} of the result on a random input"
    return stock, f"stock DDIM with {steps} steps agrees to {error:.0e} of the result on a random input"
