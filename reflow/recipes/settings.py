"""A recipe: its stages, and the sections of `reflow.recipes.sections` beside them; `reflow.recipes.reading` reads and checks one."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from reflow.recipes.sections import (
    Checkpoint,
    Data,
    Density,
    DirectionNorm,
    Fraction,
    HuberNorm,
    Log,
    Loss,
    Method,
    Model,
    Normalize,
    Objective,
    Points,
    Section,
    Share,
    Space,
    Starts,
    Student,
    Teacher,
    TimeWeight,
    Train,
    Validate,
    WindowWeight,
)


def one_line(value: str) -> str:
    """A name stands in paths, titles and the heads of cards."""
    if not value.strip() or not value.isprintable():
        raise ValueError("write a name of one line")
    return value


def uniform(count: int, shift: float = 1.0) -> tuple[float, ...]:
    """Boundaries of `count` windows of equal width, before a flow's time shift."""
    even = (*(1 - k / count for k in range(count)), 0.0)
    return even if shift == 1.0 else tuple(shift * u / (1 + (shift - 1) * u) for u in even)


STAGE_SECTIONS = ("teacher", "objective", "train")  # of which a stage may have keys of its own


class Stage(Section):
    """One pass of progressive reflow. Keys that a section has too override the section's value for this stage."""

    windows: Annotated[int, Field(ge=1, le=1000)] | None = None
    """How many, of equal width before `shift`; a stage needs either this or `boundaries`."""
    boundaries: tuple[float, ...] | None = None
    """Edges of the windows, falling from at most 1 (noise) to at least 0 (data)."""
    shift: PositiveFloat | None = None
    """This stage's own `student.shift`."""
    solver_steps: PositiveInt
    """The teacher's steps in every window."""
    samples: PositiveInt
    """How many the stage trains on; at least one `train.batch_size`."""
    teacher: Literal["root", "previous"] = "root"
    """previous: the student of the stage before solves the merged windows instead of the root."""
    half: Literal["both", "noisy", "clean"] = "both"
    """noisy or clean straightens only that half of time."""
    pairs: NonNegativeInt = 0
    """Windows solved once and stored; 0: solve every window as it comes."""
    pairs_from: str = ""
    """A folder of `reflow prepare --pairs`, instead of solving; `pairs` then says how many of them (0: all)."""
    merges: Annotated[int, Field(ge=0, le=9)] = 0
    """Above 0: self-merging. The teacher solves each window in 2^merges parts, and the stage's own EMA student puts neighbours together."""
    self_share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Of `merges`: share in the loss of the chords that the student finishes, by default their number's, a half."""
    chords_per_solve: PositiveInt = 1
    """Points that are taken from every solved window; divides `train.micro_batch`."""
    learning_rate: PositiveFloat | None = None
    """This stage's own `train.learning_rate`."""
    warmup: NonNegativeInt | None = None
    """This stage's own `train.warmup`."""
    method: Method | None = None
    """This stage's own `teacher.method`."""
    guidance_scale: float | None = None
    """This stage's own `teacher.guidance_scale`."""
    drops_captions: bool | None = None
    """This stage's own `teacher.drops_captions`."""
    loss: Loss | None = None
    """This stage's own `objective.loss`."""
    space: Space | None = None
    """This stage's own `objective.space`."""
    direction_weight: NonNegativeFloat | None = None
    """This stage's own `objective.direction_weight`."""
    direction_norm: DirectionNorm | None = None
    """This stage's own `objective.direction_norm`."""
    huber_c: PositiveFloat | None = None
    """This stage's own `objective.huber_c`."""
    huber_norm: HuberNorm | None = None
    """This stage's own `objective.huber_norm`."""
    normalize: Normalize | None = None
    """This stage's own `objective.normalize`."""
    time_weight: TimeWeight | None = None
    """This stage's own `objective.time_weight`."""
    window_weight: WindowWeight | None = None
    """This stage's own `objective.window_weight`."""
    points: Points | None = None
    """This stage's own `objective.points`."""
    starts: Starts | None = None
    """This stage's own `objective.starts`."""
    starts_share: Share | None = None
    """This stage's own `objective.starts_share`."""
    forward_share: Fraction | None = None
    """This stage's own `objective.forward_share`."""
    time_density: Density | None = None
    """This stage's own `objective.time_density`."""
    time_share: Fraction | None = None
    """This stage's own `objective.time_share`."""
    time_upper: Share | None = None
    """This stage's own `objective.time_upper`."""
    time_sharpness: PositiveFloat | None = None
    """This stage's own `objective.time_sharpness`."""

    @property
    def stored(self) -> bool:
        """Whether the stage trains on pairs that were solved before it."""
        return bool(self.pairs or self.pairs_from)

    @property
    def edges(self) -> tuple[float, ...]:
        """Window boundaries from t=1 (noise) down to t=0 (data)."""
        return uniform(self.windows, self.shift or 1.0) if self.windows is not None else self.boundaries or ()

    @property
    def solved_edges(self) -> tuple[float, ...]:
        """Boundaries of what the teacher solves: the windows, or the parts that merge into them."""
        if self.windows is not None:
            return uniform(self.windows * 2**self.merges, self.shift or 1.0)
        count = 2**self.merges
        return (*(a + (b - a) * i / count for a, b in itertools.pairwise(self.edges) for i in range(count)), *self.edges[-1:])


class Recipe(Section):
    """A whole run. `name` is free; everything that changes the result is below."""

    name: Annotated[str, Field(max_length=100), pydantic.AfterValidator(one_line)]
    """Free; the run directory is `runs/<name>` where none is given."""
    model: Model = Model()
    data: Data = Data()
    student: Student = Student()
    teacher: Teacher = Teacher()
    objective: Objective = Objective()
    train: Train = Train()
    validate_: Validate = Field(default=Validate(), alias="validate")
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    stages: Annotated[list[Stage], Field(min_length=1)]

    @pydantic.model_validator(mode="after")
    def _shifts(self) -> Recipe:
        """A stage without a shift of its own has the student's: its windows follow from the stage alone."""
        if self.student.shift != 1.0:
            own = [stage if stage.shift is not None else stage.model_copy(update={"shift": self.student.shift}) for stage in self.stages]
            object.__setattr__(self, "stages", own)
        return self

    def of_stage(self, index: int) -> Recipe:
        """The recipe as stage `index` has it: its own values in the places of the sections'."""
        stage, changed = self.stages[index], {}
        for name in STAGE_SECTIONS:
            section: Section = getattr(self, name)
            shared = type(section).model_fields.keys() & Stage.model_fields.keys()
            changed[name] = section.model_copy(update={key: getattr(stage, key) for key in shared if getattr(stage, key) is not None})
        return self.model_copy(update=changed)

    def guidance_of(self, index: int) -> float:
        """The guidance that the student of stage `index` has learnt: of the root stage that its teachers go back to."""
        while self.stages[index].teacher == "previous":
            index -= 1
        return self.of_stage(index).teacher.guidance_scale

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as written to the run directory."""
        return self.model_dump(by_alias=True, mode="json", exclude_none=True)
