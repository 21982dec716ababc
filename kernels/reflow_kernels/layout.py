"""Memory layout: which operands a kernel may read in place.

A kernel walks a sample as one flat run of N elements, so the dimensions after the first must be dense in one stride
order that all operands share (contiguous, channels_last, ...). The batch stride is free: slices along the batch or of
channels, and expanded batches, are read in place. Sizes of 1 carry no order.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch


def dense_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Strides of the dimensions after the first if they are dense in some order (sizes of 1 count 0), else None."""
    # A fake tensor's sizes may be symbols, which have no hash.
    find = _dense_order if type(tensor) is Tensor else _dense_order.__wrapped__
    return find(tuple(tensor.shape[1:]), tensor.stride()[1:])


@functools.lru_cache(maxsize=1024)
def _dense_order(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...] | None:
    dims = [dim for dim, size in enumerate(shape) if size != 1]
    strides = [0] * len(shape)
    expected = 1
    for dim in sorted(dims, key=stride.__getitem__):
        if stride[dim] != expected:
            return None
        strides[dim] = expected
        expected *= shape[dim]
    return tuple(strides)


def contiguous_order(shape: Sequence[int]) -> tuple[int, ...]:
    """The order of a contiguous tensor of this shape."""
    strides = [0] * (len(shape) - 1)
    expected = 1
    for dim in range(len(shape) - 1, 0, -1):
        if shape[dim] != 1:
            strides[dim - 1] = expected
            expected *= shape[dim]
    return tuple(strides)


def leading_order(tensor: Tensor) -> tuple[int, ...]:
    """The order that outputs and operands follow: that of the leading operand where it is dense, else contiguous."""
    return dense_order(tensor) or contiguous_order(tensor.shape)


def shared_order(leading: Tensor, *others: Tensor) -> tuple[int, ...] | None:
    """The order that results follow, where all operands are in it already; else None."""
    order = leading_order(leading)
    return order if all(dense_order(tensor) == order for tensor in (leading, *others)) else None


def strides(leading: Sequence[int], sample_shape: Sequence[int], order: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor [*leading, *sample_shape], samples in ``order``, dense over the leading dimensions."""
    outer = []
    stride = math.prod(sample_shape)
    for size in reversed(leading):
        outer.append(stride)
        stride *= size
    return (*reversed(outer), *(inner or 1 for inner in order))


def empty(leading: Sequence[int], like: Tensor, order: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor [*leading, *like.shape[1:]] with its samples in ``order``."""
    return Room(leading, like, order, dtype).empty()


class Room:
    """What a result will be, so that it is made in one call."""

    def __init__(self, leading: Sequence[int], like: Tensor, order: tuple[int, ...], dtype: torch.dtype | None = None):
        sample_shape = tuple(like.shape[1:])
        self.shape, self.stride = (*leading, *sample_shape), strides(leading, sample_shape, order)
        self.dtype, self.device = dtype or like.dtype, like.device

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def settle(result: Tensor, order: tuple[int, ...]) -> Tensor:
    """``result`` with its samples in ``order``, as a fake kernel promised it: itself if it is so, else a copy."""
    inner = len(order)
    leading, sample_shape = result.shape[: result.dim() - inner], result.shape[result.dim() - inner :]
    wanted = strides(leading, sample_shape, order)
    if all(size == 1 or a == b for size, a, b in zip(result.shape, result.stride(), wanted, strict=True)):
        return result
    return torch.empty_strided(result.shape, wanted, dtype=result.dtype, device=result.device).copy_(result)


def same_place(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have each element of the shorter one in the same memory, sample by sample."""
    alike = one.data_ptr() == other.data_ptr() and one.dtype == other.dtype and one.shape[1:] == other.shape[1:]
    return alike and one.stride() == other.stride()


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors share memory. Exact for samples of one buffer; else told from where each begins and ends."""
    if not one.numel() or not other.numel() or one.device != other.device:
        return False
    (a, length_a, step_a), (b, length_b, step_b) = _samples(one), _samples(other)
    end_a, end_b = a + (len(one) - 1) * step_a + length_a, b + (len(other) - 1) * step_b + length_b
    if a >= end_b or b >= end_a:
        return False
    if step_a == step_b and step_a >= max(length_a, length_b):  # slices of the samples of one buffer
        return (b - a) % step_a < length_a or (a - b) % step_a < length_b
    return True


def _samples(tensor: Tensor) -> tuple[int, int, int]:
    """(address of the first sample, its length from first to last byte, distance of the next sample), in bytes."""
    size = tensor.element_size()
    inner = zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    return tensor.data_ptr(), (1 + sum((n - 1) * stride for n, stride in inner)) * size, tensor.stride(0) * size


def in_order(op: str, name: str, tensor: Tensor, order: tuple[int, ...], strict: bool) -> Tensor:
    """``tensor`` with its samples dense in ``order``: itself, or a copy that is said once and refused under strict."""
    if dense_order(tensor) == order:
        return tensor
    reason = f"{op}: {name} has strides {tuple(tensor.stride())}, which do not follow the leading operand's order"
    if dispatch.is_strict(strict):
        raise ValueError(f"{reason} {order}; strict refuses the copy. Bring it to that memory format first.")
    dispatch.say_once(logging.WARNING, f"{reason} {order}; it is copied at every call")
    copy = empty((tensor.shape[0],), tensor, order)
    return copy.copy_(tensor)
