"""Single-file checkpoints (.safetensors, .ckpt) with the original key names of SD1.5 and SDXL, without the network.

A file is unpacked once into a diffusers folder in reflow's cache, in the dtype it is stored in; from there on it is a
folder like any other. Block layout and scheduler come from the configs that ship with the package (or a folder that
the user names), the tokenizer from a folder that the user names.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from reflow.errors import UserError, short
from reflow.models import checks
from reflow.models.parts import read_json
from reflow.quiet import quiet_imports
from reflow.weights import guard
from reflow.weights.original_names import (
    SD_CLIP_PREFIX,
    SDXL_CLIP_PREFIX,
    SDXL_OPEN_CLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    unet_names,
    vae_names,
)

SUFFIXES = (".safetensors", ".ckpt")
CONFIGS = Path(__file__).parent / "configs"
VERSION = 1  # of what is written: raised when the same file would be unpacked otherwise
# What files say of themselves, in lower case: ModelSpec has "v" and "epsilon", and tools write other names for the two;
# students of reflow have their parameterisation.
PREDICTIONS = {
    **dict.fromkeys(("epsilon", "eps", "ddim_eps", "diff_eps"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "v-prediction", "v_pred", "v-pred", "vpred", "ddim_v"), "v_prediction"),
}
# Keys of a network trained on EDM's noise levels (Playground 2.5, CosXL), which neither epsilon nor v can be read as.
EDM_KEYS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
STUDENT_KEYS = ("windows", "prediction_type", "network_time")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
State = Mapping[str, torch.Tensor]


def packaged(kind: str) -> Path | None:
    """The folder of the configs of "sd15" or "sdxl" that ship with the package; None for other names."""
    folder = CONFIGS / kind
    return folder if folder.is_dir() else None


def cache_folder() -> Path:
    """Where files are unpacked: $REFLOW_CACHE, else reflow/ in the user's cache folder."""
    if os.environ.get("REFLOW_CACHE"):
        return Path(os.environ["REFLOW_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reflow"


def read_checkpoint(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, text metadata) of a checkpoint, mapped from the disk where its format can be.

    Raises UserError for another kind of file, a damaged one, and a .ckpt that holds more than tensors.
    """
    if file.suffix == ".safetensors":
        return guard.load(file, "Download it again.")
    if file.suffix != ".ckpt":
        raise UserError(
            f"{file} is a file, but neither a diffusers folder nor a checkpoint that ends in {' or '.join(SUFFIXES)}. "
            "Give one of those."
        )
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format of torch < 1.6 cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{file} cannot be read ({guard.reason_of(error)}): it is damaged, or holds pickled code next to its "
            "tensors, which is not run here. Use the .safetensors form of this checkpoint."
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    if not isinstance(state, dict):
        raise UserError(f"{file} holds a {type(state).__name__} where its weights belong. Use the .safetensors form of this checkpoint.")
    found = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    for key, value in found.items():
        # A pickle can name a tensor of any size over a storage of one element.
        plain = value.layout == torch.strided and not value.is_quantized and not value.is_meta
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{file}: {short(key)} is no plain tensor. Use the .safetensors form of this checkpoint.")
    return found, {}


def kind_of(state: State, file: Path) -> str:
    """ "sd15" or "sdxl", by the names in a checkpoint. Raises UserError for any other kind of file."""

    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in state)

    folder = "convert it to a diffusers folder with diffusers' from_single_file(...).save_pretrained(FOLDER)"
    if not has(UNET_PREFIX):
        if any("lora_" in key or ".lora" in key for key in state):
            what = "LoRA weights; give the model that they belong to"
        elif has("down_blocks."):
            what = "one network in diffusers' names; give the folder of the whole pipeline"
        else:
            what = f"no UNet under {UNET_PREFIX}*, so it is no checkpoint of SD1.5 or SDXL; {folder}"
        raise UserError(f"{file} holds {what}.")
    if has("conditioner.embedders.0.model."):
        raise UserError(f"{file} is an SDXL refiner, which reflow does not train; give the base model.")
    if has("cond_stage_model.model."):
        raise UserError(f"{file} has the text encoder of SD2, whose configs do not ship with reflow; {folder}.")
    kind = "sdxl" if has(SDXL_OPEN_CLIP_PREFIX) else "sd15" if has("cond_stage_model.transformer.") else None
    missing = [name for name, there in (("text encoder", kind), ("VAE", has(VAE_PREFIX))) if not there]
    if missing:
        raise UserError(
            f"{file} holds a UNet, but no {' and no '.join(missing)}. Give a whole checkpoint, or a diffusers folder."
        )
    return str(kind)


def prediction_of(state: State, metadata: Mapping[str, str], given: str, file: Path) -> str | None:
    """prediction_type of a checkpoint: as given, else as the file says of itself (its `v_pred` key, ModelSpec or
    reflow's own metadata), else None. Raises UserError for an EDM model, whatever is given, and for a name that is not
    known unless one is given."""
    if given and given not in ("epsilon", "v_prediction"):
        raise UserError(f"The base's prediction type {given!r} is not known; write 'epsilon' or 'v_prediction'.")
    edm = [key for key in EDM_KEYS if key in state]
    if edm:
        raise UserError(
            f"{file} is an EDM model (it holds {edm[0]}), as Playground 2.5 and CosXL are, whose noise schedule is no "
            "discrete VP schedule, so it cannot be trained or sampled here; give a checkpoint of SD1.5 or SDXL that "
            "predicts epsilon or v."
        )
    student = all(key in metadata for key in STUDENT_KEYS)
    key = "prediction_type" if student else "modelspec.prediction_type"
    name = metadata.get(key, "").strip().lower()
    said = "v_prediction" if "v_pred" in state else PREDICTIONS.get(name)
    # A velocity student has no parameterisation of a base: its config's stays.
    if name and not (said or given or (student and name == "velocity")):
        raise UserError(
            f"{file} says {metadata[key]!r} as its {key}, which is not known here; if it predicts noise or v, write "
            "'epsilon' or 'v_prediction' as model.prediction_type."
        )
    if given and said and given != said:
        print(f"{file} says that it predicts {said!r}; it is read as {given!r}, as you wrote.", file=sys.stderr)
    return given or said


def read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """model_index ("pipeline"), scheduler and networks' configs of a folder, by part."""
    index = read_json(folder / "model_index.json")
    checks.check_index(index, folder / "model_index.json")
    configs = {"pipeline": index, "scheduler": read_json(folder / "scheduler" / "scheduler_config.json")}
    checks.check_schedule(configs["scheduler"], folder / "scheduler" / "scheduler_config.json")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if part in index or part != "text_encoder_2":
            configs[part] = read_json(folder / part / "config.json")
            checks.check_config(configs[part], folder / part / "config.json")
    checks.check_sizes(configs["unet"], configs["vae"], folder)
    return configs


def networks(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The networks of these configs on the meta device, by part."""
    quiet_imports()
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    makers: dict[str, Callable[[Any], Any]] = {
        "unet": UNet2DConditionModel.from_config,
        "vae": AutoencoderKL.from_config,
        "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig.from_dict(config)),
        "text_encoder_2": lambda config: CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)),
    }
    return {part: guard.on_meta(functools.partial(make, dict(configs[part])), f"The config of the {part}")
            for part, make in makers.items() if part in configs}  # fmt: skip


def _clip_name(prefix: str, state: State) -> Callable[[str], str]:
    # Some early fine-tunes lack the "text_model." that transformers had then.
    middle = "text_model." if any(key.startswith(f"{prefix}text_model.") for key in state) else ""
    return lambda key: f"{prefix}{middle}{key.removeprefix('text_model.')}"


def convert(state: State, kind: str, parts: Mapping[str, Any], file: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of every part under the names that its network has, each checked against it by name and shape."""
    result: dict[str, dict[str, torch.Tensor]] = {}
    for part, network in parts.items():
        wanted = network.state_dict()
        source: State = state
        if part == "unet":
            names = unet_names(wanted, network.config)
            foreign = sorted({key for key in state if key.startswith(UNET_PREFIX)} - set(names.values()))
            if foreign:
                raise UserError(
                    f"{file} holds {len(foreign)} UNet weights that its {kind} config does not have, the first is "
                    f"{foreign[0]}. Name a folder with the right configs as model.config (--config)."
                )
        elif part == "vae":
            names = vae_names(wanted, network.config)
        elif part == "text_encoder":
            name = _clip_name(SDXL_CLIP_PREFIX if kind == "sdxl" else SD_CLIP_PREFIX, state)
            names = {key: name(key) for key in wanted}
        else:
            source, names = _open_clip(state, network, file), {key: key.removeprefix("text_model.") for key in wanted}
        missing = [original for original in names.values() if original not in source]
        if missing:
            raise UserError(
                f"{file} lacks {len(missing)} weights of its {part}, the first is {missing[0]}. Download it again, or "
                "name a folder with the right configs as model.config (--config)."
            )
        result[part] = {}
        for key, original in names.items():
            tensor = source[original]
            if part == "vae" and wanted[key].ndim == 2 and tensor.ndim == 4:
                tensor = tensor[:, :, 0, 0]  # its attention was written with 1x1 convolutions
            if tensor.shape != wanted[key].shape:
                inpainting = original == f"{UNET_PREFIX}input_blocks.0.0.weight" and tensor.ndim == 4 and tensor.shape[1] == 9
                hint = (
                    "this is an inpainting model, whose base is trained instead: give the base, then merge"
                    if inpainting
                    else "name a folder with the right configs as model.config (--config)"
                )
                raise UserError(
                    f"{file}: {original} has shape {list(tensor.shape)}, and the {kind} config has "
                    f"{list(wanted[key].shape)}; {hint}."
                )
            result[part][key] = tensor
        guard.need_weights(((names[k], t) for k, t in result[part].items() if wanted[k].is_floating_point()), str(file))
    return result


def _open_clip(state: State, network: Any, file: Path) -> dict[str, torch.Tensor]:
    """SDXL's second text encoder by diffusers' own reading, without "text_model." in the names."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    own = {key: tensor for key, tensor in state.items() if key.startswith(SDXL_OPEN_CLIP_PREFIX)}
    config = SimpleNamespace(config=network.config)
    try:
        named = convert_open_clip_checkpoint(config, own, prefix=SDXL_OPEN_CLIP_PREFIX)
    except Exception as error:  # whatever it stumbles over in tensors of foreign shapes
        raise UserError(f"{file}: its second text encoder cannot be read ({guard.reason_of(error)}). Download it again.") from error
    return {key.removeprefix("text_model."): tensor for key, tensor in named.items()}


def find_tokenizers(folder: str, count: int, file: Path) -> list[Path | None]:
    """The folders of the tokenizers in the folder that the user names; None for an SDXL's second one that is not
    there."""
    if not folder:
        raise UserError(
            f"{file} is a single file and holds no tokenizer: name a folder that has one (a diffusers folder of the "
            "same family, or one with tokenizer/ in it) as model.tokenizer, or with --tokenizer on the command line."
        )
    root = Path(folder).expanduser()

    def whole(path: Path) -> bool:
        return any((path / name).is_file() for name in TOKENIZER_FILES)

    if whole(root / "tokenizer"):
        second = root / "tokenizer_2"
        return [root / "tokenizer", second if whole(second) else None][:count]
    if whole(root):
        return [root, None][:count]
    raise UserError(
        f"The tokenizer folder {root} has neither tokenizer/ nor {' or '.join(TOKENIZER_FILES)} in it; name the folder "
        "of a diffusers pipeline, or one that holds CLIP's tokenizer."
    )


def _write_tokenizers(found: list[Path | None], parts: Mapping[str, Any], out: Path, file: Path) -> None:
    from transformers import CLIPTokenizer

    for folder, name, encoder in zip(found, ("tokenizer", "tokenizer_2"), ("text_encoder", "text_encoder_2"), strict=False):
        if folder is None:
            # SDXL's second tokenizer is the first one, padded with "!", whose id is 0.
            CLIPTokenizer.from_pretrained(out / "tokenizer", pad_token="!").save_pretrained(out / name)
        else:
            shutil.copytree(folder, out / name, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "config.json"))
        made, config = CLIPTokenizer.from_pretrained(out / name), parts[encoder].config
        if len(made) > config.vocab_size or made.model_max_length > config.max_position_embeddings:
            raise UserError(
                f"The tokenizer in {folder or found[0]} has {len(made)} tokens and prompts of {made.model_max_length}; "
                f"the {encoder} of {file} takes {config.vocab_size} and {config.max_position_embeddings}. Name the "
                "tokenizer of this model's family."
            )


def scheduler_of(config: Mapping[str, Any], prediction: str | None, zero_snr: bool) -> dict[str, Any]:
    """The scheduler config with the file's own prediction type; zero terminal SNR needs a scheduler that knows it."""
    if prediction:
        config = {**config, "prediction_type": prediction}
    if not zero_snr:
        return dict(config)
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    fixed = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    own = {key: config[key] for key in kept if key in config}
    return {**own, **fixed, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}


def _digest(file: Path, configs: Any, tokenizers: list[Path | None], prediction: str | None) -> str:
    stat = file.stat()
    total = hashlib.sha256(json.dumps([VERSION, stat.st_size, stat.st_mtime_ns, configs, prediction]).encode())
    total.update(str(file).encode())
    for folder in tokenizers:
        for part in sorted(folder.glob("*.*")) if folder else ():
            if part.suffix in (".json", ".txt"):
                total.update(part.name.encode() + part.read_bytes())
    return total.hexdigest()[:16]


def unpack(path: str | Path, *, tokenizer: str = "", config: str = "", prediction_type: str = "") -> Path:
    """The diffusers folder of a single-file checkpoint; made at the first call, found again at every later one.

    tokenizer: a folder with CLIP's tokenizer(s). config: a folder with model_index.json, scheduler, unet, vae and
    text_encoder configs; "" takes those of SD1.5 or SDXL base that ship with the package. prediction_type: "" takes
    what the file says of itself, else the config's. Raises UserError with what does not fit and what to write.
    """
    file = Path(path).expanduser().resolve()
    state, metadata = read_checkpoint(file)
    kind = kind_of(state, file)
    source = Path(config).expanduser() if config else CONFIGS / kind
    if not source.is_dir():
        raise UserError(
            f"There is no config folder {source}; name the folder of a diffusers pipeline, or leave it out."
        )
    configs = read_configs(source)
    prediction = prediction_of(state, metadata, prediction_type, file)
    found = find_tokenizers(tokenizer, 2 if kind == "sdxl" else 1, file)
    configs["scheduler"] = scheduler_of(configs["scheduler"], prediction, "ztsnr" in state)
    index = configs["pipeline"]
    index["scheduler"] = ["diffusers", configs["scheduler"].get("_class_name", "DDIMScheduler")]
    folder = cache_folder() / "single-file" / f"{file.stem}-{_digest(file, configs, found, prediction)}"
    if folder.is_dir():
        return folder

    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The ranks of one machine meet here: one writes, the others find it done.
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                print(f"Unpacking {file.name}, once, into {folder}", file=sys.stderr, flush=True)
                _write(folder, file, state, metadata, kind, configs, found)
    except OSError as error:
        raise UserError(
            f"{file} cannot be unpacked into {folder.parent} ({error.strerror or error}); make room there, or set "
            "REFLOW_CACHE to a folder with as much room as the file takes."
        ) from error
    return folder


def _write(folder: Path, file: Path, state: State, metadata: Mapping[str, str], kind: str,
           configs: Mapping[str, Any], tokenizers: list[Path | None]) -> None:  # fmt: skip
    from reflow.weights.files import WEIGHTS, write_state

    parts = networks(configs)
    tensors = convert(state, kind, parts, file)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir()
        _write_tokenizers(tokenizers, parts, temporary, file)
        for part, network in parts.items():
            network.load_state_dict(tensors[part], strict=True, assign=True)
            if part == "unet":
                # A student's single file says how it is sampled; the folder goes on saying so.
                student = all(key in metadata for key in STUDENT_KEYS)
                network.save_config(temporary / part)
                write_state(tensors[part], temporary / part / f"{WEIGHTS}.safetensors",
                            metadata={key: metadata[key] for key in STUDENT_KEYS} if student else {})  # fmt: skip
            else:
                network.save_pretrained(temporary / part)
        (temporary / "scheduler").mkdir()
        for place, content in (
            ("model_index.json", configs["pipeline"]),
            ("scheduler/scheduler_config.json", configs["scheduler"]),
            ("source.json", {"file": str(file), "kind": kind, "bytes": file.stat().st_size}),
        ):
            (temporary / place).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
