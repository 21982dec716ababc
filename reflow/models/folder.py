"""Reading a diffusers folder, with a clear sentence for everything that can be wrong with it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from reflow.errors import UserError
from reflow.models.checks import check_config, check_files, check_flow, check_index, check_schedule, check_sizes, check_types
from reflow.models.family import PARTS, Base, Family
from reflow.models.parts import WEIGHTS, read_json
from reflow.quiet import quiet_imports
from reflow.weights.files import choose_variant, shard_names, variant_of
from reflow.weights.guard import CONVERT, PICKLES, REMEDY, need_finite, on_meta, pickles_allowed, reason_of

TITLES = {"unet": "UNet", "transformer": "transformer", "vae": "VAE"}


def load_base(
    family: Family,
    path: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    parts: Sequence[str],
    single: Mapping[str, str] | None = None,
) -> Base:
    """`Family.load`, with `builtin` resolved; `single` holds its options for single files."""
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"Unknown part {unknown[0]!r} of a base; parts are {', '.join(PARTS)}")
    folder = _folder(family, path, single or {})
    index = read_index(folder)
    if index.get("_class_name") not in family.pipelines:
        raise UserError(
            f"{folder} holds a {index.get('_class_name')}, but the family {family.name!r} takes "
            f"{' or '.join(family.pipelines)}. Name the family that fits the folder."
        )
    part, kind = family.network
    texts = [text for text in family.encoders if not (text.optional and index.get(text.encoder) in (None, [None, None]))]
    configs = {"pipeline": index, "scheduler": read_scheduler(folder, part)}
    for name in (part, "vae", *(text.encoder for text in texts)):
        configs[name] = read_json(folder / name / "config.json")
        check_config(configs[name], folder / name / "config.json")
    if part == "unet":
        check_sizes(configs["unet"], configs["vae"], folder)
    if configs[part].get("_class_name") != kind:
        raise UserError(f"{folder / part} holds a {configs[part].get('_class_name')}; reflow trains a {kind}.")

    base = family.base(family=family, path=folder, configs=configs)
    if not parts:
        return base
    quiet_imports()
    import diffusers
    import transformers

    if "unet" in parts:
        base.unet = base.fitted(_network(getattr(diffusers, kind), folder / part, dtype)).to(device)
    if "vae" in parts:
        vae_dtype = torch.float32 if configs["vae"].get("force_upcast", True) else dtype
        base.vae = _network(getattr(diffusers, family.vae), folder / "vae", vae_dtype).to(device).requires_grad_(False)
    if "text" in parts:
        base.text_encoders = tuple(
            _network(getattr(transformers, text.kind), folder / text.encoder, dtype).to(device).requires_grad_(False) for text in texts
        )
        base.tokenizers = tuple(_tokenizer(folder / text.tokenizer, text.tokenizer_kind) for text in texts)
    return base


def _folder(family: Family, path: str | Path, single: Mapping[str, str]) -> Path:
    if str(path) == "builtin":
        if family.builtin is None:
            raise UserError(
                f"The family {family.name!r} has no built-in weights. Write the path of a diffusers folder."
            )
        refuse_options(path, single)
        return family.builtin
    return find_folder(path, single)


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a diffusers folder. Raises UserError where there is none, or one that cannot be read or names foreign code."""
    index = read_json(folder / "model_index.json")
    check_index(index, folder / "model_index.json")
    return index


def read_scheduler(folder: Path, network: str = "unet") -> dict[str, Any]:
    """The scheduler's config of a diffusers folder. Raises UserError where it describes no noise schedule that the network can have: of a
    UNet a table of betas, of a transformer a flow."""
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_json(file, infinite=network != "unet")  # Sana's DPM-Solver has lambda_min_clipped = -Infinity
    if network == "unet":
        check_schedule(config, file)
    else:
        check_flow(config, file)
    return config


def refuse_options(path: str | Path, single: Mapping[str, str]) -> None:
    """Raises UserError where options for single files are given for something else."""
    given = [f"{name} = {value!r}" for name, value in single.items() if value]
    if given:
        raise UserError(
            f"{path} is a diffusers folder, which has a tokenizer, configs and a prediction type of its own, so "
            f"{given[0]} would not be read. Leave that out, or change the folder."
        )


def find_folder(path: str | Path, single: Mapping[str, str] | None = None) -> Path:
    """The folder at this path, the one that a single-file checkpoint is unpacked into, or the download of the hub
    repository of this name. `single`: tokenizer, config and prediction_type for a single file. Raises UserError where
    there is none of them.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        from reflow.models.single_file import unpack

        return unpack(folder, **(single or {}))
    if folder.is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        refuse_options(path, single or {})
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or folder.suffix in (".safetensors", ".ckpt"):
        raise UserError(f"There is no folder or file {folder}. Write the path of a diffusers folder or a checkpoint.")
    quiet_imports()
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(str(path), variant=_hub_variant(str(path))))
    except Exception as error:
        reason = reason_of(error)
        raise UserError(
            f"There is no folder {path} here, and no hub repository of that name could be downloaded "
            f"({textwrap.shorten(reason, 160, placeholder=' ...')}). Write the path of a diffusers folder, or look at "
            "the connection."
        ) from error


def _hub_variant(name: str) -> str | None:
    """The variant to download of a hub repository, None for the plain one or where its files cannot be listed: then
    diffusers looks into its cache, or says what is wrong."""
    from huggingface_hub import HfApi

    try:
        files = [file.removeprefix("unet/") for file in HfApi().list_repo_files(name) if file.startswith("unet/")]
    except Exception:  # noqa: BLE001 - no connection, no such repository, no right to read it
        return None
    weights = [file for file in files if file.endswith(".safetensors")] or [f for f in files if f.endswith(".bin")]
    return choose_variant(weights, name) or None


def _network(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """One network in eval mode, after its config and the headers of its weight files were found to fit each other."""
    files = sorted(folder.glob("*.safetensors"))
    others = [] if files else sorted(folder.glob("*.bin"))
    variant = choose_variant((file.name for file in files or others), folder)
    if not files and not others:
        raise UserError(
            f"{folder} has no weights: {folder / (WEIGHTS[0 if kind.__module__.startswith('diffusers') else 1])}"
            f".safetensors is missing. {REMEDY}"
        )
    if others and not pickles_allowed():
        raise UserError(f"{folder} holds {others[0].name} and no .safetensors weights. {CONVERT} {PICKLES}=1 reads them without running code.")
    for index in folder.glob("*.safetensors.index*.json"):
        shard_names(index)
    if files:
        check_files(_described(kind, folder), [file for file in files if variant_of(file.name) == variant], folder / "config.json")
    try:
        how = {"torch_dtype": dtype, "variant": variant or None, "output_loading_info": True, "local_files_only": True}
        # Without the keyword both libraries read the .bin files that were asked for above, with torch's weights_only.
        network, info = kind.from_pretrained(folder, use_safetensors=True, **how) if files else kind.from_pretrained(folder, **how)
    except Exception as error:
        raise UserError(f"The weights in {folder} cannot be loaded ({reason_of(error)}). {REMEDY}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"The weights in {folder} lack {len(missing)} tensors, the first is {missing[0]}. {REMEDY}")
    need_finite(network.named_parameters(), f"the {TITLES.get(folder.name, 'text encoder')} of {folder.parent}")
    return network.eval()


def _described(kind: Any, folder: Path) -> torch.nn.Module:
    """The network of a folder's config, on the meta device."""
    config = read_json(folder / "config.json")
    check_types(kind if kind.__module__.startswith("diffusers") else kind.config_class, config, folder / "config.json")
    if kind.__module__.startswith("diffusers"):
        return on_meta(lambda: kind.from_config(config), folder / "config.json")
    return on_meta(lambda: kind(kind.config_class.from_dict(config)), folder / "config.json")


def _tokenizer(folder: Path, kind: str) -> Any:
    import transformers

    names = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
    if not any((folder / name).is_file() for name in names):
        raise UserError(f"{folder} has no tokenizer: none of {', '.join(names)} is there. {REMEDY}")
    try:
        return getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise UserError(f"The tokenizer in {folder} cannot be read ({reason_of(error)}). {REMEDY}") from error
