"""Correctness before speed: a peer that differs from the oracle, or an op that does, gets no time.

The error is the largest difference over the largest oracle element, so that one wrong element is seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class GateError(Exception):
    """A result that is not the oracle's; the message says by how much."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """``failure`` is "" for a peer that may be timed; ``deterministic``: two runs equal to the bit; ``failed`` is False
    for a peer that is only not there (skipped, or out of memory)."""

    error: float | None
    deterministic: bool | None
    failure: str = ""
    failed: bool = False


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a nested result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for item in value for tensor in tensors(item)]


def errors_of(output: Any, oracle: Any) -> list[float]:
    """max |output - oracle| / max |oracle| of every tensor. GateError for other shapes, NaN or infinity."""
    ours, theirs = tensors(output), tensors(oracle)
    if len(ours) != len(theirs):
        raise GateError(f"{len(ours)} tensors came back, the oracle has {len(theirs)}")
    errors = []
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one.shape != other.shape:
            raise GateError(f"tensor {number} has shape {list(one.shape)}, the oracle's has {list(other.shape)}")
        if not one.numel():
            errors.append(0.0)
            continue
        one, other = one.detach().double(), other.detach().to(one.device).double()
        largest = float(other.abs().max())
        error = float((one - other).abs().max()) / (largest or 1.0)
        if not error < float("inf"):
            raise GateError(f"tensor {number} holds NaN or infinity")
        errors.append(error)
    return errors


def check(output: Any, oracle: Any, tolerance: float | Sequence[float]) -> float:
    """The largest error of ``output`` against ``oracle``; GateError where one is above ``tolerance`` (one for all
    tensors or one for each)."""
    errors = errors_of(output, oracle)
    allowed = [tolerance] * len(errors) if isinstance(tolerance, float | int) else tolerance
    for number, (error, limit) in enumerate(zip(errors, allowed, strict=True)):
        if error > limit:
            where = f" in tensor {number}" if len(errors) > 1 else ""
            raise GateError(f"error {error:.3g} of the oracle's largest element{where}, allowed {limit:.3g}")
    return max(errors, default=0.0)


def same_bits(first: Any, second: Any) -> bool:
    """Whether two results are equal to the bit (NaN equals NaN)."""
    pairs = list(zip(tensors(first), tensors(second), strict=True))
    return all(one.shape == other.shape and torch.equal(_bits(one), _bits(other)) for one, other in pairs)


def _bits(value: Tensor) -> Tensor:
    return value.detach().contiguous().view(torch.uint8) if value.dim() else value.detach().reshape(1).view(torch.uint8)


def copied(value: Any) -> list[Tensor]:
    """The tensors of a result in memory of their own: static buffers are overwritten by the next run."""
    return [tensor.detach().clone() for tensor in tensors(value)]


def judge(run: Callable[[], Any], oracle: Any, tolerance: float | Sequence[float]) -> Verdict:
    """Run twice, compare the first with the oracle and the two with each other. Exceptions of ``run`` are failures."""
    try:
        first = copied(run())
        error = check(first, tensors(oracle), tolerance)
        return Verdict(error, same_bits(first, copied(run())))
    except GateError as failure:
        return Verdict(None, None, f"fails the oracle: {failure}", True)
    except torch.OutOfMemoryError:
        return Verdict(None, None, "skipped: out of GPU memory")
    except Exception as failure:  # noqa: BLE001 - whatever a peer does, the other peers are measured
        text = str(failure).strip().split("\n")[0]
        return Verdict(None, None, f"cannot run: {type(failure).__name__}: {text}"[:300], True)
