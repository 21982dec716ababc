"""What the JSON files of a diffusers folder may say, looked at before anything is built or sized by them.

A folder is data: it names no code but diffusers' and transformers' own classes, leads nowhere outside itself, and describes a network as
large as the weights beside it.
"""

from __future__ import annotations

import inspect
import math
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from reflow.errors import UserError, quote, short
from reflow.flow.schedule import DiscreteVP
from reflow.weights.guard import REMEDY, opened, reason_of

# Where the classes of a pipeline's parts may come from; "stable_diffusion" is diffusers' own name for its safety checker.
LIBRARIES = ("diffusers", "transformers", "stable_diffusion", "reflow.sampling")
# Schedulers that are read from their config by our own class, wherever theirs lies.
OWN_SCHEDULERS = ("PiecewiseFlowScheduler", "PeRFlowScheduler")
# Schedulers of flows, and the numbers of theirs that are read here.
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "DPMSolverMultistepScheduler", "FlowWindowScheduler")
SHIFTS = ("shift", "flow_shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
PART = re.compile(r"\w{1,64}", re.ASCII)
# Keys by which a config would make a library fetch or run other code, or take weights apart in another way.
FOREIGN = ("auto_map", "quantization_config", "compression_config", "attn_implementation", "_attn_implementation", "custom_pipeline")
DEPTHS = re.compile(r".*(layers|layers_per_block|num_blocks|num_layers)")  # counts of modules that are built one by one
LAYERS = 256
NUMBER = 2**31
ENTRIES = 100_000
# JSON's values for the types that the libraries' constructors name.
VALUES: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), str: (str,), bool: (bool,), tuple: (list, tuple), list: (list,),
                                       types.NoneType: (types.NoneType,)}  # fmt: skip


def check_index(index: Mapping[str, Any], file: Path) -> None:
    """Raises UserError where a model_index.json names a part that leads elsewhere, or code that is not the libraries' own."""
    if not isinstance(index.get("_class_name"), str):
        raise UserError(f"{file} names the pipeline's class as {quote(index.get('_class_name'))}; it must be one of diffusers' own. {REMEDY}")
    for part, value in index.items():
        if not isinstance(value, list):
            continue
        if not PART.fullmatch(part):
            raise UserError(f"{file} has a part {quote(part)}, which is no name of a folder in it. {REMEDY}")
        if part == "scheduler" and value[-1:] and value[-1] in OWN_SCHEDULERS:
            continue
        known = len(value) == 2 and (value == [None, None] or (value[0] in LIBRARIES and isinstance(value[1], str) and value[1].isidentifier()))
        if not known:
            raise UserError(f"{file} says that its {part} is {quote(value)}, which is code that diffusers and transformers do not have; none "
                            f"is run here. Give a folder whose parts are theirs.")


def check_config(config: Mapping[str, Any], file: Path) -> None:
    """Raises UserError where a network's config asks for foreign code, or holds a number or a nesting beyond all reason."""
    foreign = next((key for key in FOREIGN if config.get(key) is not None), None)
    if foreign:
        raise UserError(f"{file} has {foreign} = {quote(config[foreign])}, which asks for code or a format that is not read here. Give a plain "
                        f"folder, as save_pretrained writes one.")
    left: list[tuple[str, Any]] = list(config.items())
    seen = 0
    while left:
        key, value = left.pop()
        seen += 1
        if seen > ENTRIES:
            raise UserError(f"{file} holds more than {ENTRIES:,} values; no network's config does. {REMEDY}")
        if isinstance(value, dict):
            left += [(f"{short(key)}.{name}", sub) for name, sub in value.items()]
        elif isinstance(value, list):
            left += [(key, sub) for sub in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value) or abs(value) > NUMBER or (DEPTHS.fullmatch(key) and value > LAYERS):
                raise UserError(f"{file} has {short(key)} = {quote(value)}, which no network has. {REMEDY}")


def check_types(kind: Any, config: Mapping[str, Any], file: str | Path) -> None:
    """Raises UserError where a value is of another type than the class's constructor says; some would be noticed while it samples, some never."""
    for key, parameter in inspect.signature(kind.__init__).parameters.items():
        hint = parameter.annotation
        hints = hint.__args__ if isinstance(hint, types.UnionType) else (hint,)
        kinds = [VALUES.get(getattr(one, "__origin__", one)) for one in hints]
        if key in config and config[key] != parameter.default and all(kinds):
            if not isinstance(config[key], tuple(value for kind in kinds for value in kind)):
                raise UserError(f"{file} has {key} = {quote(config[key])}, which is no {' or '.join(getattr(h, '__name__', str(h)) for h in hints)}. "
                                f"{REMEDY}")


def check_sizes(unet: Mapping[str, Any], vae: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError where the numbers that we read of a UNet's and a VAE's config ourselves are missing or of another kind."""
    for part, config, keys in (("unet", unet, ("sample_size", "in_channels", "out_channels")), ("vae", vae, ())):
        file = folder / part / "config.json"
        for key in keys:
            _need(config.get(key), lambda v: type(v) is int and 0 < v <= 65_536, file, key, "a whole number above 0")
        _need(config.get("block_out_channels", [1]), lambda v: isinstance(v, list) and 0 < len(v) <= 16 and all(type(n) is int and n > 0 for n in v),
              file, "block_out_channels", "a list of whole numbers above 0")  # fmt: skip
    file = folder / "vae" / "config.json"
    _need(vae.get("scaling_factor"), lambda v: v is None or (_number(v) and v > 0), file, "scaling_factor", "a number above 0")
    _need(vae.get("shift_factor"), lambda v: v is None or _number(v), file, "shift_factor", "a number")
    for key in ("latents_mean", "latents_std"):
        _need(vae.get(key), lambda v: v is None or (isinstance(v, list) and len(v) == vae.get("latent_channels", 4) and all(_number(n) for n in v)),
              file, key, "one number a channel")  # fmt: skip
    _need(vae.get("latents_std"), lambda v: v is None or all(v), file, "latents_std", "one number a channel, none of them 0")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _need(value: Any, fits: Any, file: Path, key: str, what: str) -> None:
    if not fits(value):
        raise UserError(f"{file} has {key} = {quote(value)}; it must be {what}. {REMEDY}")


def check_schedule(config: Mapping[str, Any], file: Path) -> None:
    """Raises UserError naming the file where a scheduler's config describes no noise schedule of a discrete VP network."""
    kind = config.get("prediction_type", "epsilon")
    if not isinstance(kind, str):
        raise UserError(f"{file} has prediction_type = {quote(kind)}; it must be a word such as epsilon. {REMEDY}")
    try:
        DiscreteVP.from_config(config)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise UserError(f"{file} describes no noise schedule that can be read ({reason_of(error)}). {REMEDY}") from error


def check_flow(config: Mapping[str, Any], file: Path) -> None:
    """Raises UserError naming the file where a scheduler's config is of no rectified flow, or has a shift that is no number above 0."""
    kind = config.get("_class_name")
    if kind not in FLOWS:
        raise UserError(f"{file} is of a {quote(kind)}, and a transformer of a flow has one of {', '.join(FLOWS)}. {REMEDY}")
    for key in SHIFTS:
        _need(config.get(key), lambda v: v is None or (_number(v) and v > 0), file, key, "a number above 0")


def check_files(network: torch.nn.Module, files: Iterable[Path], file: Path) -> None:
    """Raises UserError where the headers of weight files do not fit the network of a config: before any memory is taken for it."""
    wanted = network.state_dict()
    there = 0
    for weights in files:
        with opened(weights, REMEDY) as reader:
            for name in reader.keys():
                stored = reader.get_slice(name)
                shape, kind = tuple(stored.get_shape()), stored.get_dtype()
                there += math.prod(shape)
                if name in wanted and shape != tuple(wanted[name].shape):
                    raise UserError(f"{weights}: {short(name)} has shape {quote(list(shape))}, and {file} describes "
                                    f"{list(wanted[name].shape)}. {REMEDY}")
                if name in wanted and wanted[name].is_floating_point() and kind not in ("F16", "BF16", "F32", "F64"):
                    raise UserError(f"{weights}: {short(name)} is stored as {kind}, and weights are read in fp16, bf16 or fp32. "
                                    f"Give an unquantised file.")
    needed = sum(tensor.numel() for tensor in wanted.values())
    if needed > 2 * there + 2**20:
        raise UserError(f"{file} describes a network of {needed:,} weights, and the files beside it hold {there:,}. {REMEDY}")
