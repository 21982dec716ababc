"""What is compared: the root teacher at several step counts and each finished stage's student, from the same noises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from reflow.data import sampler
from reflow.evaluation.runs import Student
from reflow.flow import ChordTable, Windows, WindowSolver
from reflow.models.conditioning import Conditioning, denoise
from reflow.models.family import Base
from reflow.sampling import sample, sample_teacher

EVALUATION = 5  # stream of the counter-based generator; reflow.data.sampler has 1 to 4
MORE_STEPS = (1, 2, 4)  # a stage's student takes 1 step a window; the last stage's also 2 and 4

# noise [B,C,h,w] and one row of conditioning each -> latents [B,C,h,w] at t=0, fp32
Draw = Callable[[torch.Tensor, Conditioning], torch.Tensor]


@dataclass(frozen=True)
class Method:
    """One row of the table. student is None for the teacher."""

    steps: int
    draw: Draw
    student: Student | None = None

    @property
    def label(self) -> str:
        return self.student.label if self.student else "teacher"


def noises(seed: int, indices: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise [B, *shape] fp32 on the CPU; sample i of a seed is the same in every batch."""
    rows = [sampler.generator(seed, 0, EVALUATION, i).standard_normal(tuple(shape), dtype="float32") for i in indices]
    return torch.stack([torch.from_numpy(row) for row in rows])


def teacher_method(base: Base, steps: int, guidance_scale: float = 1.0) -> Method:
    """The base's own DDIM, of a flow Euler: equal steps from index to index, also where their number does not divide 1000."""

    def draw(noise: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        seeds = range(len(noise))
        options = dict(noise=noise, guidance_scale=guidance_scale, decode=False)
        return sample_teacher(base, base.unet, conditioning, steps, seeds, **options).latents

    return Method(steps, draw)


def student_method(
    base: Base, student: Student, unet: torch.nn.Module, steps: int, guidance_scale: float = 1.0
) -> Method:
    """A stage's student with the scheduler that is exported with it."""

    def draw(noise: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        seeds = range(len(noise))
        reading = dict(prediction_type=student.prediction_type, network_time=student.network_time)
        options = dict(windows=student.windows, noise=noise, guidance_scale=guidance_scale, decode=False)
        return sample(base, unet, conditioning, steps, seeds, **reading, **options).latents

    return Method(steps, draw, student)


def student_steps(students: Sequence[Student]) -> list[tuple[int, int]]:
    """(position, steps) of each student row: one step a window, and for the last stage also two and four."""
    rows = []
    for position, student in enumerate(students):
        factors = MORE_STEPS if position == len(students) - 1 else MORE_STEPS[:1]
        rows += [(position, factor * len(student.windows)) for factor in factors]
    return rows


def fine_windows(windows: Windows, steps: int = 32) -> Windows:
    """Each window cut into equal pieces, at least `steps` pieces in all."""
    pieces = -(-steps // len(windows))
    edges = zip(windows.t_start, windows.t_end, strict=True)
    inner = (start + (end - start) * i / pieces for start, end in edges for i in range(pieces))
    return Windows((*inner, windows.boundaries[-1]))


@torch.no_grad()
def trajectory(
    base: Base,
    unet: torch.nn.Module,
    student: Student | None,
    fine: Windows,
    noise: torch.Tensor,
    conditioning: Conditioning,
    *,
    guidance_scale: float = 1.0,
) -> torch.Tensor:
    """Path [S+1,B,C,h,w] through the S pieces of `fine`, one step each.

    student None: the base's own DDIM, of a flow Euler. Else Euler steps of the student's own velocity. Guided above 1.
    """
    schedule, device = base.schedule(), next(unet.parameters()).device
    scale = guidance_scale if guidance_scale > 1 else None
    if student is None:
        solver = WindowSolver(
            schedule, fine, 1, prediction_type=base.prediction_type, guidance_scale=scale, device=device
        )
    else:
        table = ChordTable(schedule, student.windows, student.prediction_type, device=device)
        solver = WindowSolver.from_student(
            table, fine, 1, network_time_mode=student.network_time, guidance_scale=scale
        )
    if solver.guidance_scale is not None:
        conditioning = base.null_conditioning(1).expand(len(noise)).cat(conditioning).guiding(solver.guidance_scale)
    z = noise.to(device, torch.float32)
    path = [z]
    for k in range(len(fine)):
        z = solver.solve(lambda x, t: denoise(unet, x, t, conditioning), z, torch.full((len(z),), k, device=device))
        path.append(z)
    return torch.stack(path)
