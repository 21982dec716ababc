"""What a run tells: JSON lines and TensorBoard always, wandb when asked. Nothing here waits for the GPU between two reports."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from reflow.errors import UserError
from reflow.lines import read_lines
from reflow.outputs import about, write_text
from reflow.weights.runs import first

PARTS = ("data", "teacher", "student", "optimizer")


class Clock:
    """Seconds spent in the named parts of a step: CUDA events on a GPU, read only at a report; the wall clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        if self.cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self.events.append((name, start, end))
        else:
            start_s = time.perf_counter()
            yield
            self.seconds[name] += time.perf_counter() - start_s

    def read(self) -> dict[str, float]:
        """Seconds a part since the last reading."""
        if self.cuda:
            torch.cuda.synchronize()
            for name, start, end in self.events:
                self.seconds[name] += start.elapsed_time(end) / 1000
            self.events.clear()
        taken, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return taken


class Meter:
    """Sums over samples, on the device: loss, squared error, its magnitude part and cosine, per window, and non-finite samples."""

    COLUMNS = ("count", "mse", "magnitude", "cosine", "excluded")

    def __init__(self, windows: int, device: torch.device) -> None:
        self.sums = torch.zeros(windows, len(self.COLUMNS), dtype=torch.float64, device=device)
        self.loss = torch.zeros(2, dtype=torch.float64, device=device)
        self.bad_step = torch.full((1,), -1, dtype=torch.long, device=device)

    def add(self, window: torch.Tensor, loss: torch.Tensor, mse: torch.Tensor, magnitude: torch.Tensor, cosine: torch.Tensor,
            good: torch.Tensor, step: int) -> None:
        """Per-sample values [B] of one micro-batch. `good` marks the samples that counted."""
        kept, values = good.double(), torch.stack([mse, magnitude, cosine]).detach().double()
        values = values.masked_fill(~good, 0.0)  # where it is not good, a value may be no number
        self.sums.index_add_(0, window, torch.cat([kept[None], values, 1.0 - kept[None]]).T)
        # By rows, so that the average does not depend on how a batch is cut.
        self.loss += torch.stack([loss.detach().double(), torch.ones_like(self.loss[0])]) * len(window)
        self.bad_step.masked_fill_((~good).any() & (self.bad_step < 0), step)

    def read(self) -> dict[str, Any]:
        """Averages over all ranks since the last reading. Every rank calls it."""
        both = torch.cat([self.sums.flatten(), self.loss])
        dist.all_reduce(both)
        dist.all_reduce(self.bad_step, op=dist.ReduceOp.MAX)
        sums, loss, bad = both[:-2].view_as(self.sums).cpu(), both[-2:].cpu(), int(self.bad_step)
        self.sums.zero_(), self.loss.zero_(), self.bad_step.fill_(-1)
        count = sums[:, :1].clamp(min=1)
        means = sums[:, 1:4] / count  # of the cosine too: 1 - it is taken here, in fp64
        return {"loss": float(loss[0] / loss[1].clamp(min=1)),
                "windows": [{"window": k, "samples": int(sums[k, 0]), "mse": float(means[k, 0]), "magnitude": float(means[k, 1]),
                             "direction": float(means[k, 0] - means[k, 1]), "one_minus_cosine": 1.0 - float(means[k, 2])}
                            for k in range(len(sums)) if sums[k, 0] > 0],
                "excluded": int(sums[:, 4].sum()), "bad_step": bad}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"sums": self.sums.cpu(), "loss": self.loss.cpu(), "bad_step": self.bad_step.cpu()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name in ("sums", "loss", "bad_step"):
            getattr(self, name).copy_(state[name])


class Log:
    """run_dir/log.jsonl and TensorBoard events, written by rank 0.

    resume_at: total samples that the run goes on from; what was written later is dropped and will be written again.
    restarted: the stage that starts over from its beginning, if one does.
    """

    def __init__(self, run_dir: pathlib.Path, resume_at: int, *, wandb: bool = False, name: str = "", restarted: int | None = None) -> None:
        self.path, self.writer, self.wandb = run_dir / "log.jsonl", None, None
        if dist.get_rank() != 0:
            return
        self.first, kept = first(run_dir), []  # number of the first stage
        if self.path.exists():
            again = None if restarted is None else restarted + self.first
            kept = [line for line in read_lines(self.path) if stands(line, resume_at, again)]
            write_text(self.path, "".join(line + "\n" for line in kept))
        from torch.utils.tensorboard import SummaryWriter
        self.board = run_dir / "tensorboard"
        self.threads, threading.excepthook = threading.excepthook, unsaid
        with about(self.board):
            self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_at)
        self.repeat(kept, resume_at)
        if wandb:
            try:
                import wandb as module
            except ImportError as error:
                raise UserError("log.wandb = true needs the package wandb; install it with 'pip install wandb' or write false.") from error
            self.wandb = module.init(project="reflow", name=name, dir=str(run_dir), resume="allow", id=run_dir.name)

    def write(self, event: str, total_samples: int, values: dict[str, Any]) -> None:
        if dist.get_rank() != 0:
            return
        if "stage" in values:
            values = {**values, "stage": values["stage"] + self.first}
        with about(self.path), open(self.path, "a") as handle:
            handle.write(json.dumps(finite({"event": event, "total_samples": total_samples, **values}), allow_nan=False) + "\n")
        numbers = self.curves(event, total_samples, values)
        if self.wandb is not None:
            self.wandb.log(numbers, step=total_samples)

    def lines(self, event: str, stage: int) -> list[dict[str, Any]]:
        """The records of one kind that stand in the log of a stage, counted from 0."""
        records = map(json.loads, read_lines(self.path))
        return [record for record in records if record["event"] == event and record.get("stage") == stage + self.first]

    def curves(self, event: str, total_samples: int, values: dict[str, Any]) -> dict[str, float]:
        """The numbers of a record as points of TensorBoard's curves."""
        numbers = dict(scalars(event, values))
        with about(self.board):
            for tag, value in numbers.items():
                self.writer.add_scalar(tag, value, total_samples)
            self.writer.flush()
        return numbers

    def repeat(self, kept: list[str], resume_at: int) -> None:
        """Write again what stands at the very place of resuming. TensorBoard drops by step alone, what stands and what is made anew."""
        for record in map(json.loads, kept):
            if record["total_samples"] == resume_at:
                self.curves(record["event"], resume_at, {k: v for k, v in record.items() if k not in ("event", "total_samples")})
        picture = self.path.parent / "validation" / f"{resume_at:09d}.png"
        if picture.exists():
            from PIL import Image
            self.image("validation", np.asarray(Image.open(picture, formats=("PNG",)).convert("RGB")), resume_at)

    def image(self, tag: str, picture: Any, total_samples: int) -> None:
        """picture: uint8 array [H, W, 3]."""
        if self.writer is not None:
            with about(self.board):
                self.writer.add_image(tag, picture, total_samples, dataformats="HWC")
                self.writer.flush()

    def close(self) -> None:
        """All was flushed when it was written; what is refused now has been said then."""
        if self.writer is not None:
            with contextlib.suppress(OSError):
                self.writer.close()
        if dist.get_rank() == 0:
            threading.excepthook = self.threads


def unsaid(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread. What the system refuses it there is raised again by the next call, and not printed too."""
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


def finite(value: Any) -> Any:
    """A record with null for every number that is not finite: JSON has no other word for it."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def stands(line: str, resume_at: int, restarted: int | None) -> bool:
    """Whether a line of the log was written before the point that the run goes on from. A kill may have left half a line."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False
    return record["total_samples"] <= resume_at and (restarted is None or record.get("stage") != restarted)


def scalars(prefix: str, values: Any) -> Iterator[tuple[str, float]]:
    """Every number of a nested record as ('train/windows/0/mse', 0.5)."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from scalars(f"{prefix}/{key}", value)
    elif isinstance(values, list):
        for item in values:
            if isinstance(item, dict) and "window" in item:
                where = f"{prefix}/{item['window']}" + (f"/tau {item['tau']:g}" if "tau" in item else "")
                yield from scalars(where, {k: v for k, v in item.items() if k not in ("window", "tau")})
    elif isinstance(values, int | float) and not isinstance(values, bool):
        yield prefix, float(values)


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
