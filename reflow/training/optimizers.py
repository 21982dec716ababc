"""Optimizers and the learning-rate curve. Every count is in samples."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from reflow.errors import UserError
from reflow.recipes.sections import Train
from reflow.training.fused import FusedAdamW, FusedAdamW8bit

FUSED = {"fused_adamw": FusedAdamW, "fused_adamw8bit": FusedAdamW8bit}


def build(parameters: Iterable[torch.nn.Parameter], train: Train) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters. Raises UserError where bitsandbytes or a GPU is missing."""
    settings = dict(lr=train.learning_rate, betas=tuple(train.betas), eps=train.eps, weight_decay=train.weight_decay)
    if train.optimizer == "adamw":
        # Torch's fused form: one pass over the states on a GPU; vectorised and threaded on a CPU, without a compiler.
        parameters = list(parameters)
        fused = train.offload or any(p.device.type == "cuda" for p in parameters)
        return torch.optim.AdamW(parameters, fused=fused or None, **settings)
    if train.optimizer in FUSED:
        return FUSED[train.optimizer](parameters, **settings)
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise UserError(f"train.optimizer = '{train.optimizer}' needs the package bitsandbytes, which cannot be imported here ({error}); "
                        f"install it with 'pip install bitsandbytes', or write optimizer = 'adamw'.") from error
    if train.optimizer.startswith("paged") and not torch.cuda.is_available():
        raise UserError(f"train.optimizer = '{train.optimizer}' pages its states through CUDA memory and there is no GPU here; "
                        f"write optimizer = 'adamw8bit' or 'adamw'.")
    kinds = {"adamw8bit": bnb.optim.AdamW8bit, "paged_adamw8bit": bnb.optim.PagedAdamW8bit, "paged_adamw": bnb.optim.PagedAdamW32bit}
    return kinds[train.optimizer](parameters, **settings)


def learning_rate(peak: float, schedule: str, warmup: int, total: int, done: int, batch: int) -> float:
    """The rate for the optimizer step that follows `done` samples of a stage of `total` samples, in batches of `batch`."""
    warm = min(1.0, (done + batch) / warmup) if warmup else 1.0
    progress = min(1.0, done / total)
    fall = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[schedule]
    return peak * warm * fall
