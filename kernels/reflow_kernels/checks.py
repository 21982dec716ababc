"""Argument checks. Every message names the argument, says what it is and what was expected."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PRECISE = (torch.float32, torch.float64)


def tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """A floating tensor with a batch dimension."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor [B, ...].")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}; expected {_names(dtypes)}.{_hint(value.dtype, dtypes)}")
    if value.dim() == 0:
        raise ValueError(f"{name} is a scalar tensor; expected a batch [B, ...].")


def same_shape(name: str, value: Tensor, shape: tuple[int, ...], of: str) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {list(value.shape)}; expected {list(shape)}, {of}.")


def same_device(name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}; expected {like.device}, the device of {like_name}.")


def per_sample(name: str, value: object, like: Tensor, batch: int) -> None:
    """A float, or a tensor [B]."""
    if isinstance(value, Tensor):
        if value.dtype not in FLOATS:
            raise TypeError(f"{name} has dtype {value.dtype}; expected {_names(FLOATS)}.")
        if value.dim() != 1 or value.shape[0] != batch:
            raise ValueError(f"{name} has shape {list(value.shape)}; expected a float or a tensor [{batch}].")
        same_device(name, value, like, "the batch")
        no_grad(name, value)
    elif not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a float or a tensor [{batch}].")


def no_grad(name: str, value: Tensor, why: str = "it gets no gradient here") -> None:
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, but {why}; pass {name}.detach() or call under torch.no_grad().")


def dtype(name: str, value: object) -> None:
    if value is not None and value not in FLOATS:
        raise TypeError(f"{name} is {value!r}; expected None or {_names(FLOATS)}.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]


def _hint(dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> str:
    if dtypes is PRECISE and dtype in FLOATS:
        return " States are kept in fp32 (half precision costs several percent of the velocity); pass .float()."
    return ""
