"""A student as a diffusers folder that loads anywhere.

The folder carries a scheduler of diffusers wherever the base's pipeline samples the student exactly with it, so that it
needs no package of ours; otherwise it carries ours and says why. It is written under a temporary name and renamed at the end.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from reflow.errors import UserError
from reflow.export.card import model_card
from reflow.export.student import checked_unet, same_reading
from reflow.export.trial import Found, base_of, choose
from reflow.flow import Windows
from reflow.models import Base
from reflow.models.checks import check_config
from reflow.models.folder import read_index, read_scheduler
from reflow.models.parts import read_json
from reflow.outputs import staged
from reflow.sampling import student_scheduler
from reflow.weights.delta import student_metadata
from reflow.weights.files import (
    DTYPES,
    SHARD,
    WEIGHTS,
    State,
    choose_variant,
    dtype_of,
    make_folder,
    read_state,
    refuse_existing,
    variant_of,
    write_state,
)

OPTIONAL_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".msgpack", ".h5", ".onnx", ".pb", ".pt", ".ckpt"}


@dataclass(frozen=True)
class Export:
    """Where a folder was written, whether a scheduler of diffusers samples it, the reason, a sentence, and the scheduler's class; found: what
    the trial with it through each pipeline found, see `reflow.export.trial`."""

    path: Path
    stock: bool
    reason: str
    scheduler: str
    found: Mapping[str, Found] = field(default_factory=dict)


def _part_files(folder: Path) -> list[tuple[Path, str]]:
    """(file, name to give it) of one part: its configs and one set of weights, safetensors and plain names where there
    is a choice."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    weights = [file for file in files if file.suffix in WEIGHT_SUFFIXES]
    same_kind: list[Path] = []
    for suffix in (".safetensors", ".bin"):
        same_kind = same_kind or [file for file in weights if file.suffix == suffix]
    variant = choose_variant((file.name for file in same_kind), folder)
    chosen = [file for file in same_kind if variant_of(file.name) == variant]
    kept = []
    for file in files:
        if file in weights and file not in chosen:
            continue
        weights_name, is_index, _ = file.name.partition(".index.")
        if is_index:
            same_weights = bool(chosen) and Path(weights_name).suffix == chosen[0].suffix
            if not same_weights or variant_of(file.name) != variant:
                continue
        # Whole files and indices lose the variant, so that they load without naming it; shards keep the names that the
        # index knows.
        lose = variant and (is_index or file in chosen) and not SHARD.search(file.stem)
        name = file.name.replace(f".{variant}.", ".") if lose else file.name
        kept.append((file, str(file.relative_to(folder).with_name(name))))
    return kept


def _single_precision(config: Path) -> None:
    """Make transformers load this part in fp32, as diffusers loads the others, unless the caller names a dtype.

    Without the entry it takes the dtype of the stored weights, and halves meet floats in the UNet.
    """
    settings = read_json(config)
    if settings.get("dtype") == "float32":
        return
    settings.pop("torch_dtype", None)
    config.unlink()  # maybe a hard link to the base's own file
    config.write_text(json.dumps({**settings, "dtype": "float32"}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_parts(base: Path, index: dict[str, Any], out: Path, link: bool) -> None:
    for name, value in list(index.items()):
        if not isinstance(value, list) or value[0] is None or name in ("unet", "transformer", "scheduler"):
            continue
        if not (base / name).is_dir():
            if name not in OPTIONAL_PARTS:
                raise UserError(
                    f"{base / name} is missing, so {base} is no complete diffusers folder; give a complete one."
                )
            index[name] = [None, None]
            continue
        for file, target in _part_files(base / name):
            place = out / name / target
            place.parent.mkdir(parents=True, exist_ok=True)
            if link:
                try:
                    os.link(file.resolve(), place)
                    continue
                except OSError:  # another file system
                    pass
            shutil.copyfile(file, place)
        if value[0] != "diffusers" and (out / name / "config.json").is_file():
            _single_precision(out / name / "config.json")


def _left_out(index: Mapping[str, Any]) -> list[str]:
    """The parts that a folder has not (an SD3 without T5) and that from_pretrained of its pipeline's class refuses to do without unless it is
    told so; model_index.json's null is not enough."""
    import diffusers

    kind = getattr(diffusers, str(index.get("_class_name")), None)
    optional = getattr(kind, "_optional_components", OPTIONAL_PARTS)
    return [name for name, value in index.items() if value == [None, None] and name not in optional]


def export_folder(
    base: str | Path | Base,
    unet_state: str | Path | State,
    out: str | Path,
    *,
    windows: int | Windows,
    prediction_type: str | None = None,
    network_time: str | None = None,
    steps: int | None = None,
    dtype: str | torch.dtype = "fp16",
    card: Mapping[str, Any] | None = None,
    link: bool = False,
    pipeline: Mapping[str, Any] | None = None,
    guidance: float = 1.0,
) -> Export:
    """Write a diffusers folder: the student's UNet in ``dtype``, a scheduler, README.md, and every other part of the
    base.

    ``base`` is a folder, or a base that its family read, of which nothing need be loaded. ``unet_state`` is a state dict,
    a .safetensors file or a UNet folder, in diffusers' names. prediction_type None is the base's own, network_time None as
    PiecewiseFlowScheduler has it; ``steps`` is the number that the model is meant for (None: one a window), which decides
    with ``windows`` whether a scheduler of diffusers will do: the pipeline of the base is tried with it, and with ours, at
    ``guidance``, the scale that the model is meant for, before anything is written. ``card`` may hold recipe, data, steps,
    guidance, evaluation and anything else the README should say. ``link`` makes hard links to the base's files instead of
    copies, where the file system can. The folder loads in fp32 whatever ``dtype`` its weights are stored in, or in the
    dtype that from_pretrained is given. ``pipeline`` changes entries of model_index.json. Raises UserError if ``out`` is
    not empty, the base is incomplete, the weights do not fit, or the pipeline of the installed diffusers does not sample
    the student as it was trained.
    """
    read = base if isinstance(base, Base) else base_of(Path(base))
    base, out = base.path if isinstance(base, Base) else Path(base), Path(out)
    refuse_existing(out)
    index = read_index(base) | dict(pipeline or {})
    part = "transformer" if index.get("transformer") else "unet"
    config_file = base / part / "config.json"
    config = read_json(config_file)
    check_config(config, config_file)
    scheduler = student_scheduler(
        read_scheduler(base, part),
        windows,
        prediction_type=prediction_type,
        network_time=network_time,
    )
    same_reading(unet_state, scheduler)
    # Fewer steps than windows are refused here, before anything is written.
    scheduler.set_timesteps(steps or len(scheduler.windows))
    state = checked_unet(read_state(unet_state), config, dtype_of(dtype))
    choice = choose(read, scheduler, steps, guidance)
    chosen = choice.scheduler
    index["scheduler"] = ["diffusers" if choice.stock else type(chosen).__module__, type(chosen).__name__]

    make_folder(out.parent)
    with staged(out) as temporary:
        _copy_parts(base, index, temporary, link)
        (temporary / part).mkdir()
        shutil.copyfile(config_file, temporary / part / "config.json")
        # So that `reflow sample` knows a student also where the folder carries stock DDIM.
        says = student_metadata(scheduler.windows, scheduler.config.prediction_type, scheduler.config.network_time)
        write_state(state, temporary / part / f"{WEIGHTS}.safetensors", metadata=says)
        chosen.save_pretrained(temporary / "scheduler")
        (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(
            model_card(
                card or {},
                name=out.name,
                scheduler=scheduler,
                steps=steps,
                stock=choice.stock,
                reason=choice.reason,
                dtype=next((name for name, kind in DTYPES.items() if kind == dtype_of(dtype)), "fp32"),
                left_out=_left_out(index),
            ),
            encoding="utf-8",
        )
    return Export(out, choice.stock, choice.reason[0].upper() + choice.reason[1:] + ".", type(chosen).__name__, choice.found)
