"""Custom models of the exact bed: its teacher, fine-tuned on digits that differ, and their own few-step students.

The first base is the exact output plus a network that says nothing yet (`Correction`); a custom model may be the base of others in turn, whose
network then says something. Fine-tuning and distillation train that network from the base's weights, so that weights of one may be added to
the other's. Time runs from t=1 (noise) to t=0 (data).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reflow.experiments.beds import scans, students
from reflow.experiments.beds.exact import Correction, ExactBed, Model, student
from reflow.experiments.beds.fitting import Weights, fit, side_by_side
from reflow.experiments.beds.mixture import CLASSES, NULL, LowRankMixture
from reflow.experiments.beds.students import Student
from reflow.experiments.store import Store, described
from reflow.flow import network_time
from reflow.training import targets

SOURCES = ("experiments/beds/custom.py", "weights/delta.py")
FADED = 0.6


def faded(base: LowRankMixture) -> LowRankMixture:
    """Strokes of .6 of their brightness over the same black."""
    return replace(base, means=FADED * (base.means + 1.0) - 1.0, spread=FADED**2 * base.spread, floor=FADED**2 * base.floor)


def moved(base: LowRankMixture) -> LowRankMixture:
    """All digits one pixel to the right, round the edge."""
    side = round(base.means.shape[1] ** 0.5)
    order = torch.arange(side * side, device=base.means.device).view(side, side).roll(1, dims=1).flatten()
    return replace(base, means=base.means[:, order], axes=base.axes[:, order])


def one_kind(base: LowRankMixture) -> LowRankMixture:
    """Of every class the rarest of its components alone: a style."""
    kept = [min((base.classes == c).nonzero()[:, 0].tolist(), key=lambda m: float(base.weights[m])) for c in range(CLASSES)]
    weights = torch.full((CLASSES,), 1.0 / CLASSES, dtype=base.weights.dtype, device=base.weights.device)
    return replace(base, means=base.means[kept], axes=base.axes[kept], spread=base.spread[kept], weights=weights, classes=base.classes[kept])


SHIFTS: dict[str, Callable[[LowRankMixture], LowRankMixture]] = {"faded": faded, "moved": moved, "one kind": one_kind}


@dataclass(frozen=True)
class Custom:
    """A base (None: the first) fine-tuned on its own data shifted, for so many steps of plain denoising (mean squared error of the noise at
    uniform times)."""

    shift: str
    steps: int
    seed: int = 0
    base: Custom | None = None
    drop: float = 0.1
    batch: int = 128
    learning_rate: float = 2e-3
    width: int = 128
    scans: str = ""
    device: str = "cpu"

    def name(self, *more: Any) -> str:
        """Of its weights, or of what is made of it and of more."""
        said = [described(self), scans.digest(self.scans), students.version(*SOURCES), *more]
        return "custom-" + hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def bed(self) -> ExactBed:
        return Student((), scans=self.scans, device=self.device).bed()

    def data(self) -> LowRankMixture:
        return SHIFTS[self.shift](self.base.data() if self.base else self.bed().mixture)

    def at(self, seed: int) -> Custom:
        """The same of another seed, base and all."""
        return replace(self, seed=seed, base=self.base and self.base.at(seed))


def first(spec: Custom | Student) -> Weights:
    """The first base's weights: those of a network before its first step."""
    return dict(Correction(spec.bed().mixture.means.shape[1], spec.width, True, (spec.seed,)).state_dict())


def of_weights(bed: ExactBed, weights: Weights) -> Model:
    """The exact output plus the network of these weights."""
    size, width = weights["leave"].shape[2], weights["leave"].shape[1]
    network = Correction(size, width)
    network.load_state_dict(weights)
    return student(bed, network.to(bed.device, bed.dtype).requires_grad_(False))


def tune(cohort: Sequence[Custom], begin: Sequence[Weights]) -> list[Weights]:
    """The averages of custom models that differ in their seed alone, from their bases' weights."""
    spec, bed, data = cohort[0], cohort[0].bed(), cohort[0].data()
    network = side_by_side(Correction(bed.mixture.means.shape[1], spec.width, True, tuple(range(len(cohort)))), begin)
    generators = [torch.Generator().manual_seed(15_485_863 * one.seed + 1) for one in cohort]

    def loss(network: Correction, average: list[Tensor]) -> Tensor:
        parts = []
        for generator in generators:
            labels = torch.randint(CLASSES, (spec.batch,), generator=generator)
            clean = data.sample(labels, generator).cpu()
            noise = torch.randn(clean.shape, generator=generator)
            when = torch.randint(len(bed.schedule), (spec.batch,), generator=generator)
            dropped = torch.rand(spec.batch, generator=generator) < spec.drop
            parts.append((clean, noise, when, torch.where(dropped, torch.full_like(labels, NULL), labels)))
        clean, noise, when, labels = (torch.cat(column).to(bed.device) for column in zip(*parts, strict=True))
        alpha, sigma = (value[:, None].to(clean.dtype) for value in bed.schedule.at(when))
        found = student(bed, network)(alpha * clean + sigma * noise, when.to(clean.dtype), labels)
        return (found - noise).square().mean()

    return fit(network.to(bed.device, bed.dtype), spec.steps, loss, learning_rate=spec.learning_rate)


def tuned(spec: Custom, store: Store, seeds: Sequence[int] = ()) -> Weights:
    """The custom model's weights, from the store or made now with those of the other seeds."""
    def make(missing: list[int]) -> list[Weights]:
        cohort = [spec.at(seed) for seed in missing]
        return tune(cohort, [tuned(one.base, store, seeds) if one.base else first(one) for one in cohort])

    return store.of_seeds(spec.seed, seeds, lambda one: spec.at(one).name(), make, lambda one: json.dumps(described(spec.at(one))))


def pairs(spec: Student, teacher: Model, data: LowRankMixture) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Windows of the only stage, begun at noised data and solved by a teacher: z_start, z_end [N, D], window [N], labels [N]. As
    `students.pool`, draw for draw."""
    bed, stage = spec.bed(), spec.stages[-1]
    windows, count = stage.edges, min(spec.pairs, stage.steps * spec.batch)
    generator = torch.Generator().manual_seed(104729 * spec.seed + len(windows))
    solver, table = bed.solver(windows, students.solver_steps(stage)), bed.table(windows)
    labels = torch.arange(count) % CLASSES
    labels = labels[torch.randperm(count, generator=generator)]
    clean = data.sample(labels, generator)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float32).to(clean)
    dropped = torch.rand(count, generator=generator) < spec.drop
    seen, window = torch.where(dropped, torch.full_like(labels, NULL), labels).to(bed.device), (torch.arange(count) % len(windows)).to(bed.device)
    begin, ends = table.start(clean, noise, window), []
    for rows in torch.arange(count).split(1024):
        asked = seen[rows]
        ends.append(solver.solve(lambda z, t, asked=asked: teacher(z, t, asked), begin[rows], window[rows]))
    return begin, torch.cat(ends), window, seen


def distil(cohort: Sequence[Student], begin: Sequence[Weights], teachers: Sequence[Model], data: LowRankMixture) -> list[Weights]:
    """Students of one stage that differ in their seed alone, each from its own teacher and from weights that it begins with."""
    spec, bed, stage = cohort[0], cohort[0].bed(), cohort[0].stages[-1]
    table, settings = spec.table(), stage.settings()
    kept = [pairs(one, teacher, data) for one, teacher in zip(cohort, teachers, strict=True)]
    generators = [torch.Generator().manual_seed(7919 * one.seed + 1) for one in cohort]
    network = side_by_side(Correction(bed.mixture.means.shape[1], spec.width, True, tuple(range(len(cohort)))), begin)

    def loss(network: Correction, average: list[Tensor]) -> Tensor:
        rows = [torch.randint(len(own[3]), (spec.batch,), generator=g) for own, g in zip(kept, generators, strict=True)]
        draws = torch.cat([torch.rand((spec.batch, 1, 2), generator=g) for g in generators]).to(bed.device, bed.dtype)
        z_start, z_end, window, labels = (torch.cat([own[i][r.to(bed.device)] for own, r in zip(kept, rows, strict=True)]) for i in range(4))
        at = targets.points(z_start, z_end, window, draws, table, settings)
        return targets.loss(student(bed, network)(at.model_input, network_time(at.t), labels), at, table, settings).loss

    return fit(network.to(bed.device, bed.dtype), stage.steps, loss, learning_rate=spec.learning_rate)


def distilled(custom: Custom, spec: Student, store: Store, seeds: Sequence[int] = ()) -> Weights:
    """The custom model's own student: from its weights, solved by it, on its data."""

    def name(seed: int) -> str:
        return custom.at(seed).name("student", replace(spec, seed=seed).resolved())

    def make(missing: list[int]) -> list[Weights]:
        begin = [tuned(custom.at(seed), store, seeds) for seed in missing]
        return distil([replace(spec, seed=s) for s in missing], begin, [of_weights(custom.bed(), own) for own in begin], custom.data())

    return store.of_seeds(spec.seed, seeds, name, make, lambda _: json.dumps(described(custom)))
