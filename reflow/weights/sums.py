"""Checksums in the header of a safetensors file, one a tensor, so that a byte that changed on disk is found where the file is read.

They find damage, not malice: whoever writes a file can write its checksums too.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

KEY = "checksums"
HEADER = ""  # stands for the other metadata among the names of tensors


def checksum(name: str, tensor: torch.Tensor) -> str:
    """CRC-32 of a tensor's name, dtype, shape and bytes, as 8 hex digits."""
    said = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
    return f"{zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, said):08x}"


def header_checksum(metadata: Mapping[str, str]) -> str:
    """CRC-32 of a file's metadata without its checksums."""
    return f"{zlib.crc32(json.dumps({k: v for k, v in metadata.items() if k != KEY}, sort_keys=True).encode()):08x}"


def with_sums(state: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with the checksums of the state's tensors and of the metadata itself."""
    sums = {HEADER: header_checksum(metadata), **{name: checksum(name, state[name]) for name in sorted(state)}}
    return {**metadata, KEY: json.dumps(sums)}


def digest(metadata: Mapping[str, str]) -> str:
    """One word for a file with checksums: two of equal digests hold the same."""
    return f"{zlib.crc32(metadata[KEY].encode()):08x}"


def verify(file: Path, *, needed: str | None = None, finite: bool = False) -> None:
    """Read a file once, tensor by tensor, beside its checksums. A file without any passes, unless `needed` tells the digest it must have.

    finite: refuse numbers that are not. Raises ValueError saying what differs, and OSError and SafetensorError as the file has them.
    """
    with safe_open(str(file), framework="pt") as opened:
        metadata = opened.metadata() or {}
        told = None
        if KEY in metadata or needed is not None:
            told = _sums_of(metadata)
            if needed is not None and digest(metadata) != needed:
                raise ValueError("it is another file than the one that was written here")
            if told.get(HEADER) != header_checksum(metadata):
                raise ValueError("its header's checksum differs from the one it was written with")
            if set(told) - {HEADER} != set(opened.keys()):
                raise ValueError("its tensors are not those that its checksums name")
        for name in sorted(opened.keys()) if told is not None or finite else ():
            tensor = opened.get_tensor(name)
            if told is not None and told[name] != checksum(name, tensor):
                raise ValueError(f"the checksum of its tensor {name} differs from the one it was written with")
            if finite and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"its tensor {name} holds numbers that are not finite")


def _sums_of(metadata: Mapping[str, str]) -> dict[str, str]:
    try:
        told = json.loads(metadata[KEY])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError("its header holds no readable checksums") from error
    if not isinstance(told, dict):
        raise ValueError("its header holds no readable checksums")
    return told
