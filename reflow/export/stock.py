"""The stock-scheduler question: does diffusers' own DDIMScheduler sample a student exactly?"""

from __future__ import annotations

from typing import Any

import torch

from reflow.sampling import PiecewiseFlowScheduler

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


def stock_scheduler(scheduler: PiecewiseFlowScheduler, steps: int | None = None) -> tuple[Any | None, str]:
    """The stock DDIMScheduler that samples this scheduler's student exactly in ``steps`` steps (None: one a window),
    or None, and why.

    The claim is tried, not assumed: both schedulers take all steps on one random input and must agree to 1e-6 of the
    result's size.
    """
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
