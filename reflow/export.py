"""Exports of a trained student: a diffusers folder that loads anywhere, and a single file with the original key names.

The folder carries stock DDIM wherever that samples the student exactly, so that it needs no package of ours; otherwise
it carries PiecewiseFlowScheduler and says why. Every export is written under a temporary name and renamed at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reflow.checkpoint_keys import (
    SD_CLIP_PREFIX,
    SDXL_CLIP_PREFIX,
    original_clip,
    original_open_clip,
    original_unet,
    original_vae,
)
from reflow.delta import student_metadata, student_settings
from reflow.errors import UserError
from reflow.flow import Windows
from reflow.model_card import model_card
from reflow.model_spec import markers, model_spec, other_programs
from reflow.models import Family, family
from reflow.quiet import quiet_imports
from reflow.sampling import PiecewiseFlowScheduler
from reflow.states import WEIGHTS, State, cast, dtype_of, read_state, refuse_existing, write_state

STOCK_TYPES = {"ddim_eps": "epsilon", "ddim_v": "v_prediction"}
STOCK_TOLERANCE = 1e-6
BETA_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
OPTIONAL_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".msgpack", ".h5", ".onnx", ".pb", ".pt", ".ckpt"}


@dataclass(frozen=True)
class Export:
    """Where a folder was written, whether it samples with stock DDIM, and the reason, a sentence."""

    path: Path
    stock: bool
    reason: str


def stock_scheduler(scheduler: PiecewiseFlowScheduler, steps: int | None = None) -> tuple[Any | None, str]:
    """The stock DDIMScheduler that samples this scheduler's student exactly in ``steps`` steps (None: one a window),
    or None, and why.

    The claim is tried, not assumed: both schedulers take all steps on one random input and must agree to 1e-6 of the
    result's size.
    """
    from diffusers import DDIMScheduler

    count, kind = len(scheduler.windows), scheduler.config.prediction_type
    steps = count if steps is None else steps
    if kind not in STOCK_TYPES:
        return None, f"stock DDIM has no {kind} parameterisation"
    if steps != count:
        return None, f"{steps} steps on {count} windows are no DDIM steps; stock DDIM is right for {count} steps only"
    stock = DDIMScheduler(
        **{key: scheduler.config[key] for key in BETA_KEYS},
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
        prediction_type=STOCK_TYPES[kind],
    )
    trial = PiecewiseFlowScheduler.from_config(scheduler.config)
    stock.set_timesteps(steps)
    trial.set_timesteps(steps)
    if stock.timesteps.tolist() != trial.timesteps.tolist():
        return None, (
            f"the student is called at timesteps {[round(t, 3) for t in trial.timesteps.tolist()]} and stock DDIM "
            f"would use {stock.timesteps.tolist()}"
        )
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(2, 4, 32, 32, generator=generator)
    for timestep in stock.timesteps:
        output = torch.randn(ours.shape, generator=generator)
        ours = trial.step(output, timestep, ours).prev_sample
        theirs = stock.step(output, timestep, theirs).prev_sample
    error = ((ours - theirs).norm() / ours.norm()).item()
    if not error <= STOCK_TOLERANCE:
        return None, f"stock DDIM with {steps} steps differs by {error:.1e} of the result on a random input"
    return stock, f"stock DDIM with {steps} steps agrees to {error:.0e} of the result on a random input"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing, so {path.parent} is no complete diffusers folder; give the folder that the student "
            "was trained from."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON ({error}).") from error


def _checked_unet(state: State, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state in ``dtype``, if it fits the base's UNet name by name and shape by shape and stays finite."""
    quiet_imports()
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        expected = UNet2DConditionModel.from_config(config).state_dict()
    wrong = sorted(expected.keys() ^ state.keys()) + [
        key for key in expected if key in state and expected[key].shape != state[key].shape
    ]
    if wrong:
        raise UserError(
            f"The student's weights do not fit the base's UNet: {len(wrong)} differ in name or shape, the first is "
            f"{wrong[0]}. Give the base that this student was trained from."
        )
    ready = cast(state, dtype)
    for key, tensor in ready.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            cause = (
                f"does not fit into {dtype}; export in fp32 or bf16"
                if torch.isfinite(state[key]).all()
                else "is not finite; export an earlier stage"
            )
            raise UserError(f"The student's weight {key} {cause}.")
    return ready


def _same_reading(source: str | Path | State, scheduler: PiecewiseFlowScheduler) -> None:
    """Raises UserError where a weights file says itself that its student is sampled in another way."""
    if isinstance(source, Mapping) or not Path(source).is_file():
        return
    config = scheduler.config
    asked = {"prediction_type": config.prediction_type, "network_time": config.network_time}
    for key, value in student_settings(source).items():
        value = value.boundaries if isinstance(value, Windows) else value
        wanted = scheduler.windows.boundaries if key == "windows" else asked[key]
        if value != wanted:
            raise UserError(
                f"{source} was trained with {key} {value!r}, and is exported as {wanted!r}; its images would be wrong. "
                "Export it as it was trained: reflow.delta.student_settings reads what the file says."
            )


def _part_files(folder: Path) -> list[tuple[Path, str]]:
    """(file, name to give it) of one part: its configs and one set of weights, safetensors and plain names where there
    is a choice."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    weights = [file for file in files if file.suffix in WEIGHT_SUFFIXES]
    same_kind: list[Path] = []
    for suffix in (".safetensors", ".bin"):
        same_kind = same_kind or [file for file in weights if file.suffix == suffix]
    by_variant: dict[str, list[Path]] = {}
    for file in same_kind:  # model.safetensors, model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
        by_variant.setdefault(file.stem.partition(".")[2].split("-")[0], []).append(file)
    variant = min(by_variant, key=lambda name: (name != "", name != "fp16", name), default="")
    chosen = by_variant.get(variant, [])
    kept = []
    for file in files:
        if file in weights and file not in chosen:
            continue
        weights_name, is_index, rest = file.name.partition(".index.")
        if is_index:
            same_weights = bool(chosen) and Path(weights_name).suffix == chosen[0].suffix
            if not same_weights or rest != (f"{variant}.json" if variant else "json"):
                continue
        # Whole files and indices lose the variant, so that they load without naming it; shards keep the names that the
        # index knows.
        name = file.name.replace(f".{variant}.", ".") if variant else file.name
        kept.append((file, str(file.relative_to(folder).with_name(name))))
    return kept


def _single_precision(config: Path) -> None:
    """Make transformers load this part in fp32, as diffusers loads the others, unless the caller names a dtype.

    Without the entry it takes the dtype of the stored weights, and halves meet floats in the UNet.
    """
    settings = _read_json(config)
    if settings.get("dtype") == "float32":
        return
    settings.pop("torch_dtype", None)
    config.unlink()  # maybe a hard link to the base's own file
    config.write_text(json.dumps({**settings, "dtype": "float32"}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_parts(base: Path, index: dict[str, Any], out: Path, link: bool) -> None:
    for name, value in list(index.items()):
        if not isinstance(value, list) or value[0] is None or name in ("unet", "scheduler"):
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


def export_folder(
    base_path: str | Path,
    unet_state: str | Path | State,
    out: str | Path,
    *,
    windows: int | Windows,
    prediction_type: str | None = None,
    network_time: str = "index",
    steps: int | None = None,
    dtype: str | torch.dtype = "fp16",
    card: Mapping[str, Any] | None = None,
    link: bool = False,
) -> Export:
    """Write a diffusers folder: the student's UNet in ``dtype``, a scheduler, README.md, and every other part of the
    base.

    ``unet_state`` is a state dict, a .safetensors file or a UNet folder, in diffusers' names. prediction_type None is
    the base's own; ``steps`` is the number that the model is meant for (None: one a window), which decides with
    ``windows`` whether stock DDIM will do. ``card`` may hold recipe, data, steps, guidance, evaluation and anything
    else the README should say. ``link`` makes hard links to the base's files instead of copies, where the file system
    can. The folder loads in fp32 whatever ``dtype`` its weights are stored in, or in the dtype that from_pretrained is
    given. Raises UserError if ``out`` is not empty, the base is incomplete or the weights do not fit.
    """
    base, out = Path(base_path), Path(out)
    refuse_existing(out)
    index = _read_json(base / "model_index.json")
    unet_config = _read_json(base / "unet" / "config.json")
    scheduler = PiecewiseFlowScheduler.for_student(
        _read_json(base / "scheduler" / "scheduler_config.json"),
        windows,
        prediction_type=prediction_type,
        network_time=network_time,
    )
    _same_reading(unet_state, scheduler)
    # Fewer steps than windows are refused here, before anything is written.
    scheduler.set_timesteps(steps or len(scheduler.windows))
    state = _checked_unet(read_state(unet_state), unet_config, dtype_of(dtype))
    stock, reason = stock_scheduler(scheduler, steps)
    chosen = stock or scheduler
    index["scheduler"] = ["diffusers" if stock else type(chosen).__module__, type(chosen).__name__]

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.mkdir()
        _copy_parts(base, index, temporary, link)
        (temporary / "unet").mkdir()
        shutil.copyfile(base / "unet" / "config.json", temporary / "unet" / "config.json")
        # So that `reflow sample` knows a student also where the folder carries stock DDIM.
        says = student_metadata(scheduler.windows, scheduler.config.prediction_type, scheduler.config.network_time)
        write_state(state, temporary / "unet" / f"{WEIGHTS}.safetensors", metadata=says)
        chosen.save_pretrained(temporary / "scheduler")
        (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(
            model_card(
                card or {}, name=out.name, scheduler=scheduler, steps=steps, stock=stock is not None, reason=reason
            ),
            encoding="utf-8",
        )
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Export(out, stock is not None, reason[0].upper() + reason[1:] + ".")


def _single_file_family(base_path: Path) -> Family:
    index = _read_json(base_path / "model_index.json")
    names = {"StableDiffusionPipeline": "sd15", "StableDiffusionXLPipeline": "sdxl"}
    if index.get("_class_name") not in names:
        raise UserError(
            f"{base_path} holds a {index.get('_class_name')}; one file with original key names exists for "
            f"{' and '.join(names)} only."
        )
    return family(names[index["_class_name"]])


def single_file_state(
    base_path: str | Path, unet_state: str | Path | State, *, dtype: str | torch.dtype = "fp16"
) -> dict[str, torch.Tensor]:
    """UNet, VAE and text encoders of an SD1.5 or SDXL model as one state with the original checkpoint's key names.

    Left out is what diffusers does not keep: OpenCLIP's logit_scale and the schedule's constants, which no program
    needs. Raises UserError for models that have no such format: SD2 bases, block layouts of other kinds, an SDXL with
    two text encoders of one width.
    """
    base_path = Path(base_path)
    base = _single_file_family(base_path).load(base_path, parts=("vae", "text"))
    encoders = base.text_encoders
    if not base.family.pooled and encoders[0].config.hidden_act != "quick_gelu":
        raise UserError(
            f"{base_path} has the text encoder of SD2, whose original checkpoint holds a layer that diffusers "
            "dropped, so it cannot be written as one file; export a diffusers folder instead."
        )
    if base.family.pooled and encoders[0].config.hidden_size == encoders[1].config.hidden_size:
        raise UserError(
            f"{base_path} has two text encoders of one width, which readers of single SDXL files cannot tell apart; "
            "export a diffusers folder instead."
        )
    dtype = dtype_of(dtype)
    state = original_unet(_checked_unet(read_state(unet_state), base.configs["unet"], dtype), base.configs["unet"])
    state |= original_vae(base.vae.state_dict(), base.configs["vae"])
    if base.family.pooled:
        state |= original_clip(encoders[0].state_dict(), SDXL_CLIP_PREFIX)
        state |= original_open_clip(encoders[1].state_dict())
    else:
        state |= original_clip(encoders[0].state_dict(), SD_CLIP_PREFIX)
    return cast(state, dtype)


def export_single_file(
    base_path: str | Path,
    unet_state: str | Path | State,
    out: str | Path,
    *,
    dtype: str | torch.dtype = "fp16",
    metadata: Mapping[str, Any] | None = None,
    scheduler: PiecewiseFlowScheduler | None = None,
    guidance: float = 1.0,
) -> Path:
    """Write one .safetensors file with the original checkpoint's key names; ``metadata`` is stored with it as text.

    Such a file has no scheduler. Give the student's own, from PiecewiseFlowScheduler.for_student, and the file says
    in ModelSpec metadata what the network predicts and how it is to be sampled, with ``guidance``; v-prediction is
    marked as programs expect it. Raises UserError as :func:`single_file_state` does, and if ``out`` exists.
    """
    refuse_existing(Path(out))
    state, says = single_file_state(base_path, unet_state, dtype=dtype), dict(metadata or {})
    if scheduler is not None:
        _same_reading(unet_state, scheduler)
        base = _single_file_family(Path(base_path)).load(base_path, parts=())
        settings = other_programs(scheduler, stock_scheduler(scheduler)[0] is not None, guidance)
        usage = ". ".join(f"{program}: {how}" for program, how in settings.items())
        spec = model_spec(
            scheduler, base.family.name, title=Path(out).stem, resolution=base.resolution, usage=usage
        )
        state, says = state | markers(scheduler), spec | says
    return write_state(state, out, metadata={key: str(value) for key, value in says.items()})
