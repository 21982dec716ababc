"""Two networks on one path: the student in some windows, its teacher in the others, each by its own steps.

For half-straightening, whose student has learnt one half of time, and for whoever wants the base's own steps where detail
is made. Time runs from t=1 (noise) to t=0 (data).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from reflow.errors import UserError
from reflow.flow import ChordTable, DiscreteVP, Windows, WindowSolver
from reflow.models.conditioning import Conditioning
from reflow.models.family import Base
from reflow.sampling.piecewise import PiecewiseFlowScheduler
from reflow.sampling.sampler import Resolution, Samples, collect, one_window


def sample_parts(
    base: Base,
    student: nn.Module,
    prompts: Sequence[str] | Conditioning,
    steps: Sequence[int],
    seeds: Sequence[int],
    *,
    scheduler: PiecewiseFlowScheduler,
    teacher_windows: Collection[int],
    guidance_scale: float = 1.0,
    teacher_guidance_scale: float = 1.0,
    null: Conditioning | None = None,
    noise: torch.Tensor | None = None,
    resolution: Resolution = None,
    batch_size: int | None = None,
    decode: bool = True,
) -> Samples:
    """Draw len(seeds) samples: ``base.unet`` solves the ``teacher_windows`` by its own DDIM, ``student`` the others.

    ``steps`` are those of each window, of which ``scheduler`` (the student's) has K; ``teacher_windows`` are numbers from 0
    at the noisy end. Each network has its own guidance scale; at 1 or below it computes no unconditional half. Other
    arguments are those of :func:`reflow.sampling.sample`. Raises UserError for steps or windows that do not fit.
    """
    windows, settings = scheduler.windows, scheduler.config
    if len(steps) != len(windows) or min(steps) < 1:
        raise UserError(
            f"The steps {', '.join(map(str, steps))} do not fit the student's {len(windows)} windows; write one number of at "
            "least 1 for each of them."
        )
    wrong = sorted(k for k in teacher_windows if not 0 <= k < len(windows))
    if wrong:
        raise UserError(f"There is no window {wrong[0] + 1}; the student has {len(windows)}, counted from 1 at the noisy end.")
    schedule, device = DiscreteVP.from_config(base.scheduler_config), next(student.parameters()).device
    table = ChordTable(schedule, windows, settings.prediction_type, device=device)
    solvers: list[tuple[WindowSolver, nn.Module]] = []
    for k, count in enumerate(steps):
        part, taught = Windows((windows.t_start[k], windows.t_end[k])), k in teacher_windows
        scale = teacher_guidance_scale if taught else guidance_scale
        guidance = scale if scale > 1 else None
        try:
            solver = (
                WindowSolver(
                    schedule, part, count, prediction_type=base.prediction_type, guidance_scale=guidance, device=device
                )
                if taught
                else WindowSolver.from_student(
                    table, part, count, network_time_mode=settings.network_time, guidance_scale=guidance
                )
            )
        except ValueError as error:
            raise UserError(f"Window {k + 1}: {error}") from error
        solvers.append((solver, base.unet if taught else student))

    def solve(z: torch.Tensor, prompt: Conditioning, null: Conditioning | None) -> torch.Tensor:
        for solver, network in solvers:
            z = one_window(solver, network, z, prompt, null)
        return z

    return collect(
        base, student, prompts, seeds, solve,
        guided=any(solver.guidance_scale is not None for solver, _ in solvers),
        evaluations=sum(solver.evaluations for solver, _ in solvers),
        null=null, noise=noise, resolution=resolution, batch_size=batch_size, decode=decode,
    )  # fmt: skip
