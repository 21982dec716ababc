"""Weights of features on disk: states of single files, transformers' folders, and their sha256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from reflow.errors import UserError
from reflow.evaluation.features.needed import refuse
from reflow.quiet import quiet_imports
from reflow.weights.guard import PICKLES, load, need_weights, pickles_allowed, reason_of

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def digest_of(files: Sequence[Path]) -> str:
    """The sha256 of one file; of several, that of their names and sums, a line each in the order of the names."""
    sums = {file.name: sha256(file) for file in files}
    if len(sums) == 1:
        return next(iter(sums.values()))
    return hashlib.sha256("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()).hexdigest()


def weights_file(name: str, path: Path) -> Path:
    """The file of weights: the path itself, or the only one in the folder. Raises UserError where there is none, or several."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise refuse(name, path, "there is nothing at this path")
    files = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES and file.is_file()]
    if len(files) != 1:
        some = ", ".join(file.name for file in files[:4])
        held = f"{len(files)} files of weights ({some}), give one of them" if files else "no file of weights"
        raise refuse(name, path, f"this folder holds {held}")
    return files[0]


def need_pickles(name: str, file: Path) -> None:
    """Raises UserError unless the user allowed pickles."""
    if not pickles_allowed():
        raise UserError(
            f"--features {name}: {file} is a pickle, which can run code when it is read. {PICKLES}=1 in the environment has it read by torch's "
            "weights_only reader, which runs none; or save its tensors as .safetensors."
        )


def state_of(name: str, file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of weights, those under "state_dict" where it has such a part. Raises UserError where it cannot be read."""
    if file.suffix == ".safetensors":
        return load(file)[0]
    need_pickles(name, file)
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise refuse(name, file, f"it cannot be read ({reason_of(error)})") from error
    for part in ("state_dict", "model"):
        if isinstance(held, Mapping) and isinstance(held.get(part), Mapping):
            held = held[part]
    if not isinstance(held, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in held.values()):
        raise refuse(name, file, "it holds no state of a network")
    return dict(held)


def fill(name: str, network: torch.nn.Module, state: Mapping[str, torch.Tensor], file: Path) -> torch.nn.Module:
    """The network with these weights in fp32, in evaluation mode. Raises UserError where names or shapes differ, or numbers are not finite."""
    floats = {key: tensor for key, tensor in state.items() if tensor.is_floating_point()}
    need_weights(floats.items(), str(file))
    own = network.state_dict()
    wanted = {key for key in own if not key.endswith("num_batches_tracked")}
    missing = sorted(wanted - state.keys())
    strange = sorted(state.keys() - own.keys() - {key for key in state if key.endswith("num_batches_tracked")})
    shaped = [key for key in sorted(wanted & state.keys()) if own[key].shape != state[key].shape]
    for what, keys in (("lacks", missing), ("has beyond it", strange), ("has another shape of", shaped)):
        if keys:
            more = f" and {len(keys) - 1} more tensors" if len(keys) > 1 else ""
            raise refuse(name, file, f"it holds another network, which {what} {keys[0]}{more}")
    network.load_state_dict({key: state[key].float() if key in floats else state[key] for key in wanted}, strict=False)
    return network.eval().requires_grad_(False)


def config_of(name: str, folder: Path, model_type: str) -> dict[str, Any]:
    """A transformers folder's config.json. Raises UserError unless it is there and describes a model of this type."""
    if not folder.is_dir():
        raise refuse(name, folder, "there is no folder at this path")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise refuse(name, folder, "this folder holds no readable config.json of a transformers model") from error
    if found != model_type:
        raise refuse(name, folder, f"config.json there describes a model of type {str(found)[:40]!r}, not {model_type!r}")
    return config


def model_of(name: str, folder: Path, kind: Any, model_type: str) -> tuple[Any, str]:
    """(a transformers model in fp32, in evaluation mode; the digest of its weights). Raises UserError where the folder does not hold all of it."""
    config_of(name, folder, model_type)
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        files = sorted(folder.glob("pytorch_model*.bin"))
        if not files:
            raise refuse(name, folder, "this folder holds no model.safetensors")
        need_pickles(name, files[0])
    quiet_imports()
    try:
        how = {"local_files_only": True, "dtype": torch.float32, "output_loading_info": True}
        # Without the keyword transformers reads the .bin files that were asked for above, with torch's weights_only.
        whole = files[0].suffix == ".safetensors"
        model, told = kind.from_pretrained(folder, use_safetensors=True, **how) if whole else kind.from_pretrained(folder, **how)
    except Exception as error:
        raise refuse(name, folder, f"the model there cannot be loaded ({reason_of(error)})") from error
    # transformers fills what a file lacks with random numbers.
    if told["missing_keys"]:
        raise refuse(name, folder, f"its weights lack {sorted(told['missing_keys'])[0]}, with {len(told['missing_keys']) - 1} more tensors")
    need_weights(model.named_parameters(), str(folder))
    return model.eval().requires_grad_(False), digest_of(files)


def tokenizer_of(name: str, folder: Path, kind: Any) -> Any:
    """A tokenizer from a folder's own files. Raises UserError where they are not there."""
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json", "vocab.txt")):
        raise refuse(name, folder, f"the tokenizer's files (tokenizer.json, or vocab.json and merges.txt) are missing in {folder}")
    quiet_imports()
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise refuse(name, folder, f"the tokenizer there cannot be loaded ({reason_of(error)})") from error
