"""Students of the exact bed as data: what is trained, under which name it is kept, and the training itself.

A student is a list of stages; each starts from the average of the one before. Loss, times, weights and starts are the recipe's own
[objective] keys, read by the trainer's own code. The same seed gives two students the same first weights, pairs and draws, so that a
difference between them is theirs. Time runs from t=1 (noise) to t=0 (data).
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reflow
import reflow_kernels
from reflow.experiments.beds.exact import Correction, ExactBed, Model, student
from reflow.experiments.beds.mixture import CLASSES, NULL
from reflow.experiments.store import Store
from reflow.flow import ChordTable, Windows, WindowSolver, network_time
from reflow.recipes.sections import Objective
from reflow.training import targets

TEACHER_STEPS = 32  # of the whole of time: a stage of K windows solves each in 32 / K
# What the sources of a student say; a change in one of them makes all students anew.
SOURCES = ("flow", "training/targets.py", "experiments/beds/mixture.py", "experiments/beds/exact.py", "experiments/beds/students.py")


@dataclass(frozen=True)
class Stage:
    """windows: their number, or their edges from 1 to 0. steps: of the optimizer. solver_steps 0: 32 / windows. teacher "previous": the
    stage before solves, one Euler step in each of its windows. objective: (key, value) pairs of [objective] beyond `BASE`. active: numbers of
    the windows that are trained, all where none is given."""

    windows: int | tuple[float, ...]
    steps: int
    objective: tuple[tuple[str, Any], ...] = ()
    teacher: str = "root"
    solver_steps: int = 0
    active: tuple[int, ...] = ()

    @property
    def edges(self) -> Windows:
        return Windows.uniform(self.windows) if isinstance(self.windows, int) else Windows(self.windows)

    def settings(self) -> Objective:
        return Objective(**{**BASE, **dict(self.objective)})


# As the digits recipes, but with the plain error: what a stage says differs from this.
BASE = {"loss": "mse", "time_density": "window_start", "time_share": 0.8, "time_upper": 0.5}


@dataclass(frozen=True)
class Student:
    """guidance: of the teacher's solves (1: none). drop: share of rows whose label is dropped, for the teacher as well while that is not
    guided (CFG-sync), for the student alone where it is (CFG-fixed). sees_output: the correction is given the exact output besides z.
    pairs: solved windows a stage, stored and drawn from."""

    stages: tuple[Stage, ...]
    seed: int = 0
    zero_snr: bool = False
    prediction_type: str = ""
    guidance: float = 1.0
    drop: float = 0.0
    batch: int = 128
    learning_rate: float = 2e-3
    width: int = 128
    sees_output: bool = True
    pairs: int = 32768

    def bed(self) -> ExactBed:
        return _bed(self.zero_snr)

    def resolved(self) -> dict[str, Any]:
        """Every setting, ready for JSON: what the student's name is the hash of."""
        stages = [{**asdict(s), "objective": s.settings().model_dump(), "solver_steps": solver_steps(s)} for s in self.stages]
        return {**asdict(self), "stages": stages, "version": version()}

    def name(self) -> str:
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()[:16]

    def table(self) -> ChordTable:
        """Of the last stage's windows."""
        return self.bed().table(self.stages[-1].edges, self.prediction_type)

    def before(self) -> Student:
        """The student without its last stage."""
        return replace(self, stages=self.stages[:-1])

    def evaluations(self) -> int:
        """Network rows that the training costs: the pairs' solves, and three for each sample of a step (forward and backward)."""
        guided = 1 if self.guidance == 1.0 else 2
        solves = sum(min(self.pairs, s.steps * self.batch) * solver_steps(s) * (guided if s.teacher == "root" else 1) for s in self.stages)
        return solves + 3 * self.batch * sum(s.steps for s in self.stages)


@lru_cache(maxsize=4)
def _bed(zero_snr: bool) -> ExactBed:
    return ExactBed(zero_snr=zero_snr)


def solver_steps(stage: Stage) -> int:
    if stage.solver_steps:
        return stage.solver_steps
    if stage.teacher == "previous":
        return 2
    return max(1, TEACHER_STEPS // len(stage.edges))


@lru_cache(maxsize=4)
def version(*more: str) -> str:
    """Hash of the sources that decide what a student becomes, and of `more` of them, named from the package."""
    root, kernels = Path(reflow.__file__).parent, Path(reflow_kernels.__file__).parent
    files = [kernels / "reference.py"]
    for name in (*SOURCES, *more):
        path = root / name
        files += sorted(path.glob("*.py")) if path.is_dir() else [path]
    return hashlib.sha256("\n".join(_code(file) for file in files).encode()).hexdigest()[:12]


def _code(file: Path) -> str:
    """A source without comments, layout and docstrings, which change nothing."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def trained(spec: Student, store: Store, seeds: Sequence[int] = ()) -> Model:
    """The student, from the store or trained now, stage by stage; `seeds` that are not there yet are trained with it, at little more cost."""
    return student(spec.bed(), correction_of(spec, store, seeds))


def correction_of(spec: Student, store: Store, seeds: Sequence[int] = ()) -> Correction:
    """The trained part of the student."""
    bed = spec.bed()
    correction = Correction(bed.mixture.means.shape[1], spec.width, spec.sees_output)
    correction.load_state_dict(weights(spec, store, seeds))
    return correction.to(bed.device, bed.dtype).requires_grad_(False)


def weights(spec: Student, store: Store, seeds: Sequence[int] = ()) -> dict[str, Tensor]:
    """The student's weights from the store, where they are put now if they are not there, and those of the other seeds with them."""
    if not store.has(spec.name()):
        fellows = [replace(spec, seed=seed) for seed in sorted({spec.seed, *seeds})]
        missing = [fellow for fellow in fellows if not store.has(fellow.name())]
        for fellow, made in zip(missing, train(missing, store), strict=True):
            store.keep(fellow.name(), made, json.dumps(fellow.resolved()))
    return store.tensors(spec.name(), dict)


def train(cohort: Sequence[Student], store: Store) -> list[dict[str, Tensor]]:
    """Weights of the averages after the last stage of students that differ in their seed alone; earlier stages come from the store.

    Each has the first weights, pairs and draws of its own seed and its own clipping, so that it is what it would be alone, to rounding."""
    spec, seeds = cohort[0], tuple(one.seed for one in cohort)
    bed, stage, device = spec.bed(), spec.stages[-1], spec.bed().device
    network = Correction(bed.mixture.means.shape[1], spec.width, spec.sees_output, seeds).to(device, bed.dtype)
    if len(spec.stages) > 1:
        before = [weights(one.before(), store, seeds) for one in cohort]
        network.load_state_dict({key: torch.cat([one[key] for one in before]) for key in before[0]})
    settings, table = stage.settings(), spec.table()
    pools = [pool(_pool_key(one), store) for one in cohort]
    parameters = list(network.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=spec.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    model = student(bed, network)
    generators = [torch.Generator().manual_seed(7919 * seed + len(spec.stages)) for seed in seeds]
    warmup = min(20, stage.steps // 10)
    for step in range(stage.steps):
        rows = [torch.randint(len(p[3]), (spec.batch,), generator=g) for p, g in zip(pools, generators, strict=True)]
        draws = torch.cat([torch.rand((spec.batch, 1, 2), generator=g) for g in generators]).to(device, bed.dtype)
        z_start, z_end, window, labels = (torch.cat([p[i][r.to(device)] for p, r in zip(pools, rows, strict=True)]) for i in range(4))
        at = targets.points(z_start, z_end, window, draws, table, settings)
        loss = targets.loss(model(at.model_input, network_time(at.t), labels), at, table, settings).loss * len(cohort)
        gradients = torch.autograd.grad(loss, parameters)
        size = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        kept = (1.0 / size.clamp(min=1e-12)).clamp(max=1.0).view(-1, 1, 1)  # the gradient of each seed is at most 1 long
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * kept
        for group in optimizer.param_groups:
            group["lr"] = spec.learning_rate * rate(step, stage.steps, warmup)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1.0 - min(0.99, (1 + step) / (10 + step)))
    names = [name for name, _ in network.named_parameters()]
    return [{name: value[i : i + 1].cpu() for name, value in zip(names, average, strict=True)} for i in range(len(cohort))]


def rate(step: int, steps: int, warmup: int) -> float:
    """Warm-up, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _pool_key(spec: Student) -> Student:
    """The student with all that its pairs do not depend on left out, so that equal pairs are solved once."""
    stage = spec.stages[-1]
    starts = tuple((key, getattr(stage.settings(), key)) for key in ("starts", "starts_share"))
    bare = replace(stage, steps=min(stage.steps, -(-spec.pairs // spec.batch)), objective=starts)
    earlier = spec.stages[:-1] if stage.teacher == "previous" else ()
    return replace(
        spec, stages=(*earlier, bare), **({} if earlier else {"learning_rate": 1.0, "width": 1, "sees_output": True, "prediction_type": ""})
    )


@lru_cache(maxsize=24)
def pool(spec: Student, store: Store) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solved windows of the last stage: z_start, z_end [N, D], window [N], the student's labels [N].

    From data every window starts at a noised sample of its own; from noise the N rows are the K windows of N / K trajectories."""
    bed, stage, settings = spec.bed(), spec.stages[-1], spec.stages[-1].settings()
    windows, count = stage.edges, min(spec.pairs, stage.steps * spec.batch)
    generator = torch.Generator().manual_seed(104729 * spec.seed + len(windows))
    guidance = None if spec.guidance == 1.0 else spec.guidance
    if stage.teacher == "previous":
        before = spec.before()
        model, solver = trained(before, store), WindowSolver.from_student(before.table(), windows, solver_steps(stage))
    else:
        model, solver = bed.teacher, bed.solver(windows, solver_steps(stage), guidance=guidance)
    if settings.starts == "noise":
        count = count // len(stage.active or windows.t_start)
    labels = torch.arange(count) % CLASSES
    labels = labels[torch.randperm(count, generator=generator)]
    data = bed.mixture.sample(labels, generator)
    noise = torch.randn(data.shape, generator=generator, dtype=torch.float32).to(data)
    dropped = torch.rand(count, generator=generator) < spec.drop
    seen = torch.where(dropped, torch.full_like(labels, NULL), labels).to(bed.device)
    asked = seen if guidance is None else labels.to(bed.device)
    parts, active = [], torch.tensor(stage.active or range(len(windows)))
    for rows in torch.arange(count).split(1024):
        if settings.starts == "noise":
            states = bed.path(model, solver, noise[rows], asked[rows])
            parts += [(states[k], states[k + 1], torch.full((len(rows),), k), seen[rows]) for k in active.tolist()]
            continue
        window = active[rows % len(active)].to(bed.device)
        begin = bed.table(windows).start(data[rows], noise[rows], window)
        both = asked[rows] if solver.guidance_scale is None else torch.cat([torch.full_like(asked[rows], NULL), asked[rows]])
        parts.append((begin, solver.solve(lambda z, t, both=both: model(z, t, both), begin, window), window, seen[rows]))
    z_start, z_end, window, seen = (torch.cat(column) for column in zip(*parts, strict=True))
    return z_start, z_end, window, seen
