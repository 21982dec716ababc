"""Few-step methods as data: what each one's source says, as far as a student of the exact bed can express it.

Every method is made for a budget of network evaluations and takes as many optimizer steps as that leaves it. Captions are dropped as PeRFlow
drops them, but where a source drops none. Not expressed: perceptual losses (2-rectified flow++, InstaFlow), guided pairs of the rectified flows
and of PCM, LoRA, real images beyond the mixture's own. Time runs from t=1 (noise) to t=0 (data).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from reflow.experiments.beds import consistency, students
from reflow.experiments.beds.consistency import Consistency
from reflow.experiments.beds.exact import ExactBed, Model
from reflow.experiments.beds.students import Stage, Student
from reflow.experiments.store import Store
from reflow.flow import ChordTable

Keys = tuple[tuple[str, Any], ...]
Spec = TypeVar("Spec", Student, Consistency)
SOURCES = ("experiments/beds/methods.py", *consistency.SOURCES)
PAIRS = 8192  # a stage, solved once; half of that where one window is solved, a quarter where two stages are
LEAST, MOST = 4, 1 << 17  # optimizer steps that a budget is searched in
SCALE = 3.0  # of learnt guidance

UNIFORM: Keys = (("time_density", "uniform"),)
U_SHAPED: Keys = (("time_density", "u_shaped"),)
EPS: Keys = (("space", "eps"),)
NOISE: Keys = (("starts", "noise"),)
ALIGNED: Keys = (("loss", "aligned_v"),)
HUBER: Keys = (("loss", "pseudo_huber"),)
OF_SAMPLE: Keys = (*HUBER, ("huber_norm", "sample"), ("huber_c", 5.4e-4))
SCHEDULE: Keys = (("points", "schedule"), *HUBER)
AT_ONE: Keys = (*NOISE, ("time_share", 1.0))


@dataclass(frozen=True)
class Method:
    """family: whose method it is, as tables group them. windows: of its stages. keys: [objective] of all stages; last: of the last one instead.
    stage: other fields of all stages; later: of all but the first. settings: fields of the student."""

    family: str
    windows: tuple[int, ...]
    keys: Keys = ()
    last: Keys | None = None
    stage: dict[str, Any] = field(default_factory=dict)
    later: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Of the smallest sampler that the student has."""
        return self.windows[-1]

    @property
    def guidance(self) -> float | None:
        """What was learnt of it."""
        return self.settings.get("guidance")

    @property
    def sees_null(self) -> bool:
        """Whether the student can be guided at inference: it saw dropped labels, and learnt no guidance."""
        return self.settings.get("drop", 0.1) > 0 and self.guidance is None

    def of(self, total: int, seed: int = 0) -> Student:
        """The student with so many optimizer steps in all, shared evenly by the stages."""
        count = len(self.windows)
        stages = []
        for i, windows in enumerate(self.windows):
            keys = self.last if self.last is not None and i == count - 1 else self.keys
            more = {**self.stage, **(self.later if i else {})}
            stages.append(Stage(windows, total // count + (total % count if i == count - 1 else 0), keys, **more))
        return Student(tuple(stages), seed=seed, **{"drop": 0.1, "pairs": PAIRS, **self.settings})

    def at(self, budget: int, seed: int = 0) -> Student:
        """The student that costs at most so many network evaluations, while one step more costs more. Raises ValueError where none does."""
        return within(self.of, budget, seed)


@dataclass(frozen=True)
class Phased:
    """Phased consistency: `Method` for students of another trainer."""

    family: str
    windows: tuple[int, ...]
    target: str = "network"
    guidance: None = None
    sees_null: bool = True

    @property
    def steps(self) -> int:
        return self.windows[-1]

    def of(self, total: int, seed: int = 0) -> Consistency:
        return Consistency(self.windows[-1], total, target=self.target, seed=seed)

    def at(self, budget: int, seed: int = 0) -> Consistency:
        return within(self.of, budget, seed)


def within(of: Callable[[int, int], Spec], budget: int, seed: int) -> Spec:
    """The costliest student of `of(optimizer steps, seed)` that costs at most `budget` network evaluations."""
    low, high = LEAST, MOST
    if of(low, seed).evaluations() > budget:
        raise ValueError(f"{budget:,} network evaluations are too few: {low} optimizer steps cost {of(low, seed).evaluations():,}.")
    while high - low > 1:
        half = (low + high) // 2
        low, high = (half, high) if of(half, seed).evaluations() <= budget else (low, half)
    return of(low, seed)


FIXED = {"guidance": SCALE}
DISTILLED = {"teacher": "previous", "solver_steps": 32}
HALF, QUARTER = {"pairs": PAIRS // 2}, {"pairs": PAIRS // 4}
CHAINED = {"teacher": "previous"}
METHODS: dict[str, Method | Phased] = {
    "2-rectified flow": Method("rectified", (1,), (*UNIFORM, *NOISE), settings=HALF),
    "2-rectified flow, near start": Method("rectified", (1,), NOISE, settings=HALF),
    "InstaFlow": Method("rectified", (1, 1), (*UNIFORM, *NOISE), last=AT_ONE, later=DISTILLED, settings=QUARTER),
    "InstaFlow, U-shaped times": Method("rectified", (1, 1), (*U_SHAPED, *NOISE), last=AT_ONE, later=DISTILLED, settings=QUARTER),
    "2-rectified flow++": Method("rectified", (1,), (*U_SHAPED, *NOISE, *OF_SAMPLE), settings=HALF),
    "2-rectified flow++, half from data": Method("rectified", (1,), (*U_SHAPED, *NOISE, *OF_SAMPLE, ("forward_share", 0.5)), settings=HALF),
    "distillation at t = 1": Method("rectified", (1,), AT_ONE, settings=HALF),
    "PeRFlow": Method("PeRFlow", (4,), (*UNIFORM, *EPS)),
    "PeRFlow, diff_eps": Method("PeRFlow", (4,), (*UNIFORM, *EPS), settings={"prediction_type": "diff_eps"}),
    "PeRFlow, velocity": Method("PeRFlow", (4,), UNIFORM, settings={"prediction_type": "velocity"}),
    "PeRFlow, near start": Method("PeRFlow", (4,), EPS),
    "PeRFlow-fixed": Method("PeRFlow-fixed", (4,), (*UNIFORM, *EPS), settings=FIXED),
    "PeRFlow-fixed, diff_eps": Method("PeRFlow-fixed", (4,), (*UNIFORM, *EPS), settings={**FIXED, "prediction_type": "diff_eps"}),
    "PeRFlow-fixed, velocity": Method("PeRFlow-fixed", (4,), UNIFORM, settings={**FIXED, "prediction_type": "velocity"}),
    "PeRFlow-fixed, near start": Method("PeRFlow-fixed", (4,), EPS, settings=FIXED),
    "ProReflow-I": Method("ProReflow", (8, 4), (*UNIFORM, *ALIGNED)),
    "ProReflow-I, chained": Method("ProReflow", (8, 4), (*UNIFORM, *ALIGNED), later=CHAINED),
    "ProReflow-I, near start": Method("ProReflow", (8, 4), ALIGNED),
    "ProReflow-I, chained, near start": Method("ProReflow", (8, 4), ALIGNED, later=CHAINED),
    "ProReflow-II": Method("ProReflow", (8, 4, 2), (*UNIFORM, *ALIGNED)),
    "ProReflow-II, chained": Method("ProReflow", (8, 4, 2), (*UNIFORM, *ALIGNED), later=CHAINED),
    "ProReflow-II, near start": Method("ProReflow", (8, 4, 2), ALIGNED),
    "ProReflow-II, chained, near start": Method("ProReflow", (8, 4, 2), ALIGNED, later=CHAINED),
    "phased rectified diffusion": Method("rectified diffusion", (4,), (*UNIFORM, *SCHEDULE), stage={"solver_steps": 10}, settings={"drop": 0.0}),
    "phased rectified diffusion, fixed": Method(
        "rectified diffusion", (4,), (*UNIFORM, *SCHEDULE), stage={"solver_steps": 10}, settings={"drop": 0.0, **FIXED}
    ),
    "phased rectified diffusion, near start": Method("rectified diffusion", (4,), SCHEDULE, stage={"solver_steps": 10}),
    "PCM, 4 phases": Phased("consistency", (4,)),
    "PCM, 4 phases, average as target": Phased("consistency", (4,), target="average"),
    "PCM, 2 phases": Phased("consistency", (2,)),
    "consistency (1 phase)": Phased("consistency", (1,)),
    "4 windows, near start": Method("ours", (4,)),
    "4 windows, near start, trajectory starts": Method("ours", (4,), NOISE),
    "2 windows, near start": Method("ours", (2,)),
    "8 parts merging into 4": Method("ours", (4,), stage={"merges": 1}),
    "8 parts merging into 2": Method("ours", (2,), stage={"merges": 2}),
}


def trained(spec: Student | Consistency, bed: ExactBed, store: Store, seeds: Sequence[int]) -> tuple[Model, ChordTable]:
    """The student on the bed, trained now with those of the other seeds if it is not in the store, and its last windows."""
    own = replace(spec, scans=bed.scans, device=bed.device)
    model = consistency.trained(own, store, seeds) if isinstance(own, Consistency) else students.trained(own, store, seeds)
    return model, own.table()


def sample(bed: ExactBed, spec: Student | Consistency, model: Model, per_window: int, noise: Tensor, labels: Tensor, *,
           guidance: float | None = None) -> Tensor:  # fmt: skip
    """Samples [B, D] by so many steps a window. guidance: of the student's own answers. Consistency students are noised anew within a phase."""
    own = replace(spec, scans=bed.scans, device=bed.device)
    if isinstance(own, Consistency) and per_window > 1:
        return consistency.noised_again(own, model, per_window, noise, labels, guidance=guidance)
    return bed.sample(model, bed.student_solver(own.table(), per_window, guidance=guidance), noise, labels)
