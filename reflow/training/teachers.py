"""Where and how precisely a frozen teacher is kept: in CPU memory between solves, or in 8-bit floating point with its error measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist

from reflow.errors import UserError


class Solves(Protocol):
    """What is measured here of a solver of windows: its teacher, where it runs, and window ends by global index."""

    flow: Any
    teacher: torch.nn.Module
    device: torch.device
    captured: Any

    def by_shape(self, indices: list[int]) -> list[list[int]]: ...

    def __call__(self, indices: list[int]) -> Any: ...


MEASURED = 2**41  # solves that measure a teacher: far behind any that trains or validates


class Parked:
    """A frozen network whose weights live in CPU memory and are on the device only inside `with parked.here()`.

    They are copied up and dropped, never copied back. On a GPU the CPU's copy is pinned, so that the way up runs at the bus's speed.
    """

    def __init__(self, network: torch.nn.Module, device: torch.device) -> None:
        self.device, self.depth = device, 0
        self.tensors = [*network.parameters(), *network.buffers()]
        self.homes = [t.detach().to("cpu") for t in self.tensors]
        if device.type == "cuda":
            self.homes = [home.pin_memory() for home in self.homes]
        self._go(self.homes)

    def _go(self, places: list[torch.Tensor]) -> None:
        for tensor, place in zip(self.tensors, places, strict=True):
            tensor.data = place

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        if not self.depth:
            self._go([home.to(self.device, non_blocking=True, copy=True) for home in self.homes])
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if not self.depth:
                self._go(self.homes)


def park(network: torch.nn.Module, device: torch.device) -> Parked | None:
    """`Parked` where there is a device to save memory on; on a CPU the network is in its memory already, which is said."""
    if device.type != "cpu":
        return Parked(network, device)
    if dist.get_rank() == 0:
        print("teacher.offload = true has nothing to do here: without a GPU the teacher is in CPU memory already.", flush=True)
    return None


def quantise(network: torch.nn.Module, device: torch.device) -> str:
    """Linear layers to float8 (e4m3) in place, through torchao; returns how. Convolutions stay as they are. Raises UserError without torchao."""
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Float8WeightOnlyConfig,
            PerRow,
            quantize_,
        )
    except ImportError as error:
        raise UserError(f"teacher.precision = 'fp8' needs the package torchao, which cannot be imported here ({error}); install it with "
                        f"'pip install torchao', or write 'bf16'.") from error
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        quantize_(network, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
        return "weights and activations in float8"
    quantize_(network, Float8WeightOnlyConfig())
    return "weights in float8, computed in bf16, because this device has no float8 arithmetic"


def to_fp8(solver: Solves, limit: float) -> dict[str, Any]:
    """Quantise a solver's teacher in place and measure what that does to its window velocities.

    One window of each kind is solved before and after. With v = (z_end - z_start) / dt, `relative_error` is |v8 - v| / |v| and
    `one_minus_cosine` 1 - cos(v8, v), each of the worst window. Raises UserError where the former is beyond `limit`.
    """
    count = len(solver.flow.active)
    first = -(-MEASURED // count) * count  # of one trajectory, where the stage starts from noise
    indices = list(range(first, first + count))
    parts = solver.by_shape(indices)
    before = [solver(part) for part in parts]
    said = quantise(solver.teacher, solver.device)
    if solver.captured is not None:
        solver.captured.forget()  # a recorded solve reads the weights' old storage
    after = [solver(part) for part in parts]
    # Both share z_start and dt, which cancel.
    ends = [tuple((s.z_end - b.z_start).flatten(1).double() for s in (b, a)) for b, a in zip(before, after, strict=True)]
    relative = max(((rounded - exact).norm(dim=1) / exact.norm(dim=1)).max().item() for exact, rounded in ends)
    turned = max((1 - torch.cosine_similarity(rounded, exact, dim=1)).max().item() for exact, rounded in ends)
    if not relative <= limit:
        raise UserError(f"The teacher in float8 ({said}) changes its window velocities by {relative:.3g} of their length (1 - cosine {turned:.3g}) and "
                        f"teacher.fp8_max_error allows {limit:g}; write teacher.precision = 'bf16', or a larger limit.")
    if dist.get_rank() == 0:
        print(f"Teacher: {said}; its window velocities change by up to {relative:.3g} of their length (limit {limit:g}), 1 - cosine up to "
              f"{turned:.3g}.", flush=True)
    return {"how": said, "relative_error": relative, "one_minus_cosine": turned, "limit": limit}
