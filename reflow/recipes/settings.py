"""The sections of a recipe and their keys, with types, ranges and defaults; `reflow.recipes.reading` reads and checks them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Loss = Literal["aligned_v", "mse", "pseudo_huber"]
EMA_WARMUP = 0.1


def share_of_switch(value: Any) -> Any:
    """`ema_warmup` was true or false in older recipes: the default share, or none."""
    return (EMA_WARMUP if value else 0.0) if isinstance(value, bool) else value


class Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", validate_default=True)


class Model(Section):
    """The pre-trained base: teacher of the first stage and start of the student."""

    family: str = "digits"
    base: str = "builtin"
    tokenizer: str = ""
    config: str = ""
    prediction_type: Literal["", "epsilon", "v_prediction"] = ""
    student_weights: str = ""
    attention: Literal["auto", "sdpa", "xformers", "cudnn", "flash"] = "auto"
    channels_last: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False
    lora_rank: NonNegativeInt = 0
    lora_alpha: NonNegativeFloat = 0.0
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


class Data(Section):
    """What the windows start from: latents and captions, encoded once."""

    source: str = "digits"
    path: str = ""
    caption_drop: Fraction = 0.1
    resolution: NonNegativeInt = 0
    buckets: bool = False
    image_column: str = ""
    caption_column: str = ""
    split: str = "train"
    missing_captions: Literal["error", "empty"] = "error"
    max_bad_share: Fraction = 0.05
    other_unet: bool = False


class Student(Section):
    """How the student's output is read inside a window."""

    prediction_type: Literal["ddim_eps", "ddim_v", "diff_eps", "velocity"] = "ddim_eps"
    network_time: Literal["index", "perflow"] = "index"


class Teacher(Section):
    """How a frozen network solves its ODE inside a window."""

    method: Literal["ddim", "euler", "heun"] = "ddim"
    guidance_scale: float = 1.0
    drops_captions: bool = True
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    fp8_max_error: PositiveFloat = 0.1
    offload: bool = False
    batch_size: PositiveInt = 128
    cuda_graph: bool = False


class Objective(Section):
    """What the student learns from a solved window, and at which times."""

    loss: Loss = "aligned_v"
    space: Literal["velocity", "eps"] = "velocity"
    direction_weight: NonNegativeFloat = 1.0
    direction_norm: Literal["window_speed", "none"] = "window_speed"
    huber_c: PositiveFloat = 0.001
    huber_norm: Literal["element", "sample"] = "element"
    time_weight: Literal["none", "reciprocal", "rcp_win"] = "none"
    points: Literal["chord", "schedule"] = "chord"
    starts: Literal["data", "noise"] = "data"
    time_density: Literal["uniform", "u_shaped", "window_start"] = "window_start"
    time_share: Fraction = 0.5
    time_upper: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    time_sharpness: PositiveFloat = 4.0
    time_grid: NonNegativeInt = 1000


class Train(Section):
    """The optimizer's side. Every count is in samples; a sample is one point on one chord."""

    seed: NonNegativeInt = 0
    batch_size: PositiveInt = 128
    micro_batch: PositiveInt = 64
    learning_rate: PositiveFloat = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: NonNegativeInt = 0
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = "adamw"
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip: NonNegativeFloat = 1.0
    ema_half_life: NonNegativeFloat = 10_000
    ema_warmup: Annotated[Fraction, pydantic.BeforeValidator(share_of_switch)] = EMA_WARMUP
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    offload: bool = False
    deepspeed: str = ""
    max_nonfinite: NonNegativeInt = 0
    deterministic: bool = True


class Stage(Section):
    """One pass of progressive reflow. The keys below `samples` override the sections' values for this stage."""

    windows: PositiveInt | None = None
    boundaries: tuple[float, ...] | None = None
    solver_steps: PositiveInt
    samples: PositiveInt
    teacher: Literal["root", "previous"] = "root"
    half: Literal["both", "noisy", "clean"] = "both"
    pairs: NonNegativeInt = 0
    pairs_from: str = ""
    chords_per_solve: PositiveInt = 1
    learning_rate: PositiveFloat | None = None
    loss: Loss | None = None
    direction_weight: NonNegativeFloat | None = None
    warmup: NonNegativeInt | None = None

    @property
    def stored(self) -> bool:
        """Whether the stage trains on pairs that were solved before it."""
        return bool(self.pairs or self.pairs_from)

    @property
    def edges(self) -> tuple[float, ...]:
        """Window boundaries from t=1 (noise) down to t=0 (data)."""
        return self.boundaries or tuple(1 - k / self.windows for k in range(self.windows)) + (0.0,)


class Validate(Section):
    every: NonNegativeInt = 0
    steps: tuple[PositiveInt, ...] = (2, 4, 8)
    teacher_steps: PositiveInt = 32
    images: PositiveInt = 10
    prompts: tuple[str, ...] = ()
    guidance_scale: float = 1.0
    pairs: PositiveInt = 64


class Checkpoint(Section):
    every: NonNegativeInt = 0
    minutes: NonNegativeFloat = 15.0
    keep: PositiveInt = 2


class Log(Section):
    every: PositiveInt = 1280
    wandb: bool = False


class Recipe(Section):
    """A whole run. `name` is free; everything that changes the result is below."""

    name: str
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

    def stage_value(self, index: int, section: str, key: str) -> Any:
        """The stage's own value of a key, else the section's."""
        own = getattr(self.stages[index], key, None)
        return getattr(getattr(self, section), key) if own is None else own

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as written to the run directory."""
        return self.model_dump(by_alias=True, mode="json", exclude_none=True)
