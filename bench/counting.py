"""Kernel launches and host syncs of a call: torch.profiler on a GPU, a TorchDispatchMode on a CPU.

On a CPU an ATen call that computes counts as a launch (views and allocations do not), kernels of ``reflow_kernels``
count where they are started, and ``item``, ``nonzero`` and copies between devices count as syncs. A CPU-only process has
one device, so there a copy between devices is ``.cpu()`` of a tensor marked with :func:`on_device`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_FREE = (
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh",
    "_unsafe_view", "set_", "resize_", "_has_compatible_shallow_copy_type",
)  # fmt: skip
# Their result's size or value is needed on the host.
_SYNCS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2")
_HOST_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


@dataclasses.dataclass(frozen=True)
class Counts:
    """``names``: what was launched, most frequent first; ``how``: what counted."""

    launches: int
    syncs: int
    how: str
    names: dict[str, int]


def count(call: Callable[[], Any], device: torch.device | str, warm: bool = True) -> Counts:
    """Launches and syncs of one call, after one that compiles and allocates."""
    if warm:
        call()
    return _profiled(call, torch.device(device)) if torch.device(device).type == "cuda" else _dispatched(call)


def on_device(tensor: Tensor) -> Tensor:
    """Mark a CPU tensor as one that a training loop would hold on the GPU, so that ``.cpu()`` of it counts as a sync.

    Only for :func:`count` on a CPU; the mark does not spread to results.
    """
    tensor._bench_device = True
    return tensor


class CallCounter(TorchDispatchMode):
    """Counts ATen calls that compute, and those whose result the host waits for."""

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()
        self.syncs = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        ours = function.namespace == "reflow_kernels"
        if name in _SYNCS or self._crosses(name, args, kwargs):
            self.syncs += 1
        if not (ours or name in _FREE or function.is_view or name in ("_local_scalar_dense", "item")):
            self.names[name] += 1
        return function(*args, **kwargs)

    @staticmethod
    def _crosses(name: str, args: tuple, kwargs: dict) -> bool:
        if name == "_to_copy":
            wanted = kwargs.get("device")
            return wanted is not None and torch.device(wanted).type != args[0].device.type
        if name in ("copy_", "copy"):
            return args[0].device.type != args[1].device.type
        return False


def _dispatched(call: Callable[[], Any]) -> Counts:
    counter = CallCounter()
    with _kernel_starts(counter.names), _marked_copies(counter), counter:
        call()
    names = dict(counter.names.most_common())
    return Counts(sum(names.values()), counter.syncs, "ATen calls and kernel starts on a CPU", names)


@contextlib.contextmanager
def _kernel_starts(names: Counter[str]) -> Iterator[None]:
    """Count the Triton kernels that the ops start (in the interpreter)."""
    from reflow_kernels import launch

    start = launch.start

    def counting(prepared, *pointers):
        kernel = prepared.kernel
        names[getattr(getattr(kernel, "fn", kernel), "__name__", "kernel").strip("_")] += 1
        with _disable_current_modes():  # the interpreter's own copies are no launches
            return start(prepared, *pointers)

    launch.start = counting
    try:
        yield
    finally:
        launch.start = start


@contextlib.contextmanager
def _marked_copies(counter: CallCounter) -> Iterator[None]:
    """``.cpu()`` of a marked tensor is nothing on a CPU and never reaches the dispatcher, so it is counted here."""
    cpu = Tensor.cpu

    def counting(tensor, *args, **kwargs):
        if getattr(tensor, "_bench_device", False):
            counter.syncs += 1
            counter.names["copy to the host"] += 1
        return cpu(tensor, *args, **kwargs)

    Tensor.cpu = counting
    try:
        yield
    finally:
        Tensor.cpu = cpu


def _profiled(call: Callable[[], Any], device: torch.device) -> Counts:
    nothing = _events(lambda: None, device)
    seen = _events(call, device)
    launched = {name: number for name, number in seen[0].items() if number > nothing[0][name]}
    syncs = sum(seen[1].values()) - sum(nothing[1].values())
    return Counts(sum(launched.values()), max(syncs, 0), "torch.profiler", launched)


def _events(call: Callable[[], Any], device: torch.device) -> tuple[Counter[str], Counter[str]]:
    """(kernels, copies and fills on the GPU by name, calls of the driver that wait)."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        call()
    torch.cuda.synchronize(device)
    kernels: Counter[str] = Counter()
    waits: Counter[str] = Counter()
    for event in record.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            kernels[event.name[:80]] += 1
        elif event.name in _HOST_WAITS:
            waits[event.name] += 1
    return kernels, waits
