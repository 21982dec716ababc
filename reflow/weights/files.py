"""Weights on disk: reading a UNet's state wherever it lies, and writing one so that no half-written file is ever
found."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from reflow.errors import UserError, quote, short
from reflow.outputs import check_output, written
from reflow.weights.guard import CONVERT, load, need_weights, opened

State = Mapping[str, torch.Tensor]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WEIGHTS = "diffusion_pytorch_model"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
SHARD = re.compile(r"-\d+-of-\d+(?=\.|$)")  # in a file's stem


def public_name(path: str | Path) -> str:
    """What cards and metadata, which are passed on, say of a file or folder here: its own name, without the folders
    around it. The name of a hub repository stays."""
    if HUB_NAME.fullmatch(str(path)) and not Path(path).exists():
        return str(path)
    return os.path.basename(os.path.abspath(os.path.expanduser(path))) or str(path)


def make_folder(folder: Path) -> None:
    """Make a folder to write into, and those around it. Raises UserError where the file system does not let it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The folder {folder} cannot be made ({error.strerror or error}); choose another place to write to."
        ) from error


def save_tensors(state: State, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """safetensors' save_file, with the access rights that any new file gets here: it makes files of its own that
    nobody but their owner can read. Equal tensors and metadata make equal files."""
    path.touch()
    rights = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(state), str(path), metadata=None if metadata is None else dict(metadata))
    if stat.S_IMODE(path.stat().st_mode) != rights:
        path.chmod(rights)
    if metadata is not None and len(metadata) > 1:
        _order_header(path)


def _order_header(path: Path) -> None:
    """Sort the metadata in a safetensors file's header, which the library writes in another order every time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:  # the same entries in the same words take the same place
            raise ValueError(f"the header of {path} grew from {size} to {len(text)} bytes when it was sorted")
        file.seek(8)
        file.write(text.ljust(size))


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


def variant_of(name: str) -> str:
    """The variant in the name of a weight file, of a shard or of an index, "" for none: "v0-fix" of
    model.v0-fix.safetensors, model.v0-fix-00001-of-00002.safetensors and model.safetensors.index.v0-fix.json."""
    _, index, rest = name.partition(".index.")
    if index:
        return rest.removesuffix("json").removesuffix(".")
    return SHARD.sub("", Path(name).stem).partition(".")[2]


def choose_variant(names: Iterable[str], where: str | Path) -> str:
    """The variant to read of a folder that holds weights of these names: none, else fp16, else the only other
    (published PeRFlow weights are "v0-1" and "v0-fix"). Raises UserError for several others."""
    by_variant: dict[str, str] = {}
    for name in sorted(names):
        by_variant.setdefault(variant_of(name), name)
    for variant in ("", "fp16"):
        if variant in by_variant or not by_variant:
            return variant
    if len(by_variant) > 1:
        raise UserError(
            f"{where} holds {len(by_variant)} variants ({', '.join(by_variant.values())}); give one of these files, or "
            "leave only one in the folder."
        )
    return next(iter(by_variant))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one diffusers UNet folder, whole or sharded, of the variant that `choose_variant` takes;
    [] if there are none. Raises UserError for several variants."""
    names = [file.name for file in folder.glob(f"{WEIGHTS}.*") if not SHARD.search(file.stem)]
    names = [name for name in names if name.endswith(".safetensors") or f"{WEIGHTS}.safetensors.index." in name]
    if not names:
        return []
    dot = f".{variant}" if (variant := choose_variant(names, folder)) else ""
    whole = f"{WEIGHTS}{dot}.safetensors"
    if whole in names:
        return [folder / whole]
    index = folder / f"{WEIGHTS}.safetensors.index{dot}.json"
    return [folder / name for name in shard_names(index)]


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards names, each beside it. Raises UserError for an index that cannot be read or leads elsewhere."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UserError(f"{index} is no readable index of shards ({short(repr(error))}). Write or download it again.") from error
    foreign = [name for name in names if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(".safetensors")]
    if foreign or not names:
        what = f"names {quote(foreign[0])}, which is no .safetensors file beside it" if foreign else "names no shard"
        raise UserError(f"{index} {what}. Write or download it again.")
    return names


def _must_be_safetensors(file: Path) -> None:
    if file.suffix != ".safetensors":
        raise UserError(f"{file} is not a .safetensors file; only safetensors weights are read. {CONVERT}")


def refuse_pickles(folder: Path) -> None:
    """Raises UserError where a UNet's or a pipeline's folder holds its weights as pickles alone."""
    pickles = [file for place in (folder, folder / "unet") for file in sorted(place.glob(f"{WEIGHTS}*.bin"))]
    if pickles:
        raise UserError(f"{folder} holds {pickles[0].name} and no .safetensors weights. {CONVERT}")


def _weights(files: list[Path]) -> dict[str, torch.Tensor]:
    state = {}
    for file in files:
        tensors, _ = load(file)
        need_weights(tensors.items(), str(file))
        state.update(tensors)
    return state


def read_state(source: str | Path | State) -> dict[str, torch.Tensor]:
    """A state dict from a .safetensors file, a diffusers UNet folder or a whole pipeline folder; a mapping passes
    through.

    Raises UserError where nothing readable lies there, and for tensors that are no finite floating-point weights.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    if path.is_file():
        _must_be_safetensors(path)
        return _weights([path])
    for folder in (path, path / "unet"):
        files = weight_files(folder)
        if files:
            return _weights(files)
    refuse_pickles(path)
    raise UserError(
        f"{path} holds no UNet weights: expected a .safetensors file, a folder with {WEIGHTS}.safetensors, or a "
        "diffusers pipeline folder with such a file under unet/."
    )


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata of a .safetensors file; {} if it has none. Raises UserError for another or a damaged file."""
    _must_be_safetensors(Path(path))
    with opened(path) as file:
        return dict(file.metadata() or {})


def refuse_existing(path: Path) -> None:
    """Raises UserError if a file, or a folder with something in it, is already there, or none can be written there."""
    if path.is_file() or path.is_symlink() or (path.is_dir() and any(path.iterdir())):
        raise UserError(
            f"{path} already exists; nothing was written. Choose another name, or move the old one away first."
        )
    check_output(path)


def write_state(
    state: State, path: str | Path, *, dtype: str | torch.dtype | None = None, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a .safetensors file that appears whole or not at all. Raises UserError if ``path`` exists or has another
    suffix, and OSError that names it where the system refuses it."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} must end in .safetensors.")
    refuse_existing(path)
    make_folder(path.parent)
    ready = cast(state, None if dtype is None else dtype_of(dtype))
    with written(path) as temporary:
        save_tensors(ready, temporary, {"format": "pt", **(metadata or {})})
    return path
