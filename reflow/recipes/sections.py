"""The sections of a recipe and their keys, with types, ranges and defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Loss = Literal["aligned_v", "mse", "pseudo_huber"]
Method = Literal["ddim", "euler", "heun"]
Space = Literal["velocity", "eps"]
DirectionNorm = Literal["window_speed", "none"]
HuberNorm = Literal["element", "sample"]
Normalize = Literal["none", "loss"]
TimeWeight = Literal["none", "reciprocal", "rcp_win"]
WindowWeight = Literal["none", "speed"]
Points = Literal["chord", "schedule"]
Starts = Literal["data", "noise"]
Density = Literal["uniform", "u_shaped", "window_start", "exponential"]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
EMA_WARMUP = 0.1


def share_of_switch(value: Any) -> Any:
    """`ema_warmup` was true or false in older recipes: the default share, or none."""
    return (EMA_WARMUP if value else 0.0) if isinstance(value, bool) else value


class Section(pydantic.BaseModel):
    # The line below a key is its description; reflow.recipes.keys makes KEYS.md of them.
    model_config = pydantic.ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Model(Section):
    """The pre-trained base: teacher of the first stage and start of the student."""

    family: str = "digits"
    """`digits`, `sd15`, `sdxl`, `sd3`, `flux`, `sana`, `qwen-image`, `z-image`, or a .py file that registers a family."""
    base: str = "builtin"
    """A diffusers folder, hub name or single file (.safetensors, .ckpt); "builtin" is the digits model that ships."""
    tokenizer: str = ""
    """For a single file: a folder with CLIP's tokenizer, such as any diffusers folder of the family."""
    config: str = ""
    """For a single file: a folder with its configs, where those of SD1.5 or SDXL do not fit."""
    prediction_type: Literal["", "epsilon", "v_prediction"] = ""
    """For a single file that does not say it; empty: what the file says, else epsilon."""
    null_prompt: Literal["base", "zeros", "empty"] = "base"
    """What a dropped caption and guidance's other half are: as the base's own pipeline has it, zeros, or an encoded ''."""
    guidance: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """Of a base that is told its guidance as an input (FLUX.1 dev): the number that teacher and student are told; 0: its pipeline's default."""
    student_weights: str = ""
    """Start the first student from this file instead of the base's own weights."""
    attention: Literal["auto", "sdpa", "xformers", "cudnn", "flash"] = "auto"
    """diffusers' choice; sdpa (PyTorch's), or only xformers, cudnn or flash, an error where it cannot run."""
    channels_last: bool = False
    """Convolutions in NHWC."""
    compile: bool = False
    """torch.compile of the repeated blocks, of teacher and student; not with `train.zero_stage` 3."""
    gradient_checkpointing: bool = False
    """The student computes its blocks twice and keeps only what goes between them."""
    lora_rank: NonNegativeInt = 0
    """Above 0: train a LoRA of this rank; the base, in `teacher.precision`, is its own teacher without it."""
    lora_alpha: NonNegativeFloat = 0.0
    """The LoRA counts alpha / rank times; 0: the rank, so once."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Layers that a LoRA changes, by the ends of their names; also ff.net.2, proj_in, conv1, ..."""


class Place(Section):
    """One of several places that data come from."""

    path: str
    """As `data.path`."""
    repeats: PositiveInt = 1
    """How often an epoch visits each of its items."""


class Data(Section):
    """What the windows start from: latents and captions, encoded once."""

    source: str = "digits"
    """digits: the 1,797 scans that scikit-learn ships; cache: what `reflow prepare` made; stream: images encoded as they come."""
    path: str = ""
    """cache: its folder; stream: a folder of images, tars or parquet files, or a dataset's name on the hub."""
    sources: tuple[Place, ...] = ()
    """Instead of `path`: several of them, each with how often an epoch visits its items."""
    caption_drop: Fraction = 0.1
    """Share of samples whose caption becomes the null prompt."""
    resolution: NonNegativeInt = 0
    """stream: side in pixels; 0: the base's own."""
    buckets: bool = False
    """stream: each image at the size with the nearest aspect ratio, of the table at this resolution's area."""
    image_column: str = ""
    """stream: of parquet and datasets, where it has no usual name."""
    caption_column: str = ""
    """stream: of parquet, datasets and a tar's .json, where it has no usual name."""
    split: str = "train"
    """stream: of a dataset."""
    missing_captions: Literal["error", "empty"] = "error"
    """stream: stop at an image without a caption, or take it with an empty one."""
    caption_lines: bool = False
    """stream: every line of a caption is a caption of the image; each of them is an item of its own."""
    shuffle_tags: PositiveInt = 1
    """stream: so many orders of a caption's comma-separated tags, the first as it stands; each of them is an item of its own."""
    keep_tags: NonNegativeInt = 0
    """stream: the first tags that `shuffle_tags` leaves in front."""
    max_bad_share: Fraction = 0.05
    """stream: share of images that may be unreadable; the next one stands in for each."""
    other_unet: bool = False
    """cache: take one that was made beside another UNet, where VAE and text encoders are the same."""

    @property
    def places(self) -> tuple[Place, ...]:
        """Where the data come from, one place or several."""
        return self.sources or (Place(path=self.path),)


class Student(Section):
    """How the student's output is read inside a window."""

    prediction_type: Literal["ddim_eps", "ddim_v", "diff_eps", "velocity"] = "ddim_eps"
    """ddim_eps and ddim_v start as the teacher's own DDIM; diff_eps and velocity must learn the way back."""
    network_time: Literal["index", "perflow", "flow"] = "index"
    """The time the network is asked at: index(t) = round(1000 t) - 1, as the base was trained, or 1000 t, PeRFlow's and that of flow bases."""
    shift: PositiveFloat = 1.0
    """Of a base that is a rectified flow: windows and solver steps are even before t = a u / (1 + (a - 1) u), a the base's own shift."""


class Teacher(Section):
    """How a frozen network solves its ODE inside a window."""

    method: Method = "ddim"
    """euler is the same step as ddim; heun asks the network twice a step."""
    guidance_scale: float = 1.0
    """1: the unconditional half is not computed; guide at inference instead (PeRFlow's CFG-sync)."""
    drops_captions: bool = True
    """The teacher sees the dropped caption too; false is PeRFlow's CFG-fixed."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Of the frozen teacher; fp8: its linear layers, through torchao, the rest bf16."""
    fp8_max_error: PositiveFloat = 0.1
    """Of fp8: stop at the start when it changes any window's velocity by more than this share of its length."""
    offload: bool = False
    """Keep the teacher in CPU memory between solves; nothing to do on a CPU."""
    batch_size: PositiveInt = 128
    """Windows solved at once when pairs are stored."""
    cuda_graph: bool = False
    """On a GPU: replay every window's solve as one CUDA graph; pays for small batches."""


class Objective(Section):
    """What the student learns from a solved window, and at which times."""

    loss: Loss = "aligned_v"
    """aligned_v: mean squared velocity error + `direction_weight` (1 - cosine)."""
    space: Space = "velocity"
    """eps weights times as a noise-matching loss does."""
    direction_weight: NonNegativeFloat = 1.0
    """Of aligned_v; 1 multiplies the direction part of the error by 1.5 in every window."""
    direction_norm: DirectionNorm = "window_speed"
    """window_speed scales the weight by the window's own squared speed; none takes it as it is."""
    huber_c: PositiveFloat = 0.001
    """Of pseudo_huber."""
    huber_norm: HuberNorm = "element"
    """Of pseudo_huber: of every element, or of the whole sample."""
    normalize: Normalize = "none"
    """loss divides every sample's loss by its own value, so that hard and easy windows count alike; the logged loss is then near 1."""
    time_weight: TimeWeight = "none"
    """Weight of times; rcp_win is of PeRFlow's SDXL code."""
    window_weight: WindowWeight = "none"
    """speed weighs a window by the mean squared speed of all over its own: errors count as shares of what a window moves."""
    points: Points = "chord"
    """Straight in z between the window's ends; "schedule" is phased rectified diffusion, without aligned_v."""
    starts: Starts = "data"
    """Windows start at noised real latents; "noise" takes the teacher's own trajectories."""
    starts_share: Share = 1.0
    """Of starts = "noise": share of trajectories from noise; the others start each window at one noised real latent."""
    forward_share: Fraction = 0.0
    """Share of pairs that the root makes backwards, from real latents up to noise: an anchor against drift (arXiv 2410.07815)."""
    time_density: Density = "window_start"
    """Where in a window the student trains."""
    time_share: Fraction = 0.5
    """Of window_start: this share exactly at the start, where a K-step student is used ..."""
    time_upper: Share = 0.7
    """... and the rest uniform over this first part of the window."""
    time_sharpness: PositiveFloat = 4.0
    """Of u_shaped and exponential: density e^(-a tau) from the window's start; 2.303 falls to a tenth at its end."""
    time_grid: NonNegativeInt = 1000
    """Times lie on a grid of so many steps, so that the network's time is exact; 0: anywhere."""


class Train(Section):
    """The optimizer's side. Every count is in samples; a sample is one point on one chord."""

    seed: NonNegativeInt = 0
    """With the sample's index it decides noise, item, time and caption drop."""
    batch_size: PositiveInt = 128
    """Samples an optimizer step, over all ranks."""
    micro_batch: PositiveInt = 64
    """Samples a forward on one rank; less memory, same result up to rounding. Divides `batch_size`."""
    learning_rate: PositiveFloat = 1e-4
    """At its highest, after `warmup`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of every stage; linear and cosine fall to 0."""
    warmup: NonNegativeInt = 0
    """Samples over which a stage's learning rate rises from 0."""
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "fused_adamw", "fused_adamw8bit"] = "adamw"
    """Of bitsandbytes: adamw8bit, and paged, which spills to CPU memory. fused_: clip, step, average and copy in one pass, no bitsandbytes."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Of AdamW: decay of the gradient's and the squared gradient's averages."""
    eps: PositiveFloat = 1e-8
    """Of AdamW."""
    weight_decay: NonNegativeFloat = 0.0
    """Of AdamW."""
    clip: NonNegativeFloat = 1.0
    """Of the gradient's norm; 0: none."""
    ema_half_life: NonNegativeFloat = 10_000
    """In samples; 0: no average."""
    ema_warmup: Annotated[Fraction, pydantic.BeforeValidator(share_of_switch)] = EMA_WARMUP
    """The half-life is at most this share of the samples done in the stage; 0: no ramp."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 has fp32 master weights."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """What the ranks share: 1 the optimizer, 2 gradients too, 3 weights too."""
    offload: bool = False
    """Master weights and AdamW's states in CPU memory, stepped there; needs `zero_stage` 1 to 3."""
    deepspeed: str = ""
    """Your own DeepSpeed JSON, laid over the one made from this recipe."""
    max_nonfinite: NonNegativeInt = 0
    """Stop when more samples than this are not finite."""
    deterministic: bool = True
    """Algorithms that repeat to the bit, so that a resumed run on a GPU equals an uninterrupted one."""
    rank_patience: NonNegativeInt = 45
    """Seconds that another rank may be stopped, gone or not heard before a rank ends with its name; a slow one is waited for. 0: for ever."""
    check_fit: bool = True
    """Refuse a run whose plan counts more memory or disk than there is; false: say so and start."""


class Validate(Section):
    """Pictures and a fixed loss during the run; nothing here changes what is learned."""

    every: NonNegativeInt = 0
    """Samples between two validations; 0: never."""
    steps: tuple[PositiveInt, ...] = (2, 4, 8)
    """Of the pictures: one row for each count."""
    teacher_steps: PositiveInt = 32
    """The teacher's, of its row."""
    images: PositiveInt = 10
    """Of every row."""
    prompts: tuple[str, ...] = ()
    """Of the pictures; empty: the captions of the first items."""
    guidance_scale: float = 1.0
    """Of the pictures."""
    pairs: PositiveInt = 64
    """Windows of the fixed loss."""
    warn_after: Fraction = 0.5
    """Share of a stage after which a student that is still behind its teacher at equal steps is said, with the likely cause; 1: at its end alone."""


class Checkpoint(Section):
    """When a checkpoint is written; the last of a stage always is."""

    every: NonNegativeInt = 0
    """Samples; 0: by the clock only."""
    minutes: NonNegativeFloat = 15.0
    """Between two checkpoints by the clock; 0: never by the clock."""
    keep: PositiveInt = 2
    """The newest so many stay."""


class Log(Section):
    """What is written down along the way."""

    every: PositiveInt = 1280
    """Samples between two lines of log.jsonl."""
    wandb: bool = False
    """Log to Weights & Biases too, where it is installed."""
