"""Delta weights: what few-step training changed, as one file that can be added to any model of the same architecture.

dW = W_student - W_base per tensor; merged W = W_custom + scale * dW (PeRFlow, arXiv 2405.07510, "plug-and-play"; the
same expression as InstaFlow's). Sums are taken in fp32 and cast once, at the end.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from reflow.errors import UserError, quote, short
from reflow.flow import PREDICTION_TYPES, Windows
from reflow.flow.schedule import NETWORK_TIMES
from reflow.weights.files import (
    State,
    public_name,
    read_metadata,
    read_state,
    refuse_pickles,
    weight_files,
    write_state,
)

PUBLISHED = "delta_weights.safetensors"


@dataclass
class MergeReport:
    """What a merge did, by key name."""

    matched: list[str] = field(default_factory=list)  # delta added
    mismatched: list[str] = field(default_factory=list)  # shapes differ, custom weight kept, allowed by name
    skipped: list[str] = field(default_factory=list)  # in one of the two only, allowed by name
    size: float = 0.0  # norm of what was added, relative to that of the weights it was added to

    def __str__(self) -> str:
        lines = [
            f"{len(self.matched)} tensors merged, {len(self.mismatched)} of another shape kept, {len(self.skipped)} "
            "in one model only.",
            f"The weights changed by {100 * self.size:.3g} % of their size.",
        ]
        lines += [f"  other shape: {key}" for key in self.mismatched] + [f"  one only: {key}" for key in self.skipped]
        return "\n".join(lines)


def _delta_file(source: str | Path) -> Path:
    """PeRFlow's published folders hold the delta under a name of its own, or as if it were a UNet's weights."""
    path = Path(source)
    if not path.is_dir():
        return path
    if (path / PUBLISHED).is_file():
        return path / PUBLISHED
    files = weight_files(path)
    return files[0] if len(files) == 1 else path


def _metadata_file(source: str | Path) -> Path:
    """The file whose metadata speaks for a delta: itself, or the first of its shards."""
    file = _delta_file(source)
    if not file.is_dir():
        return file
    files = weight_files(file) or weight_files(file / "unet")
    if not files:
        refuse_pickles(file)
        raise UserError(
            f"{file} holds no delta weights: expected {PUBLISHED} or a UNet's .safetensors weights. Give the file or "
            "folder of a delta."
        )
    return files[0]


def _examples(keys: Sequence[str]) -> str:
    return short(", ".join(keys[:3])) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def make_delta(base: str | Path | State, student: str | Path | State) -> dict[str, torch.Tensor]:
    """student - base per tensor, in fp32. Raises UserError unless both have the same keys and shapes."""
    base_state, student_state = read_state(base), read_state(student)
    odd = sorted(base_state.keys() ^ student_state.keys())
    odd += [key for key in base_state if key in student_state and base_state[key].shape != student_state[key].shape]
    if odd:
        raise UserError(
            f"The base and the student are not the same architecture: {_examples(odd)} differ in name or shape. Give "
            "the base that this student was trained from."
        )
    return {
        key: student_state[key].float() - base_state[key].float()
        for key in base_state
        if base_state[key].is_floating_point()
    }


def write_delta(
    base: str | Path | State,
    student: str | Path | State,
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: str | torch.dtype = "fp32",
) -> Path:
    """Write student - base as .safetensors, with the metadata of :func:`student_metadata`."""
    return write_state(make_delta(base, student), path, dtype=dtype, metadata=metadata)


def student_metadata(
    windows: Windows, prediction_type: str, network_time: str = "index", **more: Any
) -> dict[str, str]:
    """Text metadata that says how a student's weights are to be sampled; ``more`` (base, recipe, steps, ...) is stored
    as text, a base on this disk and a family's file by their own names."""
    settings = {
        "windows": json.dumps(list(windows.boundaries)),
        "prediction_type": prediction_type,
        "network_time": network_time,
    }
    shown = {key: public_name(more[key]) for key in ("base", "family") if key in more}
    return settings | {key: str(value) for key, value in (more | shown).items()}


def delta_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata of a delta, a .safetensors file or its published folder; {} if it has none."""
    return read_metadata(_metadata_file(path))


def student_settings(path: str | Path) -> dict[str, Any]:
    """windows, prediction_type and network_time stored in a .safetensors file, as keyword arguments of export_folder.

    {} for files that do not say, as PeRFlow's published deltas: those were trained on 4 uniform windows with
    network_time "perflow". Raises UserError for metadata that cannot be.
    """
    metadata = delta_metadata(path)
    if "windows" not in metadata:
        return {}
    try:
        windows = Windows(tuple(json.loads(metadata["windows"])))
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise unreadable(path, "windows", metadata["windows"], "falling boundaries as [1.0, 0.5, 0.0]") from error
    for key, known in (("prediction_type", PREDICTION_TYPES), ("network_time", NETWORK_TIMES)):
        if metadata.get(key) not in known:
            raise unreadable(path, key, metadata.get(key), f"one of {', '.join(known)}")
    return {"windows": windows, "prediction_type": metadata["prediction_type"], "network_time": metadata["network_time"]}


def unreadable(path: str | Path, key: str, value: Any, what: str) -> UserError:
    """Where a file's own metadata say something that they cannot mean."""
    return UserError(f"{path} says in its metadata that {key} is {quote(value)}; it must be {what}. Write or download the file again.")


def merge(
    custom: str | Path | State, delta: str | Path | State, scale: float = 1.0, *, allow: Sequence[str] = ()
) -> tuple[dict[str, torch.Tensor], MergeReport]:
    """W_custom + scale * dW per tensor, in fp32, each result in the dtype of the custom weight.

    Keys are diffusers UNet names, as in PeRFlow's published delta_weights.safetensors (the file or its folder). A key
    that is in one of the two only, or whose shape differs, raises UserError unless a pattern of ``allow`` names it
    ("conv_in.*" for an inpainting UNet); the custom weight is then kept as it is and reported.
    """
    if not math.isfinite(scale):
        raise UserError(f"The merge scale is {scale}; it must be a finite number, 1 for the whole delta.")
    custom_state = read_state(custom)
    delta_state = read_state(delta if isinstance(delta, Mapping) else _delta_file(delta))
    report = MergeReport()
    for key in sorted(custom_state.keys() | delta_state.keys()):
        if key not in custom_state:
            report.skipped.append(key)
        elif key not in delta_state:
            if custom_state[key].is_floating_point():
                report.skipped.append(key)
        elif custom_state[key].shape != delta_state[key].shape:
            report.mismatched.append(key)
        elif custom_state[key].is_floating_point():
            report.matched.append(key)
    unused = [
        pattern
        for pattern in allow
        if not any(fnmatch.fnmatchcase(key, pattern) for key in report.mismatched + report.skipped)
    ]
    if unused:
        raise UserError(f"allow names {_examples(unused)}, but no key that differs has that name; leave it out.")
    refused = [
        key
        for key in report.mismatched + report.skipped
        if not any(fnmatch.fnmatchcase(key, pattern) for pattern in allow)
    ]
    if refused:
        raise UserError(
            f"{len(refused)} of {len(custom_state)} weights do not fit the delta in name or shape: "
            f"{_examples(refused)}. Merge into a model of the delta's architecture, or allow these names to be left "
            "as they are."
        )
    merged = dict(custom_state)
    added = before = 0.0
    for key in report.matched:
        weight = custom_state[key]
        change = scale * delta_state[key].to(weight.device).float()
        merged[key] = (weight.float() + change).to(weight.dtype)
        added += change.norm().item() ** 2
        before += weight.float().norm().item() ** 2
    report.size = math.sqrt(added / before) if before else 0.0
    return merged, report
