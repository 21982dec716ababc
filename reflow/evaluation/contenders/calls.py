"""One call of a diffusers pipeline, watched: when it reached its denoiser and left it, how many rows it asked of it, what it made.

Any pipeline that takes prompts and tells of its steps can be watched; nothing here knows a family. Time runs from t=1 (noise) to t=0 (data).
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from reflow.evaluation.contenders.contender import Seconds

DENOISERS = re.compile(r"(unet|transformer|prior)(_\d+)?")


def denoisers(pipe: Any) -> dict[str, torch.nn.Module]:
    """The networks of a pipeline that its steps call, by the names of its parts, the first one first; {} if it has none of the usual names."""
    named = {name: part for name, part in pipe.components.items() if DENOISERS.fullmatch(name) and isinstance(part, torch.nn.Module)}
    return dict(sorted(named.items()))


def _rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Rows of the latents that a denoiser is called with: its first argument, by position or under the names that diffusers has for it."""
    given = args[0] if args else next((kwargs[key] for key in ("hidden_states", "sample", "x") if key in kwargs), None)
    return len(given) if isinstance(given, torch.Tensor | list | tuple) else 0


class Watch:
    """A context around one call of a pipeline. Give its `keywords` to the call."""

    def __init__(self, pipe: Any, takes: Mapping[str, Any], device: torch.device) -> None:
        self.pipe, self.device = pipe, device
        self.rows = 0
        self.latents: torch.Tensor | None = None
        self._begun = self._first = self._last = self._done = 0.0
        if "callback_on_step_end" in takes:
            self.keywords: dict[str, Any] = {"callback_on_step_end": self._stepped}
        else:  # pipelines that have not got it yet tell the same by the older callback
            self.keywords = {"callback": lambda step, timestep, latents: self._note(step, latents), "callback_steps": 1}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _called(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.rows:
            self._first = self._now()
        self.rows += _rows(args, kwargs)

    def _stepped(self, pipe: Any, step: int, timestep: Any, found: dict[str, Any]) -> dict[str, Any]:
        self._note(step, found["latents"])
        return found

    def _note(self, step: int, latents: torch.Tensor) -> None:
        self.latents = latents
        count = getattr(self.pipe, "num_timesteps", None)
        # Waiting for the device at every step would slow it down; where the last one is not known, nothing else tells the time.
        if not isinstance(count, int) or step + 1 >= count:
            self._last = self._now()

    def __enter__(self) -> Watch:
        hook = self._called
        self._hooks = [part.register_forward_pre_hook(hook, with_kwargs=True) for part in denoisers(self.pipe).values()]
        self._begun = self._now()
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._hooks:
            handle.remove()
        self._done = self._now()

    def seconds(self) -> Seconds:
        """Of the call, once it is over."""
        return Seconds(self._first - self._begun, self._last - self._first, self._done - self._last)


def as_saved(images: Any) -> torch.Tensor:
    """[B,3,H,W] uint8 on the CPU of a pipeline's numpy images [B,H,W,c] in [0,1], rounded as diffusers rounds what it saves; one channel
    becomes three. Raises ValueError for anything else."""
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise ValueError(f"it makes an array of shape {list(array.shape)} where images [B, height, width, 3] belong")
    levels = (array * 255).round().astype("uint8")
    return torch.from_numpy(levels).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()
