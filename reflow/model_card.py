"""README.md of an exported folder: what the model is, how to sample it, how it was made and how good it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from reflow.sampling import PiecewiseFlowScheduler

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
    value = card.get("guidance")
    if isinstance(value, Mapping):
        value = value.get("guidance_scale")
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return f", guidance_scale={value:g}" if isinstance(value, (int, float)) else ""


def model_card(
    card: Mapping[str, Any],
    *,
    name: str,
    scheduler: PiecewiseFlowScheduler,
    steps: int | None,
    stock: bool,
    reason: str,
) -> str:
    """Markdown with a Hugging Face header. ``card`` keys recipe, data, steps, guidance and evaluation come in that
    order, then the rest; license, base and title go where a hub reader looks for them. Values may be text, numbers,
    mappings or rows."""
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
    import_line = [] if stock else ["import reflow.sampling  # the scheduler's class"]
    lines += [
        "```python",
        "from diffusers import DiffusionPipeline",
        *import_line,
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{name}")',
        f'image = pipe("a prompt", num_inference_steps={steps}{_guidance_argument(card)}).images[0]',
        "```",
        "",
    ]
    boundaries = ", ".join(f"{t:g}" for t in scheduler.windows.boundaries)
    if stock:
        lines += [
            f"Use exactly {count} step{'s' * (count != 1)} with this scheduler; {reason}. For more steps install "
            "reflow and write:",
            "",
            "```python",
            "from reflow.sampling import PiecewiseFlowScheduler",
            "",
            f"pipe.scheduler = PiecewiseFlowScheduler.from_config(pipe.scheduler.config, num_time_windows={count})",
            "```",
            "",
        ]
    else:
        lines += [
            f"The folder carries reflow's PiecewiseFlowScheduler, because {reason}. Use {count} steps or more.",
            "",
        ]
    lines += [
        "| | |",
        "|---|---|",
        f"| windows | {count}: t = {boundaries} (1 is noise, 0 is data) |",
        f"| prediction_type | {scheduler.config.prediction_type} |",
        f"| network_time | {scheduler.config.network_time} |",
        "",
    ]
    rest = [key for key in card if key not in SECTIONS and key not in ("title", "license", "base")]
    for key in [key for key in SECTIONS if key in card] + rest:
        lines += [f"## {key.replace('_', ' ').capitalize()}", "", _body(card[key]), ""]
    return "\n".join(lines)
