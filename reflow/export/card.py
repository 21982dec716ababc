"""The card of an exported model, a folder's README.md or a file's NAME.md: what it is, how to sample it, how it was
made and how good it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from reflow.export.spec import PAGE, other_programs
from reflow.export.stock import BETA_KEYS, STOCK_TYPES
from reflow.sampling import FlowWindowScheduler
from reflow.sampling.sampler import Scheduler

SECTIONS = ("recipe", "data", "steps", "guidance", "evaluation")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        value = f"{value:.6g}"
    elif isinstance(value, (list, tuple)):
        value = ", ".join(_cell(item) for item in value)
    return str(value).replace("|", "\\|").replace("\n", " ")


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in mapping.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return rows


def _body(value: Any) -> str:
    if isinstance(value, Mapping):
        return "\n".join(["| | |", "|---|---|", *(f"| {_cell(key)} | {_cell(item)} |" for key, item in _flat(value))])
    if (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and value
        and all(isinstance(row, Mapping) for row in value)
    ):
        columns = list(dict.fromkeys(key for row in value for key in row))
        rows = [f"| {' | '.join(_cell(row.get(column, '')) for column in columns)} |" for row in value]
        return "\n".join([f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *rows])
    return _cell(value) if not isinstance(value, str) else value


def _guidance_argument(card: Mapping[str, Any]) -> str:
    if "call" in card:
        return "".join(f", {name}={value:g}" if isinstance(value, float) else f", {name}={value!r}" for name, value in card["call"].items())
    value = card.get("guidance")
    if isinstance(value, Mapping):
        value = value.get("guidance_scale")
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return f", guidance_scale={value:g}" if isinstance(value, (int, float)) else ""


HALVES = {"fp16": "torch.float16", "bf16": "torch.bfloat16"}
DDIM = 'clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing"'
# ComfyUI leaves out, with no more than a log line, every layer of a LoRA whose name it does not know.
OTHER_LORA = (
    "write this LoRA again with `reflow export --format lora-kohya`: of this file they read some layers or none, and "
    "go on without the others."
)
IMPORTED = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


def scheduler_code(scheduler: Scheduler, stock: bool) -> str:
    """A Python expression that makes the student's scheduler for any pipeline of its base: stock DDIM where that is
    exact (``stock``, for one step a window), else ours; of a flow always ours, which is right for every pipeline."""
    config = scheduler.config
    if isinstance(scheduler, FlowWindowScheduler):
        return f"FlowWindowScheduler(shift={config.shift:g}, window_boundaries={tuple(scheduler.windows.boundaries)})"
    betas = ", ".join(f"{key}={config[key]!r}" for key in BETA_KEYS if config[key] not in (None, False))
    if stock:
        return f'DDIMScheduler({betas}, prediction_type="{STOCK_TYPES[config.prediction_type]}", {DDIM})'
    boundaries = tuple(scheduler.windows.boundaries)
    return (
        f"PiecewiseFlowScheduler({betas}, window_boundaries={boundaries}, "
        f'prediction_type="{config.prediction_type}", network_time="{config.network_time}")'
    )


def _python(*lines: str) -> list[str]:
    return ["```python", *lines, "```", ""]


def _call(steps: int, card: Mapping[str, Any]) -> str:
    return f'image = pipe("a prompt", num_inference_steps={steps}{_guidance_argument(card)}).images[0]'


def _use_folder(
    card: Mapping[str, Any], name: str, scheduler: Scheduler, steps: int, stock: bool, reason: str, dtype: str, left_out: Sequence[str]
) -> list[str]:
    count, ours = len(scheduler.windows), type(scheduler).__name__
    flow = isinstance(scheduler, FlowWindowScheduler)
    own = scheduler_code(scheduler, False) if flow else f"{ours}.from_config(pipe.scheduler.config, num_time_windows={count})"
    imports = [] if stock else ["import reflow.sampling  # the scheduler's class"]
    without = "".join(f", {part}=None" for part in left_out)
    load = f'pipe = DiffusionPipeline.from_pretrained("{name}"{without})'
    lines = _python("from diffusers import DiffusionPipeline", *imports, "", load, _call(steps, card))
    if dtype in HALVES:
        lines += [
            f"The {'transformer' if flow else 'UNet'} is stored in {dtype}, under the names of whole weights: write `torch_dtype={HALVES[dtype]}` "
            "where from_pretrained loads it, to run in that, and leave `variant` out.",
            "",
        ]
    if stock:
        return [
            *lines,
            f"Use exactly {steps} step{'s' * (steps != 1)} with this scheduler; {reason}. For more steps install "
            "reflow and write:",
            "",
            *_python(
                f"from reflow.sampling import {ours}",
                "",
                f"pipe.scheduler = {own}",
            ),
        ]
    return [
        *lines,
        f"The folder carries reflow's {ours}, because {reason}. Use {count} steps or more.",
        "",
        *(_sigmas(scheduler) if flow else ()),
    ]


def _sigmas(scheduler: Any) -> list[str]:
    """How to sample a flow's student without this package: by its noise levels, where the pipeline takes them."""
    levels = ", ".join(f"{level:.6g}" for level in scheduler.windows.t_start)
    return [
        f"Without reflow, where the pipeline takes `sigmas`: they are {levels}, written before the scheduler's own shift; with "
        f"`FlowMatchEulerDiscreteScheduler(shift=1.0)` pass `sigmas=[{levels}]`.",
        "",
    ]


def _use_file(
    kind: str, card: Mapping[str, Any], name: str, scheduler: Scheduler, steps: int, stock: bool
) -> list[str]:
    """How a single file, a delta or a LoRA is used; ``name`` is the file's."""
    base = card.get("base", "the base")
    ours = f"from reflow.sampling import {type(scheduler).__name__}"
    where = "from diffusers import DDIMScheduler" if stock and not isinstance(scheduler, FlowWindowScheduler) else ours
    set_scheduler = f"pipe.scheduler = {scheduler_code(scheduler, stock)}"
    guidance = card.get("guidance", 1.0)
    scale = guidance.get("guidance_scale", 1.0) if isinstance(guidance, Mapping) else guidance
    programs = other_programs(scheduler, stock, scale if isinstance(scale, (int, float)) else 1.0)
    listed = [*(f"* {program}: {how}." for program, how in programs.items()), ""]
    if kind == "delta":
        return [
            f"What training changed, to be added to {base} or to a fine-tune of it:",
            "",
            "```bash",
            f"reflow merge --base MY-FINE-TUNE --delta {name} --out my-fast-model",
            "```",
            "",
        ]
    if kind in ("lora", "lora-kohya"):
        load = f'pipe.load_lora_weights("{name}")'
        lines = _python(where, "", f"# pipe: a pipeline of {base}", load, set_scheduler, _call(steps, card))
        if kind == "lora" and stock:
            return [*lines, f"For ComfyUI and AUTOMATIC1111 {OTHER_LORA}", ""]
        return [*lines, *listed]
    pipeline = IMPORTED.get(str(card.get("family")), "StableDiffusionXLPipeline")
    load = f'pipe = {pipeline}.from_single_file("{name}")'
    lines = _python(f"from diffusers import {pipeline}", where, "", load, set_scheduler, _call(steps, card))
    hint = f"Use {scheduler.config.num_time_windows} steps{'' if stock else ' or more'}. In other programs ({PAGE}):"
    return [*lines, hint, "", *listed]


def model_card(
    card: Mapping[str, Any],
    *,
    name: str,
    scheduler: Scheduler,
    steps: int | None,
    stock: bool,
    reason: str,
    kind: str = "folder",
    dtype: str = "fp32",
    left_out: Sequence[str] = (),
) -> str:
    """Markdown with a Hugging Face header. ``card`` keys recipe, data, steps, guidance and evaluation come in that
    order, then the rest; license, base, family and title go where a hub reader looks for them. Values may be text,
    numbers, mappings or rows. ``kind`` is what was written: "folder" or a format of `reflow export` that is a file;
    ``dtype`` is that of a folder's UNet, "fp32", "fp16" or "bf16"; ``left_out`` are parts that a folder has not and from_pretrained
    must be told so."""
    count = len(scheduler.windows)
    steps = steps or count
    header = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["reflow", "few-step"]}
    if card.get("license"):
        header["license"] = card["license"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(card.get("base", ""))):
        header["base_model"] = card["base"]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", ""]
    lines += [f"# {card.get('title', name)}", ""]
    base = f" of {card['base']}" if card.get("base") else ""
    lines += [
        f"A {steps}-step student{base}, trained by progressive reflow on {count} time window{'s' * (count != 1)}.",
        "",
    ]
    if kind == "folder":
        lines += _use_folder(card, name, scheduler, steps, stock, reason, dtype, left_out)
    else:
        lines += _use_file(kind, card, name, scheduler, steps, stock)
    boundaries = ", ".join(f"{t:g}" for t in scheduler.windows.boundaries)
    lines += [
        "| | |",
        "|---|---|",
        f"| windows | {count}: t = {boundaries} (1 is noise, 0 is data) |",
        f"| prediction_type | {scheduler.config.prediction_type} |",
        f"| network_time | {scheduler.config.network_time} |",
        "",
    ]
    rest = [key for key in card if key not in SECTIONS and key not in ("title", "license", "base", "family", "call")]
    for key in [key for key in SECTIONS if key in card] + rest:
        lines += [f"## {key.replace('_', ' ').capitalize()}", "", _body(card[key]), ""]
    return "\n".join(lines)
