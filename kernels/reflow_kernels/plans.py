"""What is worked out once for calls that are alike, so that a call costs the host little more than its launch.

A call's signature is all that decides how it runs: types, dtypes, shapes, strides, devices, whether addresses are
multiples of 16, who asks for a gradient, options, settings and the environment. The first call of a signature has its
arguments checked and its plan kept, which is a function of the same arguments; later calls look it up. Tracers, modes,
transforms and subclasses of tensors have no signature: their calls are checked every time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch

KEPT = 512  # plans in all; beyond it they are made anew

Plan = Callable[..., Any]
Signature = tuple[Any, ...]

_plans: dict[Signature, Plan] = {}


def signature(op: str, given: tuple[Any, ...], *options: object) -> Signature | None:
    """The signature of a call with these arguments, or None where it has none."""
    if torch.compiler.is_compiling() or dispatch.watched():
        return None
    return op, options, dispatch.settings(), dispatch.override(), torch.is_grad_enabled(), *kinds(*given)


def kinds(*given: Any) -> list[Any]:
    """What of each value decides how a kernel is compiled and started, and who asks for a gradient."""
    found: list[Any] = []
    plain, parameter = dispatch.PLAIN
    for value in given:
        kind = type(value)
        if kind is plain or kind is parameter:
            # Kernels and their blocks are chosen by alignment.
            aligned, negative = value.data_ptr() % 16 == 0, value.is_neg()
            found += value.shape, value.stride(), value.dtype, value.device, value.requires_grad, negative, aligned
        else:
            found.append(kind)
    return found


def find(key: Signature | None) -> Plan | None:
    return None if key is None else _plans.get(key)


def keep(key: Signature | None, plan: Plan) -> Plan:
    """``plan``, which later calls of this signature find; a subclass of tensor may behave in ways of its own."""
    if key is not None and not any(isinstance(kind, type) and issubclass(kind, Tensor) for kind in key):
        if len(_plans) >= KEPT:
            _plans.clear()
        _plans[key] = plan
    return plan


def forget() -> None:
    """Drop all plans: what no signature tells has changed."""
    _plans.clear()


class Apart:
    """What is checked of operands' memory, once for every set of addresses that operands of one signature come at."""

    def __init__(self, check: Callable[..., None]):
        self.check = check
        self.found: set[tuple[int, ...]] = set()

    def __call__(self, given: tuple[Tensor | None, ...]) -> None:
        addresses = tuple([0 if value is None else value.data_ptr() for value in given])
        if addresses not in self.found:
            self.check(*given)
            if len(self.found) >= KEPT:
                self.found.clear()
            self.found.add(addresses)


def fill(values: tuple[Tensor | float | None, ...], like: Tensor, batch: int, dtype: torch.dtype) -> Sequence[Any]:
    """Checked [B] arguments as tensors: floats are filled on the device."""
    for value in values:
        if value is not None and not isinstance(value, Tensor):
            break
    else:
        return values
    return [
        torch.full((batch,), value, dtype=dtype, device=like.device)
        if value is not None and not isinstance(value, Tensor)
        else value
        for value in values
    ]
