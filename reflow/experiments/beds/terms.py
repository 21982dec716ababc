"""What a training step on the exact bed asks besides the loss of its chords: the average's own end of a chord that merges, and the teacher's
velocity where no window is trained. Time runs from t=1 (noise) to t=0 (data)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from reflow.experiments.beds.exact import Correction, ExactBed, Model
from reflow.experiments.beds.mixture import CLASSES
from reflow.flow import ChordTable, Windows, network_time


def follower(model: Model, parameters: list[nn.Parameter], average: list[Tensor], labels: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The average of the students that are trained, as `Merger.finish` asks it: for some rows [R] of the batch. It answers for all rows of
    the batch, labels [B], since each network has its own."""

    def call(z: Tensor, timestep: Tensor, rows: Tensor) -> Tensor:
        everywhere, times = z.new_zeros((len(labels), z.shape[1])), timestep.new_zeros(len(labels))
        everywhere[rows], times[rows] = z, timestep
        own = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            torch._foreach_copy_([p.detach() for p in parameters], average)
            found = model(everywhere, times, labels)[rows]
            torch._foreach_copy_([p.detach() for p in parameters], own)
        return found

    return call


def rest_of(bed: ExactBed, windows: Windows, active: Sequence[int], steps: int) -> list[ChordTable]:
    """Of each window that is not trained, the teacher's steps of 1 / `steps` in it as windows of their own."""
    left = [k for k in range(len(windows)) if k not in active]
    ends = [(windows.t_start[k], windows.t_end[k]) for k in left]
    return [bed.table(Windows.uniform(max(1, round(steps * (a - b))), a, b)) for a, b in ends]


def kept_to_teacher(bed: ExactBed, network: Correction, rest: Sequence[ChordTable], rows: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Mean squared error against the teacher's own velocity at noised data of the windows that are not trained, at the starts of the
    teacher's steps, with so many rows for each of the networks, whose draws their generators make."""
    labels, of, parts = torch.arange(rows) % CLASSES, torch.arange(rows) % len(rest), []
    for generator in generators:
        data = bed.mixture.sample(labels, generator)
        noise = torch.randn(data.shape, generator=generator).to(data)
        place = torch.rand(rows, generator=generator)
        for i, table in enumerate(rest):
            here = (of == i).nonzero()[:, 0]
            step, on = (place[here] * len(table)).long().to(bed.device), here.to(bed.device)
            start = table.t_start[step]
            parts.append((table.start(data[on], noise[on], step), start, labels[here].to(bed.device), table.velocity_coefficients(step, start)[1]))
    z, t, asked, size = (torch.cat(column) for column in zip(*parts, strict=True))
    with torch.no_grad():
        exact = bed.teacher(z, network_time(t), asked)
    return (size[:, None] * network(z, exact, network_time(t), asked)).square().mean()
