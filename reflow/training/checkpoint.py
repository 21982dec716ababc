"""Checkpoints that become visible only when whole, and the files of a run directory."""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file

from reflow.errors import UserError
from reflow.outputs import of_the_system, write_text, written
from reflow.training import shards, stored
from reflow.training.ema import Ema
from reflow.training.engine import Engine
from reflow.training.stored import State
from reflow.weights import sums
from reflow.weights.files import save_tensors
from reflow.weights.runs import checkpoint_name, checkpoint_place

T = TypeVar("T")


def save_weights(state: dict[str, torch.Tensor], path: pathlib.Path, metadata: dict[str, str]) -> str:
    """A safetensors file that appears whole or not at all, with checksums of what is in it. Returns their digest; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ready = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    metadata = sums.with_sums(ready, metadata)
    with written(path) as temporary:
        save_tensors(ready, temporary, metadata)
    return sums.digest(metadata)


def together(what: str, advice: str, action: Callable[[], T]) -> list[T]:
    """Write on every rank that has to. A file that one of them cannot write ends all of them with the same sentence. What each returned."""
    said: list[Any] = [None] * dist.get_world_size()
    try:
        mine: tuple[T | None, str | None] = action(), None
    except (OSError, SafetensorError) as error:
        system = of_the_system(error)
        mine = None, f"rank {dist.get_rank()}: {(system and system.strerror) or error}"
    dist.all_gather_object(said, mine)
    failed = [text for _, text in said if text]
    if failed:
        raise UserError(f"{what} could not be written ({'; '.join(failed)}). {advice}")
    return [result for result, _ in said]


def by_first(action: Callable[[], T]) -> T:
    """What rank 0 finds, on all ranks, which on a network folder may see different things. Its UserError is raised on all of them."""
    said: list[Any] = [None] * dist.get_world_size()
    mine: tuple[T | None, str | None] = None, None
    if dist.get_rank() == 0:
        try:
            mine = action(), None
        except UserError as error:
            mine = None, str(error)
        except OSError as error:
            mine = None, f"{error}; look at that place, then give the same command again."
    dist.all_gather_object(said, mine)
    if said[0][1] is not None:
        raise UserError(said[0][1])
    return said[0][0]


class Checkpoints:
    """run_dir/checkpoints: one folder a checkpoint and a file `latest` that names the newest whole one. All ranks call every method."""

    def __init__(self, run_dir: pathlib.Path, keep: int) -> None:
        self.run_dir, self.folder, self.keep = run_dir, run_dir / "checkpoints", keep

    def latest(self) -> pathlib.Path | None:
        """The newest checkpoint, or None before the first. Raises UserError where that one is damaged, naming others."""
        return by_first(lambda: stored.newest(self.folder))

    def last_good(self) -> str:
        """The newest checkpoint in words, for a sentence about something else."""
        try:
            return str(self.latest() or "none")
        except UserError:
            return f"none that {self.folder / stored.LATEST} names"

    def save(self, engine: Engine, ema: Ema, telemetry: dict[str, torch.Tensor], stage: int, step: int, samples: int) -> pathlib.Path:
        """Write stage-<number, from 1>-<samples> for stage `stage` (from 0); the folder gets its name, and `latest` its new content, after every rank has finished."""
        rank, tag = dist.get_rank(), checkpoint_name(self.run_dir, stage, samples)
        final = self.folder / tag
        working = stored.working(final)
        contents = engine.contents()
        needed = sum(t.nbytes for t in (contents or {}).values()) * (dist.get_world_size() if engine.stage else 1)
        size = (needed + 4 * sum(s.numel() for s in engine.shapes.values())) / 1e9
        what = f"The checkpoint {final}"
        advice = (f"Make room under {self.folder} (a checkpoint takes about {size:.2g} GB, checkpoint.keep = {self.keep} stay) and run the "
                  f"same command: it goes on from {by_first(lambda: stored.named(self.folder)) or 'the start'}.")

        def begin() -> None:
            if not (self.run_dir / "recipe.toml").exists():  # not made anew: it may be a network folder that went away
                raise FileNotFoundError(errno.ENOENT, "the run directory is gone", str(self.run_dir))
            for old in self.folder.glob(".stage-*.tmp"):
                shutil.rmtree(old, ignore_errors=True)
            working.mkdir(parents=True)

        def write() -> dict[str, str]:
            said = {}
            if contents is not None:
                said[stored.shard_name(rank)] = save_weights(contents, shards.file_of(working, rank), shards.describe(engine.pieces))
            said[stored.telemetry_name(rank)] = save_weights(telemetry, working / stored.telemetry_name(rank), {})
            return said

        def finish(averages: dict[str, torch.Tensor], files: dict[str, str]) -> None:
            files[stored.AVERAGES] = save_weights(averages, working / stored.AVERAGES, {})
            state = State.model_construct(stage=stage, step=step, samples=samples, ranks=dist.get_world_size(), zero_stage=engine.stage,
                                          shards=dist.get_world_size() if engine.stage else 1, files=files)
            write_text(working / stored.STATE, state.text())
            shutil.rmtree(final, ignore_errors=True)  # a kill here leaves `latest` with the whole working folder, see stored.newest
            os.replace(working, final)
            write_text(self.folder / stored.LATEST, tag)
            stored.prune(self.folder, tag, self.keep)

        try:
            together(what, advice, begin if rank == 0 else lambda: None)
            files = {name: told for said in together(what, advice, write) for name, told in said.items()}
            averages = engine.state(ema.average)
            together(what, advice, (lambda: finish(averages, files)) if rank == 0 else lambda: None)
        except UserError:
            if rank == 0:
                shutil.rmtree(working, ignore_errors=True)
            raise
        return final

    def load(self, path: pathlib.Path, engine: Engine, ema: Ema,
             telemetry: dict[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Put the engine and the EMA where the checkpoint was, whatever wrote it. Returns its state (with 'how', see Engine.load) and what
        this rank's telemetry, which looks like `telemetry`, starts from: its own on as many ranks as before, else all of it on rank 0.

        Every byte is verified before anything is set. Raises UserError that names what is damaged, and another checkpoint.
        """
        state = self._agreed(path, lambda: self._verified(path))
        engine_state = self._agreed(path, lambda: shards.Shards(path, state.shards))
        averages = self._agreed(path, lambda: load_file(path / stored.AVERAGES))
        told = self._agreed(path, lambda: [like(telemetry, path / stored.telemetry_name(rank)) for rank in range(state.ranks)])
        wrong = next((n for n, shape in engine.shapes.items() if n not in averages or averages[n].shape != shape), None)
        if wrong is not None:
            raise UserError(f"The checkpoint {path} holds no average of {wrong} as this run trains it; it was made with another network or other "
                            f"trainable weights. Start with the recipe it was made with.")
        how = engine.load(engine_state)
        engine.scatter(averages, ema.average)
        if dist.get_rank() == 0:
            stored.prune(self.folder, path.name, self.keep, later=False)  # a kill after the last one was written left one too many
        mine = told[dist.get_rank()] if state.ranks == dist.get_world_size() else share(told)
        return {**state.model_dump(include={"stage", "step", "samples", "ranks", "zero_stage"}), "how": how}, mine

    def _verified(self, path: pathlib.Path) -> State:
        """The state of a checkpoint of whose files this rank has read its share, byte by byte. Raises ValueError."""
        state = stored.read(path)
        if (state.stage, state.samples) != checkpoint_place(path):
            raise ValueError(f"{stored.STATE}: it tells of stage {state.stage + 1} after {state.samples} samples")
        stored.verify(path, state, dist.get_rank(), dist.get_world_size())
        return state

    def _agreed(self, path: pathlib.Path, action: Callable[[], T]) -> T:
        """What this rank finds in a checkpoint. Where one of them cannot read it all end with the same sentence."""
        said: list[Any] = [None] * dist.get_world_size()
        result, mine = None, None
        try:
            result = action()
        except stored.BROKEN as error:
            mine = str(error)
        dist.all_gather_object(said, mine)
        wrong = next((text for text in said if text), None)
        if wrong is not None:
            raise UserError(f"The checkpoint {path} is damaged ({wrong}); {by_first(lambda: stored.cure(self.folder, path))}.")
        return result


def like(wanted: dict[str, torch.Tensor], file: pathlib.Path) -> dict[str, torch.Tensor]:
    """The file's tensors, where they are of the wanted names, shapes and dtypes. Raises ValueError elsewhere."""
    state = load_file(file)
    if {k: (t.shape, t.dtype) for k, t in state.items()} != {k: (t.shape, t.dtype) for k, t in wanted.items()}:
        raise ValueError(f"{file.name}: it holds other sums than this run's windows need")
    return state


def share(told: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Sums and first bad step of all ranks for rank 0; nothing yet for the others."""
    every = {key: torch.stack([t[key] for t in told]) for key in told[0]}
    if dist.get_rank():
        return {key: torch.full_like(t[0], -1 if key == "bad_step" else 0) for key, t in every.items()}
    return {key: t.max(0).values if key == "bad_step" else t.sum(0) for key, t in every.items()}
