"""Students of the exact bed as data: what is trained, under which name it is kept, and the training itself.

A student is a list of stages; each starts from the average of the one before. Loss, times, weights and starts are the recipe's own
[objective] keys, read by the trainer's own code. The same seed gives two students the same first weights, pairs and draws, so that a
difference between them is theirs. Time runs from t=1 (noise) to t=0 (data).
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import reflow
import reflow_kernels
from reflow.experiments.beds import scans
from reflow.experiments.beds.exact import Correction, ExactBed, Model, student
from reflow.experiments.beds.fitting import fit, side_by_side
from reflow.experiments.beds.mixture import CLASSES, NULL
from reflow.experiments.beds.terms import follower, kept_to_teacher, rest_of
from reflow.experiments.store import Store, described
from reflow.flow import ChordTable, Merger, Windows, WindowSolver, network_time
from reflow.flow.merging import ends, levels
from reflow.recipes.sections import Objective
from reflow.training import targets
from reflow.training.draws import DATA, FORWARD, NOISE, kinds, on_paths

TEACHER_STEPS = 32  # of the whole of time: a stage of K windows solves each in 32 / K
# What the sources of a student say; a change in one of them makes all students anew.
BEDS = tuple(f"experiments/beds/{name}.py" for name in ("mixture", "scans", "exact", "students", "terms", "fitting"))
SOURCES = ("flow", "training/targets.py", "training/draws.py", *BEDS)


@dataclass(frozen=True)
class Stage:
    """windows: their number, or their edges from 1 to 0. steps: of the optimizer. solver_steps 0: 32 / windows. teacher "previous": the
    stage before solves, one Euler step in each of its windows. objective: (key, value) pairs of [objective] beyond `BASE`. active: numbers of
    the windows that are trained, all where none is given. rest "teacher": where none is trained, the student is held to the teacher's own
    velocity, with as many rows again. merges, self_share: windows are cut into 2^merges parts and merge while they are learnt
    (`reflow.flow.merging`)."""

    windows: int | tuple[float, ...]
    steps: int
    objective: tuple[tuple[str, Any], ...] = ()
    teacher: str = "root"
    solver_steps: int = 0
    active: tuple[int, ...] = ()
    rest: str = ""
    merges: int = 0
    self_share: float = 0.5

    @property
    def edges(self) -> Windows:
        return Windows.uniform(self.windows) if isinstance(self.windows, int) else Windows(self.windows)

    @property
    def parts(self) -> Windows:
        """What the teacher solves: the windows, or the parts that merge into them."""
        cuts, edges = 1 << self.merges, self.edges.boundaries
        inner = [a + (b - a) * i / cuts for a, b in pairwise(edges) for i in range(cuts)]
        return Windows((*inner, edges[-1]))

    def settings(self) -> Objective:
        return Objective(**{**BASE, **dict(self.objective)})


# As the digits recipes, but with the plain error: what a stage says differs from this.
BASE = {"loss": "mse", "time_density": "window_start", "time_share": 0.8, "time_upper": 0.5}


@dataclass(frozen=True)
class Student:
    """guidance: of the teacher's solves (1: none). drop: share of rows whose label is dropped, for the teacher as well while that is not
    guided (CFG-sync), for the student alone where it is (CFG-fixed). sees_output: the correction is given the exact output besides z.
    pairs: solved windows a stage, stored and drawn from. scans: of the bed, a file or folder of them; "" the bundled ones. device: the bed's."""

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
    scans: str = ""
    device: str = "cpu"

    def bed(self) -> ExactBed:
        return _bed(self.zero_snr, self.scans, self.device)

    def resolved(self) -> dict[str, Any]:
        """Every setting, ready for JSON: what the student's name is the hash of. The scans count by what they are, not by where they lie; the device
        by its type, where it is not the CPU."""
        stages = [{**asdict(s), "objective": s.settings().model_dump(), "solver_steps": solver_steps(s)} for s in self.stages]
        return {**described(self), "stages": stages, "scans": scans.digest(self.scans), "version": version()}

    def name(self) -> str:
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()[:16]

    def reading(self) -> str:
        """How the output is read in a window."""
        return self.prediction_type or self.bed().student_type

    def table(self) -> ChordTable:
        """Of the last stage's windows."""
        return self.bed().table(self.stages[-1].edges, self.reading())

    def before(self) -> Student:
        """The student without its last stage."""
        return replace(self, stages=self.stages[:-1])

    def evaluations(self) -> int:
        """Network rows that the training costs: the pairs' solves, three for each sample of a step (forward and backward), and what else a
        step asks of the network."""
        guided = 1 if self.guidance == 1.0 else 2
        solves = sum(min(self.pairs, s.steps * self.batch) * solver_steps(s) * (guided if s.teacher == "root" else 1) for s in self.stages)
        rows = sum(s.steps * (3.0 + (4.0 if s.rest else 0.0) + sum(levels(1 << s.merges, s.merges)) / (1 << s.merges)) for s in self.stages)
        return solves + round(self.batch * rows)


@lru_cache(maxsize=4)
def _bed(zero_snr: bool, scans: str, device: str) -> ExactBed:
    return ExactBed(zero_snr=zero_snr, scans=scans, device=device)


def on(bed: ExactBed, spec: Student) -> Student:
    """The student on the bed that an experiment was asked for."""
    return replace(spec, scans=bed.scans, device=bed.device)


def solver_steps(stage: Stage) -> int:
    if stage.solver_steps:
        return stage.solver_steps
    if stage.teacher == "previous":
        return 2
    return max(1, TEACHER_STEPS // len(stage.parts))


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
    def at(seed: int) -> Student:
        return replace(spec, seed=seed)

    def make(missing: list[int]) -> list[dict[str, Tensor]]:
        return train([at(one) for one in missing], store)

    return store.of_seeds(spec.seed, seeds, lambda one: at(one).name(), make, lambda one: json.dumps(at(one).resolved()))


def train(cohort: Sequence[Student], store: Store) -> list[dict[str, Tensor]]:
    """Weights of the averages after the last stage of students that differ in their seed alone; earlier stages come from the store.

    Each has the first weights, pairs and draws of its own seed and its own clipping, so that it is what it would be alone, to rounding."""
    spec, seeds = cohort[0], tuple(one.seed for one in cohort)
    bed, stage, device = spec.bed(), spec.stages[-1], spec.bed().device
    network = Correction(bed.mixture.means.shape[1], spec.width, spec.sees_output, seeds).to(device, bed.dtype)
    if len(spec.stages) > 1:
        side_by_side(network, [weights(one.before(), store, seeds) for one in cohort])
    settings, parts = stage.settings(), stage.parts
    table = ChordTable(bed.schedule, parts, spec.reading(), ends=ends(parts, stage.merges), device=device, dtype=bed.dtype)
    merger = Merger(table, stage.merges, share=stage.self_share) if stage.merges else None
    rest = rest_of(bed, parts, stage.active, TEACHER_STEPS) if stage.rest else []
    pools = [pool(_pool_key(one), store) for one in cohort]
    model = student(bed, network)
    generators = [torch.Generator().manual_seed(7919 * seed + len(spec.stages)) for seed in seeds]

    def loss(network: Correction, average: list[Tensor]) -> Tensor:
        rows = [torch.randint(len(p[3]), (spec.batch,), generator=g) for p, g in zip(pools, generators, strict=True)]
        draws = torch.cat([torch.rand((spec.batch, 1, 2), generator=g) for g in generators]).to(device, bed.dtype)
        z_start, z_end, window, labels = (torch.cat([p[i][r.to(device)] for p, r in zip(pools, rows, strict=True)]) for i in range(4))
        weight = None
        if merger is not None:
            z_end = merger.finish(follower(model, list(network.parameters()), average, labels), z_end, window.cpu())
            weight = merger.weight[window]
        at = targets.points(z_start, z_end, window, draws, table, settings)
        found = targets.loss(model(at.model_input, network_time(at.t), labels), at, table, settings, weight=weight).loss
        return found + kept_to_teacher(bed, network, rest, spec.batch, generators) if rest else found

    return fit(network, stage.steps, loss, learning_rate=spec.learning_rate)


def _pool_key(spec: Student) -> Student:
    """The student with all that its pairs do not depend on left out, so that equal pairs are solved once."""
    stage = spec.stages[-1]
    starts = tuple((key, getattr(stage.settings(), key)) for key in ("starts", "starts_share", "forward_share"))
    bare = replace(stage, windows=stage.parts.boundaries, steps=min(stage.steps, -(-spec.pairs // spec.batch)), objective=starts, rest="", merges=0)
    earlier = spec.stages[:-1] if stage.teacher == "previous" else ()
    return replace(
        spec, stages=(*earlier, bare), **({} if earlier else {"learning_rate": 1.0, "width": 1, "sees_output": True, "prediction_type": ""})
    )


@lru_cache(maxsize=24)
def pool(spec: Student, store: Store) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solved windows of the last stage: z_start, z_end [N, D], window [N], the student's labels [N].

    From data every window starts at a noised sample of its own; on trajectories the rows are the windows of N / K of them, which begin at
    noise or, backwards, at data, or are noised data themselves, in the shares that the objective says."""
    bed, stage, settings = spec.bed(), spec.stages[-1], spec.stages[-1].settings()
    windows, count = stage.edges, min(spec.pairs, stage.steps * spec.batch)
    generator = torch.Generator().manual_seed(104729 * spec.seed + len(windows))
    guidance = None if spec.guidance == 1.0 else spec.guidance
    inverter = None
    if stage.teacher == "previous":
        before = spec.before()
        model, solver = trained(before, store), WindowSolver.from_student(before.table(), windows, solver_steps(stage))
    else:
        model, solver = bed.teacher, bed.solver(windows, solver_steps(stage), guidance=guidance)
        inverter = bed.solver(windows, solver_steps(stage), guidance=guidance, backward=True)
    active = torch.tensor(stage.active or range(len(windows)))
    if on_paths(settings):
        count = count // len(active)
    labels = torch.arange(count) % CLASSES
    labels = labels[torch.randperm(count, generator=generator)]
    data = bed.mixture.sample(labels, generator)
    noise = torch.randn(data.shape, generator=generator, dtype=torch.float32).to(data)
    dropped = torch.rand(count, generator=generator) < spec.drop
    seen = torch.where(dropped, torch.full_like(labels, NULL), labels).to(bed.device)
    asked = seen if guidance is None else labels.to(bed.device)
    of, table, parts = kinds(np.arange(count), settings), bed.table(windows), []

    def solved(rows: Tensor, window: Tensor) -> None:
        begin = table.start(data[rows], noise[rows], window)
        both = asked[rows] if solver.guidance_scale is None else torch.cat([torch.full_like(asked[rows], NULL), asked[rows]])
        parts.append((begin, solver.solve(lambda z, t: model(z, t, both), begin, window), window, seen[rows]))

    for kind in sorted(set(of)) or [DATA]:
        for rows in torch.from_numpy(np.flatnonzero(of == kind)).split(1024):
            if kind == NOISE:
                states = bed.path(model, solver, noise[rows], asked[rows])
            elif kind == FORWARD:
                assert inverter is not None, "pairs from data up are the root's"
                clean = table.alpha_end[-1] * data[rows] + table.sigma_end[-1] * noise[rows]
                states = bed.path(model, inverter, clean, asked[rows], backward=True)[::-1]
            elif on_paths(settings):
                for k in active.tolist():
                    solved(rows, torch.full((len(rows),), k, device=bed.device))
                continue
            else:
                solved(rows, active[rows % len(active)].to(bed.device))
                continue
            parts += [(states[k], states[k + 1], torch.full((len(rows),), k, device=bed.device), seen[rows]) for k in active.tolist()]
    z_start, z_end, window, seen = (torch.cat(column) for column in zip(*parts, strict=True))
    return z_start, z_end, window, seen
