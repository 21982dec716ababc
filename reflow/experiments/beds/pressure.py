"""Where in a window a student's gradient comes from, and whether the places pull one way.

At a minimum of the loss over a window the mean gradient is zero. If the student could be right everywhere, each place's gradient would be
small on its own; where it cannot, places pull against each other, and the start, the only place a K-step sampler asks about, gives way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reflow.experiments.beds.exact import Correction, ExactBed, student
from reflow.experiments.beds.measure import Chords
from reflow.flow import ChordTable, chord_loss, network_time
from reflow_kernels import window_chord


def gradient(bed: ExactBed, correction: Correction, table: ChordTable, at: Chords, tau: Tensor) -> Tensor:
    """Gradient of the mean velocity error over the chords at places tau [N], as one vector."""
    network = correction.requires_grad_(True)
    t = table.time(at.window, tau)
    z, velocity, _ = window_chord(at.z_start, at.z_end, table.tau(at.window, t), table.dt[at.window])
    output = student(bed, network)(z, network_time(t), at.labels)
    loss = chord_loss(output, velocity, z, table, at.window, t, kind="mse").loss
    grads = torch.autograd.grad(loss, list(network.parameters()))
    network.requires_grad_(False)
    return torch.cat([g.flatten() for g in grads]).double()


def of_student(bed: ExactBed, correction: Correction, table: ChordTable, at: Chords) -> dict[str, Any]:
    """ratio: length of the gradient of the windows' second halves over that of their starts. cosine: of the two, below 0 where what
    mends one spoils the other."""
    start = gradient(bed, correction, table, at, torch.zeros(len(at.window), device=table.device))
    places = torch.linspace(0.5, 1.0, 401)[torch.arange(len(at.window)) % 400]
    late = gradient(bed, correction, table, at, places.to(table.device))
    return {"ratio": float(late.norm() / start.norm()), "cosine": float(torch.nn.functional.cosine_similarity(start, late, dim=0))}
