"""Checkpoints that become visible only when whole, and the files of a run directory."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from reflow.errors import UserError
from reflow.training.ema import Ema
from reflow.training.engine import Engine

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
    save_file({k: v.contiguous() for k, v in state.items()}, str(temporary), metadata)
    os.replace(temporary, path)


class Checkpoints:
    """run_dir/checkpoints: one folder a checkpoint and a file `latest` that names the newest whole one. All ranks call every method."""

    def __init__(self, run_dir: pathlib.Path, keep: int) -> None:
        self.folder, self.keep = run_dir / "checkpoints", keep

    def latest(self) -> pathlib.Path | None:
        """The newest checkpoint, or None before the first. Raises UserError where `latest` names a damaged one."""
        pointer = self.folder / LATEST
        if not pointer.exists():
            return None
        path = self.folder / pointer.read_text().strip()
        if not (path / "state.json").is_file() or not (path / "ema.safetensors").is_file():
            others = sorted(p.name for p in self.folder.glob("stage-*") if (p / "state.json").is_file() and p != path)
            raise UserError(f"{pointer} names '{path.name}', which is missing or not whole; write the name of another checkpoint into that "
                            f"file ({', '.join(others) or 'there is none: remove the folder ' + str(self.folder) + ' to start over'}).")
        return path

    def save(self, engine: Engine, ema: Ema, telemetry: dict[str, Any], stage: int, step: int, samples: int) -> pathlib.Path:
        """Write stage-<i>-<samples>; the folder gets its name, and `latest` its new content, after every rank has finished."""
        rank, tag = dist.get_rank(), f"stage-{stage}-{samples:09d}"
        working = self.folder / f".{tag}.tmp"
        if rank == 0:
            shutil.rmtree(working, ignore_errors=True)
            working.mkdir(parents=True)
        dist.barrier()
        engine.save(self.folder, working.name)
        torch.save(telemetry, working / f"telemetry-{rank}.pt")
        averages = engine.state(ema.average)
        if rank == 0:
            save_weights(averages, working / "ema.safetensors", {})
            state = {"stage": stage, "step": step, "samples": samples, "ranks": dist.get_world_size()}
            write_atomic(working / "state.json", json.dumps(state))
        dist.barrier()
        if rank == 0:
            shutil.rmtree(self.folder / tag, ignore_errors=True)
            os.replace(working, self.folder / tag)
            write_atomic(self.folder / LATEST, tag)
            self._prune()
        dist.barrier()
        return self.folder / tag

    def _prune(self) -> None:
        whole = sorted((p for p in self.folder.glob("stage-*") if p.is_dir()), key=lambda p: tuple(int(x) for x in p.name.split("-")[1:]))
        for old in whole[:-self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self, path: pathlib.Path, engine: Engine, ema: Ema) -> tuple[dict[str, Any], dict[str, Any]]:
        """Put the engine and the EMA where the checkpoint was. Returns its state and this rank's telemetry."""
        state = json.loads((path / "state.json").read_text())
        if state["ranks"] != dist.get_world_size():
            raise UserError(f"The checkpoint {path} was written by {state['ranks']} ranks and this run has {dist.get_world_size()}; "
                            f"start it with {state['ranks']} ranks.")
        engine.load(path.parent, path.name)
        ema.masters = engine.masters
        engine.scatter(load_file(str(path / "ema.safetensors")), ema.average)
        return state, torch.load(path / f"telemetry-{dist.get_rank()}.pt", weights_only=True)
