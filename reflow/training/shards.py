"""What each rank holds in fp32 and of the optimizer, one file a rank, readable on other ranks and ZeRO stages.

A shard lists its stretches of parameters by name, so any layout can be filled from any other: masters exactly, AdamW's
moments exactly, 8-bit moments by reading them in fp32 and quantising them once more, as the optimizer itself does at every step.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import pydantic
import torch
from safetensors import safe_open

from reflow.errors import UserError
from reflow.training.stored import shard_name
from reflow_kernels.adamw_reference import BLOCK

MOMENTS = (("exp_avg", "state1"), ("exp_avg_sq", "state2"))  # torch's and bitsandbytes' names of the same things


@dataclass(frozen=True)
class Piece:
    """A stretch of one parameter that a rank holds in fp32, flat.

    buffer[offset : offset+length] is parameter[start : start+length].
    """

    name: str
    buffer: int
    offset: int
    start: int
    length: int


def file_of(folder: pathlib.Path, rank: int) -> pathlib.Path:
    return folder / shard_name(rank)


def collect(masters: list[torch.Tensor], states: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A rank's masters and optimizer states, flat, under the names they have in a shard."""
    tensors = {}
    for i, (master, state) in enumerate(zip(masters, states, strict=True)):
        tensors[f"{i}.master"] = master.detach().reshape(-1)
        for key, value in state.items():
            value = value.detach().reshape(-1) if torch.is_tensor(value) else torch.tensor([value], dtype=torch.float64)
            # The buffers share one quantisation map, which a safetensors file must not.
            tensors[f"{i}.{key}"] = value.clone() if key.startswith("qmap") else value
    return tensors


def describe(pieces: list[Piece]) -> dict[str, str]:
    """The header of a shard."""
    return {"pieces": json.dumps([list(asdict(p).values()) for p in pieces])}


Number = Annotated[int, pydantic.Field(ge=0, le=2**48)]
ROWS = pydantic.TypeAdapter(list[tuple[str, Number, Number, Number, Number]], config=pydantic.ConfigDict(strict=True))


class Shards:
    """The shards of one checkpoint, mapped into memory and read piece by piece.

    Raises ValueError that names the file where one does not hold what its header tells, and OSError and SafetensorError as they come.
    """

    def __init__(self, folder: pathlib.Path, count: int) -> None:
        self.folder = folder
        self.files = [safe_open(str(file_of(folder, rank)), "pt") for rank in range(count)]
        self.keys = [set(f.keys()) for f in self.files]
        self.pieces: list[list[Piece]] = []
        self.held: dict[str, list[tuple[int, Piece]]] = {}
        for n in range(count):
            try:
                self.pieces.append(self._pieces(n))
            except pydantic.ValidationError as error:
                raise ValueError(f"{shard_name(n)}: its header holds no usable list of stretches") from error
            except ValueError as error:
                raise ValueError(f"{shard_name(n)}: {error}") from error
            for piece in self.pieces[n]:
                self.held.setdefault(piece.name, []).append((n, piece))
        for name, held in self.held.items():
            held.sort(key=lambda item: item[1].start)
            for (_, a), (n, b) in zip(held, held[1:], strict=False):
                if b.start < a.start + a.length:
                    raise ValueError(f"{shard_name(n)}: it holds values of {name} that another stretch holds too")

    def _pieces(self, shard: int) -> list[Piece]:
        """The stretches of a shard, each of which lies in buffers of the sizes and dtypes that an optimizer leaves."""
        pieces = [Piece(*row) for row in ROWS.validate_json((self.files[shard].metadata() or {}).get("pieces", ""))]
        sizes = {buffer: self._size(shard, buffer) for buffer in sorted({piece.buffer for piece in pieces})}
        for piece in pieces:
            if piece.offset + piece.length > sizes[piece.buffer]:
                raise ValueError(f"the stretch of {piece.name} ends beyond the {sizes[piece.buffer]} values of its buffer")
        return pieces

    def _size(self, shard: int, buffer: int) -> int:
        """Values in a buffer. Raises ValueError where its tensors do not belong together."""
        size = self._count(shard, f"{buffer}.master", ("F32",))
        for order, names in enumerate(MOMENTS, 1):
            name = next((n for n in names if f"{buffer}.{n}" in self.keys[shard]), names[0])
            if self._count(shard, f"{buffer}.{name}", ("F32", "U8")) != size:
                raise ValueError(f"its tensors {buffer}.master and {buffer}.{name} are not of one size")
            if name == f"state{order}" and self.files[shard].get_slice(f"{buffer}.{name}").get_dtype() == "U8" and (
                    self._count(shard, f"{buffer}.qmap{order}", ("F32",)) != BLOCK
                    or self._count(shard, f"{buffer}.absmax{order}", ("F32",)) != -(-size // BLOCK)):
                raise ValueError(f"its tensor {buffer}.{name} has a map or scales of another size")
        if self._count(shard, f"{buffer}.step", ("F32", "F64", "I64")) != 1:
            raise ValueError(f"its tensor {buffer}.step is not one number")
        return size

    def _count(self, shard: int, name: str, dtypes: tuple[str, ...]) -> int:
        """Values of a tensor that must be there, flat, in one of these dtypes."""
        if name not in self.keys[shard]:
            raise ValueError(f"it holds no tensor {name}")
        part = self.files[shard].get_slice(name)
        if len(part.get_shape()) != 1 or part.get_dtype() not in dtypes:
            raise ValueError(f"its tensor {name} is {part.get_dtype()} of shape {part.get_shape()}")
        return int(part.get_shape()[0])

    def fits(self, shard: int, pieces: list[Piece], tensors: dict[str, torch.Tensor]) -> bool:
        """Whether a shard has exactly these pieces and tensors, so that it can be copied as it is."""
        return self.pieces[shard] == pieces and self.keys[shard] == set(tensors) and all(
            self.files[shard].get_slice(key).get_shape() == list(t.shape) for key, t in tensors.items())

    def restore(self, shard: int, masters: list[torch.Tensor], states: list[dict[str, Any]]) -> None:
        """Copy a shard of the same layout: equal to the bit, padding included."""
        read = self.files[shard].get_tensor
        for i, (master, state) in enumerate(zip(masters, states, strict=True)):
            master.copy_(read(f"{i}.master").view_as(master))
            for key, value in state.items():
                put(state, key, value, read(f"{i}.{key}"))

    def convert(self, pieces: list[Piece], masters: list[torch.Tensor], states: list[dict[str, Any]],
                quantise: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> bool:
        """Fill another layout; quantise(values, map) -> (bytes, scales a block). Whether moments were quantised again."""
        again = False
        mine: dict[int, list[Piece]] = {}
        for piece in pieces:
            mine.setdefault(piece.buffer, []).append(piece)
        for i, (master, state) in enumerate(zip(masters, states, strict=True)):
            master.copy_(self.gather(mine.get(i, []), master.numel(), ("master",)).view_as(master))
            put(state, "step", state["step"], self.files[0].get_tensor("0.step"))
            for names in MOMENTS:
                key = next(name for name in names if name in state)
                values = self.gather(mine.get(i, []), master.numel(), names)
                if state[key].dtype == torch.uint8:
                    order, again = key[-1], True
                    code, scales = quantise(values.to(master.device), state[f"qmap{order}"])
                    put(state, key, state[key], code), put(state, f"absmax{order}", state[f"absmax{order}"], scales)
                else:
                    put(state, key, state[key], values)
        return again

    def gather(self, pieces: list[Piece], size: int, names: tuple[str, ...]) -> torch.Tensor:
        """A buffer [size] fp32 on the CPU with the given stretches; what no stretch covers is padding and 0."""
        buffer = torch.zeros(size)
        for piece in pieces:
            filled = 0
            for shard, other in self.held.get(piece.name, []):
                first, last = max(piece.start, other.start), min(piece.start + piece.length, other.start + other.length)
                if first < last:
                    at = other.offset + first - other.start
                    values = self.values(shard, other.buffer, names, at, at + last - first)
                    buffer[piece.offset + first - piece.start:piece.offset + last - piece.start] = values
                    filled += last - first
            if filled != piece.length:
                raise UserError(
                    f"The checkpoint {self.folder} holds {filled} of the {piece.length} values of {piece.name} that this run trains; it was "
                    f"made with another network or other trainable weights. Start with the recipe it was made with.")
        return buffer

    def values(self, shard: int, buffer: int, names: tuple[str, ...], first: int, last: int) -> torch.Tensor:
        """Elements [first, last) of a buffer's tensor under one of its names, fp32; 8-bit states by their map and scales."""
        name = next(n for n in names if f"{buffer}.{n}" in self.keys[shard])
        part = self.files[shard].get_slice(f"{buffer}.{name}")[first:last]
        if part.dtype != torch.uint8:
            return part
        code = self.files[shard].get_tensor(f"{buffer}.qmap{name[-1]}")
        scales = self.files[shard].get_slice(f"{buffer}.absmax{name[-1]}")[first // BLOCK:(last - 1) // BLOCK + 1]
        return code[part.long()] * scales[torch.arange(first, last) // BLOCK - first // BLOCK]


def put(state: dict[str, Any], key: str, now: Any, value: torch.Tensor) -> None:
    """Set an optimizer's state, in place where it is a tensor."""
    if torch.is_tensor(now):
        now.copy_(value.view_as(now))
    else:
        state[key] = type(now)(value.item())


def blockwise(values: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise [N] fp32 by a map of 256 values, as bitsandbytes' optimizers do."""
    from bitsandbytes.functional import quantize_blockwise
    quantised, state = quantize_blockwise(values, code=code, blocksize=BLOCK)
    return quantised, state.absmax
