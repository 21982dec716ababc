"""Weights on disk: reading a UNet's state wherever it lies, and writing one so that no half-written file is ever
found."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reflow.errors import UserError
from reflow.outputs import check_output

State = Mapping[str, torch.Tensor]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WEIGHTS = "diffusion_pytorch_model"


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """ "fp32", "fp16" or "bf16" as a torch dtype; a dtype passes through. Raises UserError for any other name."""
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not known; use one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def cast(state: State, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The state with every floating-point tensor in ``dtype`` (None: as it is), contiguous and on the CPU; integers
    stay integers."""
    return {
        key: (t if dtype is None or not t.is_floating_point() else t.to(dtype)).detach().cpu().contiguous()
        for key, t in state.items()
    }


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one diffusers UNet folder: whole, sharded, an fp16 variant, or the only other variant
    (published PeRFlow deltas are "v0-1"); [] if there are none. Raises UserError for several others."""
    for variant in ("", ".fp16"):
        index = folder / f"{WEIGHTS}.safetensors.index{variant}.json"
        whole = folder / f"{WEIGHTS}{variant}.safetensors"
        if whole.exists():
            return [whole]
        if index.exists():
            return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    others = sorted(file for file in folder.glob(f"{WEIGHTS}.*.safetensors") if "-of-" not in file.name)
    if len(others) > 1:
        raise UserError(f"{folder} holds {len(others)} variants ({_names(others)}); give one of these files.")
    return others


def _names(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files)


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except Exception as error:
        raise UserError(f"{file} is missing, damaged or cut short ({error}). Write or download it again.") from error


def read_state(source: str | Path | State) -> dict[str, torch.Tensor]:
    """A state dict from a .safetensors file, a diffusers UNet folder or a whole pipeline folder; a mapping passes
    through.

    Raises UserError where nothing readable lies there.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{path} is not a .safetensors file; only safetensors weights are read.")
        return _load(path)
    for folder in (path, path / "unet"):
        files = weight_files(folder)
        if files:
            return {key: tensor for file in files for key, tensor in _load(file).items()}
    raise UserError(
        f"{path} holds no UNet weights: expected a .safetensors file, a folder with {WEIGHTS}.safetensors, or a "
        "diffusers pipeline folder with such a file under unet/."
    )


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata of a .safetensors file; {} if it has none."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:
        raise UserError(f"{path} cannot be read as a .safetensors file ({error}).") from error


def refuse_existing(path: Path) -> None:
    """Raises UserError if a file, or a folder that is not empty, is already there, or if nothing can be written there."""
    if path.is_file() or path.is_symlink() or (path.is_dir() and any(path.iterdir())):
        raise UserError(
            f"{path} already exists; nothing was written. Choose another name, or move the old one away first."
        )
    check_output(path)


def write_state(
    state: State, path: str | Path, *, dtype: str | torch.dtype | None = None, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a .safetensors file under a temporary name, then rename it. Raises UserError if ``path`` exists or has
    another suffix."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} must end in .safetensors.")
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(
            cast(state, None if dtype is None else dtype_of(dtype)),
            temporary,
            metadata={"format": "pt", **(metadata or {})},
        )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
