"""Checkpoints as they lie on disk: which there are, which are whole, which one is named. Nothing here needs an engine or other ranks."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import zlib
from typing import Annotated

import pydantic
from safetensors import SafetensorError

from reflow.errors import UserError, printable
from reflow.weights import sums

LATEST, STATE, AVERAGES = "latest", "state.json", "ema.safetensors"
NAME = re.compile(r"stage-\d{1,6}-\d{9,15}", re.ASCII)
BROKEN = (OSError, SafetensorError, ValueError)  # what a file that cannot be used raises where it is read
LONGEST = 1 << 24  # bytes of a state; a run of 10,000 ranks takes a tenth of that
Count = Annotated[int, pydantic.Field(ge=0, le=10**15)]
Ranks = Annotated[int, pydantic.Field(ge=1, le=2**16)]


class State(pydantic.BaseModel):
    """state.json of a checkpoint: where the run stands, how many ranks wrote it, and the digest of every other file in the folder.

    Checkpoints of versions before have neither files nor checksum.
    """

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    stage: Count
    step: Count
    samples: Count
    ranks: Ranks
    shards: Ranks = 1
    zero_stage: Annotated[int, pydantic.Field(ge=0, le=3)] = 0
    files: dict[str, str] | None = None
    checksum: str | None = None

    @pydantic.model_validator(mode="after")
    def _agrees(self) -> State:
        if self.shards != (self.ranks if self.zero_stage else 1):
            raise ValueError(f"{self.shards} shards are not what {self.ranks} ranks leave at ZeRO stage {self.zero_stage}")
        if self.files is not None and set(self.files) != set(self.names()):
            raise ValueError("the files it lists are not those of a checkpoint")
        if (self.files is None) != (self.checksum is None) or self.checksum not in (None, self.sum()):
            raise ValueError("its checksum differs from the one it was written with")
        return self

    def names(self) -> list[str]:
        """The other files of the folder."""
        return [shard_name(r) for r in range(self.shards)] + [telemetry_name(r) for r in range(self.ranks)] + [AVERAGES]

    def sum(self) -> str:
        """CRC-32 of all entries but itself."""
        return f"{zlib.crc32(json.dumps(self.model_dump(exclude={'checksum'}), sort_keys=True).encode()):08x}"

    def text(self) -> str:
        """The state with its checksum, as the file has it."""
        return json.dumps({**self.model_dump(exclude={"checksum"}), "checksum": self.sum()})


def shard_name(rank: int) -> str:
    return f"shard-{rank:05d}.safetensors"


def telemetry_name(rank: int) -> str:
    return f"telemetry-{rank}.safetensors"


def working(path: pathlib.Path) -> pathlib.Path:
    """The folder that a checkpoint is written in before it gets its name."""
    return path.with_name(f".{path.name}.tmp")


def read(folder: pathlib.Path) -> State:
    """The state of a checkpoint all of whose files are there. Raises ValueError that says what is wrong with the folder."""
    try:
        with open(folder / STATE, "rb") as file:
            state = State.model_validate_json(file.read(LONGEST))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"is not whole: its {STATE} cannot be used ({where + ': ' if where else ''}{printable(first['msg'])[:200]})") from error
    except OSError as error:
        raise ValueError(f"is missing or not whole: {STATE}: {error.strerror}" if folder.is_dir() else "is missing") from error
    missing = [name for name in state.names() if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"is not whole: it lacks {missing[0]}{f' and {len(missing) - 1} other files' if missing[1:] else ''}")
    return state


def whole(folder: pathlib.Path) -> bool:
    """Whether a folder holds all the files of a checkpoint. What is in them is verified where they are read."""
    try:
        read(folder)
    except ValueError:
        return False
    return True


def found(folder: pathlib.Path) -> list[pathlib.Path]:
    """All checkpoints by their names, whole or not, in the order of stages and samples."""
    try:
        names = [name for name in os.listdir(folder) if NAME.fullmatch(name)]
    except OSError:
        return []
    return [folder / name for name in sorted(names, key=place)]


def place(name: str) -> tuple[int, int]:
    """(number of the stage, samples) in a checkpoint's name."""
    _, stage, samples = name.split("-")
    return int(stage), int(samples)


def named(folder: pathlib.Path) -> str | None:
    """The checkpoint's name in `latest`, None where there is no such file. Raises UserError where it holds something else."""
    pointer = folder / LATEST
    try:
        with open(pointer, "rb") as file:
            text = file.read(200).decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{pointer} cannot be read ({error.strerror}); {cure(folder, None)}.") from error
    if not NAME.fullmatch(text):
        shown = printable(text.replace("\n", " ")[:60])
        raise UserError(f"{pointer} names no checkpoint but holds '{shown}'; {cure(folder, None)}.")
    return text


def verify(folder: pathlib.Path, state: State, rank: int = 0, world: int = 1) -> None:
    """Read this rank's share of a checkpoint's files byte by byte. Raises ValueError that names the one that is damaged and says how."""
    for name in state.names()[rank::world]:
        try:
            sums.verify(folder / name, needed=(state.files or {}).get(name), finite=not name.startswith("telemetry"))
        except BROKEN as error:
            raise ValueError(f"{name}: {error}") from error


def cure(folder: pathlib.Path, bad: pathlib.Path | None) -> str:
    """What to do where the newest checkpoint `bad` cannot be used, in words. The one that it names has been verified."""
    for path in reversed(found(folder)):
        with contextlib.suppress(ValueError):
            if path != bad:
                verify(path, read(path))
                return f"write {path.name}, which is whole, into {folder / LATEST}"
    return f"there is no other whole one: remove the folder {folder} to start its stage over"


def newest(folder: pathlib.Path) -> pathlib.Path | None:
    """The checkpoint that a run goes on from, None before the first; one process calls it. Raises UserError where that one is damaged.

    A kill between the last steps of writing one is mended here: the folder is whole before it gets its name, and has its name
    before `latest` tells it. What a kill left half written or half removed goes.
    """
    path = _newest(folder)
    for left in folder.glob(".stage-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    return path


def _newest(folder: pathlib.Path) -> pathlib.Path | None:
    name = named(folder)
    if name is None:
        there = found(folder)
        path = next((path for path in reversed(there) if whole(path)), None)
        if there and path is None:
            raise UserError(f"{folder} holds no file {LATEST} and no whole checkpoint; {cure(folder, None)}.")
        return path
    path = folder / name
    try:
        read(path)
    except ValueError as error:
        if not whole(working(path)):
            raise UserError(f"{folder / LATEST} names '{name}', which {error}; {cure(folder, path)}.") from error
        shutil.rmtree(path, ignore_errors=True)
        os.replace(working(path), path)
    return path


def prune(folder: pathlib.Path, kept: str, keep: int, later: bool = True) -> None:
    """Remove old checkpoints: `kept`, which is whole, and the `keep` - 1 whole ones before it stay, as does what has another name.

    Those of later places are from an earlier pass over the stage and go first, unless they are not to be touched (`later`).
    """
    order = sorted((path for path in found(folder) if later or place(path.name) <= place(kept)),
                   key=lambda path: (place(path.name) <= place(kept), place(path.name)))
    whole_ones = [path for path in order if path.name == kept or whole(path)][-keep:]
    for path in order[:order.index(whole_ones[0])]:
        with contextlib.suppress(OSError):
            # First its name: a kill leaves nothing that looks like a checkpoint and is none.
            shutil.rmtree(working(path), ignore_errors=True)
            os.replace(path, working(path))
            shutil.rmtree(working(path))
