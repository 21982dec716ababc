"""Phased consistency students (PCM, arXiv 2405.18407) on the exact bed, to stand beside chord students.

Time is cut into M phases over a grid of DDIM steps. The student at z_n and, without gradient, its target at the teacher's one step down from
there are both carried DDIM-fashion to their phase's end and compared by pseudo-Huber; a target point that is the phase's end counts as it is.
M = 1 is a consistency model that steps on the grid (LCM). Network, batch, optimizer and average are those of `students.train`; data are as many
as a student's pairs, and each step noises them anew. Time runs from t=1 (noise) to t=0 (data).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reflow.experiments.beds import scans, students
from reflow.experiments.beds.exact import Correction, ExactBed, Model, student
from reflow.experiments.beds.fitting import Weights, fit
from reflow.experiments.beds.mixture import CLASSES, NULL
from reflow.experiments.beds.students import Student
from reflow.experiments.beds.terms import follower
from reflow.experiments.store import Store, described
from reflow.flow import ChordTable, Windows, index

SOURCES = ("experiments/beds/consistency.py",)


@dataclass(frozen=True)
class Consistency:
    """phases M of a grid of so many DDIM steps, a multiple of M. target: who answers at the teacher's point, the trained "network" itself (PCM's
    code) or its "average". drop: share of labels dropped, for the teacher as well. huber_c: of every element (PCM: .001)."""

    phases: int
    steps: int
    grid: int = 32
    target: str = "network"
    seed: int = 0
    drop: float = 0.1
    batch: int = 128
    learning_rate: float = 2e-3
    width: int = 128
    huber_c: float = 0.001
    pairs: int = 8192
    scans: str = ""
    device: str = "cpu"

    def name(self) -> str:
        said = {**described(self), "scans": scans.digest(self.scans), "version": students.version(*SOURCES), "kind": "consistency"}
        return "pcm-" + hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def bed(self) -> ExactBed:
        return Student((), scans=self.scans, device=self.device).bed()

    def table(self) -> ChordTable:
        """One step a phase: the student's DDIM step from the phase's start to its end is that of an eps chord."""
        return self.bed().table(Windows.uniform(self.phases))

    def evaluations(self) -> int:
        """Network rows that the training costs: a teacher's step, the target, and three for the sample of a step."""
        return self.steps * self.batch * 5


class Grid:
    """Of steps n = 0 .. N-1 from noise to data: their index, (alpha, sigma) where they start and stop, and those of their phase's end."""

    def __init__(self, bed: ExactBed, grid: int, phases: int) -> None:
        if grid % phases:
            raise ValueError(f"{grid} steps make no {phases} equal phases.")
        times = 1.0 - torch.arange(grid + 1, dtype=torch.float64) / grid
        end = (torch.arange(grid) // (grid // phases) + 1) * (grid // phases)

        def of(t: Tensor) -> Tensor:
            return torch.stack(bed.schedule.alpha_sigma(t)).to(bed.device, bed.dtype)

        self.index = index(times).to(bed.device)
        self.start, self.stop, self.end = of(times[:-1]), of(times[1:]), of(times[end])
        self.last = (torch.arange(1, grid + 1) == end).to(bed.device)


def carried(z: Tensor, eps: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """DDIM's step of z [B, D] with noise eps from (alpha, sigma) `here` to `there`, [2, B] each: nothing moves where both are the same."""
    (a, s), (b, r) = here[..., None], there[..., None]
    return (b / a) * z + (r - b * s / a) * eps


def loss(bed: ExactBed, spec: Consistency, grid: Grid, network: Correction, average: list[Tensor], z: Tensor, n: Tensor, labels: Tensor) -> Tensor:
    """Mean pseudo-Huber over rows z [B, D] at the starts of steps n [B]."""
    model, parameters = student(bed, network), list(network.parameters())
    now, then = grid.index[n].to(z.dtype), grid.index[n + 1].to(z.dtype)
    with torch.no_grad():
        lower = carried(z, bed.teacher(z, now, labels), grid.start[:, n], grid.stop[:, n])
        rows = torch.arange(len(z), device=z.device)
        answer = follower(model, parameters, average, labels)(lower, then, rows) if spec.target == "average" else model(lower, then, labels)
        wanted = torch.where(grid.last[n][:, None], lower, carried(lower, answer, grid.stop[:, n], grid.end[:, n]))
    found = carried(z, model(z, now, labels), grid.start[:, n], grid.end[:, n])
    return (((found - wanted).square() + spec.huber_c**2).sqrt() - spec.huber_c).mean()


def train(cohort: Sequence[Consistency]) -> list[Weights]:
    """Weights of the averages of students that differ in their seed alone."""
    spec, seeds, bed = cohort[0], tuple(one.seed for one in cohort), cohort[0].bed()
    grid = Grid(bed, spec.grid, spec.phases)
    generators = [torch.Generator().manual_seed(7919 * seed + spec.phases) for seed in seeds]
    kept = [data_of(one) for one in cohort]
    network = Correction(bed.mixture.means.shape[1], spec.width, True, seeds).to(bed.device, bed.dtype)

    def asked(network: Correction, average: list[Tensor]) -> Tensor:
        parts = []
        for generator, (data, labels) in zip(generators, kept, strict=True):
            rows = torch.randint(len(data), (spec.batch,), generator=generator)
            n = torch.randint(spec.grid, (spec.batch,), generator=generator)
            noise = torch.randn((spec.batch, data.shape[1]), generator=generator)
            dropped = torch.rand(spec.batch, generator=generator) < spec.drop
            parts.append((data[rows], noise, n, torch.where(dropped, torch.full_like(rows, NULL), labels[rows])))
        data, noise, n, labels = (torch.cat(column).to(bed.device) for column in zip(*parts, strict=True))
        alpha, sigma = grid.start[:, n][..., None]
        return loss(bed, spec, grid, network, average, alpha * data + sigma * noise, n, labels)

    return fit(network, spec.steps, asked, learning_rate=spec.learning_rate)


def data_of(spec: Consistency) -> tuple[Tensor, Tensor]:
    """As many data [N, D] as a student has pairs, and their labels [N], on the CPU."""
    generator = torch.Generator().manual_seed(104729 * spec.seed + spec.phases)
    labels = torch.arange(min(spec.pairs, spec.steps * spec.batch)) % CLASSES
    return spec.bed().mixture.sample(labels, generator).cpu(), labels


def trained(spec: Consistency, store: Store, seeds: Sequence[int] = ()) -> Model:
    """The student, from the store or trained now together with those of the other seeds."""
    def at(seed: int) -> Consistency:
        return replace(spec, seed=seed)

    def make(missing: list[int]) -> list[Weights]:
        return train([at(one) for one in missing])

    kept = store.of_seeds(spec.seed, seeds, lambda one: at(one).name(), make, lambda one: json.dumps(described(at(one))))
    bed = spec.bed()
    correction = Correction(bed.mixture.means.shape[1], spec.width)
    correction.load_state_dict(kept)
    return student(bed, correction.to(bed.device, bed.dtype).requires_grad_(False))


@torch.no_grad()
def noised_again(spec: Consistency, model: Model, per_phase: int, noise: Tensor, labels: Tensor, *, seed: int = 0,
                 guidance: float | None = None) -> Tensor:  # fmt: skip
    """Samples [B, D] by consistency sampling of so many steps a phase: each goes to the phase's end, all but the last are noised anew.

    guidance: of every answer, in diffusers' convention.
    """
    bed = spec.bed()
    generator, z = torch.Generator().manual_seed(seed), noise
    edges = Windows.uniform(spec.phases)

    def of(t: float) -> Tensor:
        return torch.stack(bed.schedule.alpha_sigma(torch.full((len(z),), t, dtype=torch.float64))).to(z)

    for start, end in zip(edges.t_start, edges.t_end, strict=True):
        for i in range(per_phase):
            t = start + (end - start) * i / per_phase
            if i:  # from the phase's end up to t
                (a, s), (b, r) = of(end)[..., None], of(t)[..., None]
                fresh = torch.randn(z.shape, generator=generator).to(z)
                z = (b / a) * z + (r**2 - (b * s / a) ** 2).sqrt() * fresh
            when = torch.full((len(z),), float(index(t)), dtype=z.dtype, device=z.device)
            eps = model(z, when, labels)
            if guidance is not None:
                without = model(z, when, torch.full_like(labels, NULL))
                eps = without + guidance * (eps - without)
            z = carried(z, eps, of(t), of(end))
    return z
