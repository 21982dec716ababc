"""Checkpoints that become visible only when whole, and the files of a run directory."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file

from reflow.errors import UserError
from reflow.training import shards
from reflow.training.ema import Ema
from reflow.training.engine import Engine
from reflow.weights.files import save_tensors
from reflow.weights.runs import checkpoint_name

LATEST = "latest"


def write_atomic(path: pathlib.Path, text: str) -> None:
    """Write a small file so that a reader sees the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    with open(temporary) as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def save_weights(state: dict[str, torch.Tensor], path: pathlib.Path, metadata: dict[str, str]) -> None:
    """A safetensors file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_tensors({k: v.contiguous() for k, v in state.items()}, temporary, metadata)
        with open(temporary) as handle:
            os.fsync(handle.fileno())  # network file systems say only now that they are full
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def together(what: str, advice: str, action: Callable[[], None]) -> None:
    """Write on every rank that has to. A file that one of them cannot write ends all of them with the same sentence."""
    said: list[str | None] = [None] * dist.get_world_size()
    try:
        action()
        mine = None
    except (OSError, SafetensorError) as error:
        mine = f"rank {dist.get_rank()}: {error}"
    dist.all_gather_object(said, mine)
    failed = [text for text in said if text]
    if failed:
        raise UserError(f"{what} could not be written ({'; '.join(failed)}). {advice}")


class Checkpoints:
    """run_dir/checkpoints: one folder a checkpoint and a file `latest` that names the newest whole one. All ranks call every method."""

    def __init__(self, run_dir: pathlib.Path, keep: int) -> None:
        self.run_dir, self.folder, self.keep = run_dir, run_dir / "checkpoints", keep

    def latest(self) -> pathlib.Path | None:
        """The newest checkpoint, or None before the first. Raises UserError where `latest` names a damaged one."""
        pointer = self.folder / LATEST
        if not pointer.exists():
            return None
        path = self.folder / pointer.read_text().strip()
        if not whole(path):
            others = sorted(p.name for p in self.folder.glob("stage-*") if whole(p) and p != path)
            raise UserError(f"{pointer} names '{path.name}', which is missing or not whole; write the name of another checkpoint into that "
                            f"file ({', '.join(others) or 'there is none: remove the folder ' + str(self.folder) + ' to start over'}).")
        return path

    def save(self, engine: Engine, ema: Ema, telemetry: dict[str, torch.Tensor], stage: int, step: int, samples: int) -> pathlib.Path:
        """Write stage-<number, from 1>-<samples> for stage `stage` (from 0); the folder gets its name, and `latest` its new content, after every rank has finished."""
        rank, tag = dist.get_rank(), checkpoint_name(self.run_dir, stage, samples)
        before = (self.folder / LATEST).read_text() if (self.folder / LATEST).exists() else "the start"
        working, final = self.folder / f".{tag}.tmp", self.folder / tag
        contents = engine.contents()
        needed = sum(t.nbytes for t in (contents or {}).values()) * (dist.get_world_size() if engine.stage else 1)
        size = (needed + 4 * sum(s.numel() for s in engine.shapes.values())) / 1e9
        advice = (f"Make room under {self.folder} (a checkpoint takes about {size:.2g} GB, checkpoint.keep = {self.keep} stay) and run the "
                  f"same command: it goes on from {before}.")

        def begin() -> None:
            for old in self.folder.glob(".stage-*.tmp"):
                shutil.rmtree(old, ignore_errors=True)
            working.mkdir(parents=True)

        def write() -> None:
            if contents is not None:
                save_weights(contents, shards.file_of(working, rank), shards.describe(engine.pieces))
            save_weights(telemetry, working / f"telemetry-{rank}.safetensors", {})

        def finish(averages: dict[str, torch.Tensor]) -> None:
            save_weights(averages, working / "ema.safetensors", {})
            state = {"stage": stage, "step": step, "samples": samples, "ranks": dist.get_world_size(),
                     "shards": dist.get_world_size() if engine.stage else 1, "zero_stage": engine.stage}
            write_atomic(working / "state.json", json.dumps(state))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(working, final)
            write_atomic(self.folder / LATEST, tag)
            self._prune()

        try:
            together(f"The checkpoint {final}", advice, begin if rank == 0 else lambda: None)
            together(f"The checkpoint {final}", advice, write)
            averages = engine.state(ema.average)
            together(f"The checkpoint {final}", advice, (lambda: finish(averages)) if rank == 0 else lambda: None)
        except UserError:
            if rank == 0:
                shutil.rmtree(working, ignore_errors=True)
            raise
        return final

    def _prune(self) -> None:
        found = sorted((p for p in self.folder.glob("stage-*") if p.is_dir()),
                       key=lambda p: tuple(int(x) for x in p.name.split("-")[1:]))
        for old in found[:-self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self, path: pathlib.Path, engine: Engine, ema: Ema) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Put the engine and the EMA where the checkpoint was, whatever wrote it. Returns its state (with 'how', see Engine.load) and what
        this rank's telemetry starts from: its own on as many ranks as before, else all of it on rank 0."""
        state = json.loads((path / "state.json").read_text())
        try:
            state["how"] = engine.load(path)
            engine.scatter(load_file(str(path / "ema.safetensors")), ema.average)
            told = [load_file(str(path / f"telemetry-{rank}.safetensors")) for rank in range(state["ranks"])]
        except (OSError, SafetensorError) as error:
            raise UserError(f"The checkpoint {path} is damaged ({error}); remove that folder and write the name of the one before it into "
                            f"{self.folder / LATEST}.") from error
        return state, told[dist.get_rank()] if state["ranks"] == dist.get_world_size() else share(told)


def whole(path: pathlib.Path) -> bool:
    """Whether a folder holds all the files of a checkpoint."""
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, json.JSONDecodeError):
        return False
    ranks = range(state.get("shards", 1))
    return (path / "ema.safetensors").is_file() and all(shards.file_of(path, rank).is_file() for rank in ranks)


def share(told: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Sums and first bad step of all ranks for rank 0; nothing yet for the others."""
    every = {key: torch.stack([t[key] for t in told]) for key in told[0]}
    if dist.get_rank():
        return {key: torch.full_like(t[0], -1 if key == "bad_step" else 0) for key, t in every.items()}
    return {key: t.max(0).values if key == "bad_step" else t.sum(0) for key, t in every.items()}
