"""From a solved window to what the student sees and is compared with, as the recipe's [objective] says."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reflow.flow import ChordTable, objective, snap
from reflow.recipes.sections import Objective
from reflow_kernels import AlignedVLoss, window_chord


@dataclass
class Points:
    """R student samples: z_t, velocity, z_end [R,C,h,w] fp32, model_input [R,C,h,w], window and t [R]."""

    z_t: torch.Tensor
    velocity: torch.Tensor
    z_end: torch.Tensor
    model_input: torch.Tensor
    window: torch.Tensor
    t: torch.Tensor


def times(draws: torch.Tensor, window: torch.Tensor, table: ChordTable, settings: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """(t, tau) of shape [...] from uniforms draws [..., 2] and windows [...]: the recipe's density, on its time grid."""
    tau = objective.sample_tau(draws, settings.time_density, share=settings.time_share, upper=settings.time_upper,
                               sharpness=settings.time_sharpness)
    at = table.rows(window)
    t = at.time(tau)
    if settings.time_grid:
        t = snap(t, settings.time_grid, at.t_start, at.t_end)
        tau = at.tau(t).clamp(0.0, 1.0)
    return t, tau


def points(z_start: torch.Tensor, z_end: torch.Tensor, window: torch.Tensor, draws: torch.Tensor, table: ChordTable,
           settings: Objective, *, input_dtype: torch.dtype | None = None) -> Points:
    """M points on each of B solved windows, chord-major (row m*B + b). draws: [B, M, 2] uniforms."""
    chords, batch = draws.shape[1], len(z_start)
    windows = window.repeat(chords) if chords > 1 else window
    t, tau = times(draws.transpose(0, 1).reshape(-1, 2), windows, table, settings)
    if chords == 1:
        z_t, velocity, model_input = window_chord(z_start, z_end, tau, table.dt[window], input_dtype=input_dtype)
    else:
        z_t, velocity, model_input = window_chord(z_start, z_end, tau.view(chords, batch), table.dt[window], input_dtype=input_dtype)
        z_t, model_input = z_t.flatten(0, 1), model_input.flatten(0, 1)
        velocity, z_end = (x.repeat(chords, *[1] * (x.dim() - 1)) for x in (velocity, z_end))
    if settings.points == "schedule":
        starts = z_start.repeat(chords, *[1] * (z_start.dim() - 1))
        z_t = objective.schedule_point(table, starts, z_end, windows, t)
        model_input = z_t if input_dtype is None else z_t.to(input_dtype)
    return Points(z_t, velocity, z_end, model_input, windows, t)


def loss(output: torch.Tensor, at: Points, table: ChordTable, settings: Objective, *, weight: torch.Tensor | None = None) -> AlignedVLoss:
    """The recipe's loss of the student's output [R,C,h,w] at the points; `weight` [R] is 0 for a sample that must not count."""
    for factor in (objective.time_weight(settings.time_weight, table, at.window, at.t), objective.window_weight(settings.window_weight, table, at.window)):
        if factor is not None:
            weight = factor if weight is None else weight * factor
    common = dict(kind=settings.loss, weight=weight, huber_c=settings.huber_c, huber_norm=settings.huber_norm, normalize=settings.normalize)
    if settings.points == "schedule":
        return objective.schedule_loss(output, at.z_end, at.z_t, table, at.window, at.t, **common)
    return objective.chord_loss(output, at.velocity, at.z_t, table, at.window, at.t, space=settings.space, direction_weight=settings.direction_weight,
                                direction_scale="speed" if settings.direction_norm == "window_speed" else "none", **common)
