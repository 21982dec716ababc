"""How kernels are launched: fixed block and warp tables, the device guard, and the one place that starts a kernel.

Nothing is tuned at run time: sizes come from these tables alone, so that results repeat to the bit and no benchmark
runs inside a training step. Grids are one-dimensional and programs widen their number to int64 before any offset.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

SINGLE_PROGRAM = 16384  # elements of a sample that one program reduces alone; half of that where it is not aligned
TILE = 4096  # elements a program reduces of a larger sample
CHUNK = 1024  # elements a program of an elementwise kernel handles; partial sums the last stage reads at a time

_LANES = 64 if torch.version.hip else 32


class Blocks(NamedTuple):
    """BLOCK elements a program, ``tiles`` programs a sample, ``even`` where no program runs over the sample's end."""

    block: int
    tiles: int
    warps: int
    even: bool


def elementwise(size: int) -> Blocks:
    """Blocks of 1024 (less for small samples), 8 elements a lane: 16-byte accesses in half precision."""
    block = min(CHUNK, max(128, power_of_two(size)))
    return _blocks(size, block, min(max(block // (8 * _LANES), 1), 4))


def reduction(size: int, *tensors: Tensor | None) -> Blocks:
    """One program a sample where it fits the registers, else tiles; 16 elements a lane, 32 in the largest block.

    Masks and single-element addresses take registers too: where sizes and tensors do not allow 16-byte accesses, blocks
    and elements a lane are half of that.
    """
    share = 1 if _aligned(size, tensors) else 2
    block = max(128, power_of_two(size)) if size <= SINGLE_PROGRAM // share else TILE // share
    return _blocks(size, block, min(max(share * block // (16 * _LANES), 1), 16))


def _aligned(size: int, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether Triton can tell that every row of these [B, N] tensors starts and ends on a multiple of 16 elements."""
    if size % 16:
        return False
    given = (tensor for tensor in tensors if tensor is not None)
    return all(tensor.data_ptr() % 16 == 0 and tensor.stride(0) % 16 == 0 for tensor in given)


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below ``value``."""
    return 1 << max(value - 1, 0).bit_length()


def _blocks(size: int, block: int, warps: int) -> Blocks:
    return Blocks(block, -(-size // block), warps, size % block == 0)


class Launch:
    """One kernel, with all that does not change between calls of one signature (see :mod:`.plans`).

    numbers: the sizes and strides that follow the operands among the kernel's arguments; constants by name follow them.
    Operands are pointers, and numbers that change from call to call.
    """

    def __init__(self, kernel: Any, programs: int, warps: int, numbers: tuple[int, ...], **constants: Any):
        self.kernel, self.programs, self.warps = kernel, programs, warps
        self.numbers, self.constants = numbers, constants
        self.again: Callable[..., None] | None = None  # starts the kernel that the first call compiled
        names = kernel.arg_names
        self._fixed = (*numbers, *(constants[name] for name in names[len(names) - len(constants) :]))

    def __call__(self, *operands: Any) -> None:
        if self.again is not None:
            self.again(*operands)
            return
        start = self.kernel[(self.programs,)]
        # Contraction to FMA is off, so every Triton version rounds alike.
        handle = start(*operands, *self.numbers, num_warps=self.warps, enable_fp_fusion=False, **self.constants)
        # The JIT looks a kernel up for longer than a launch takes. The interpreter has none; HIP goes by buffer sizes.
        if handle is not None and not torch.version.hip:
            self.again = _starter(handle, self.programs, self._fixed)


def _starter(handle: Any, programs: int, fixed: tuple[Any, ...]) -> Callable[..., None]:
    """What starts a compiled kernel with its operands: the handle's own runner, or where nobody set a hook (a profiler
    does) its launcher, called as the runner calls it: for hooks the runner collects what costs as much as a launch."""
    runner = handle[(programs, 1, 1)]
    if not _KNOWN:
        return lambda *operands: runner(*operands, *fixed)
    from triton import knobs
    from triton.runtime import driver

    hooks, run, function, packed = knobs.runtime, handle.run, handle.function, handle.packed_metadata

    def start(*operands: Any) -> None:
        enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            runner(*operands, *fixed)
            return
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        run(programs, 1, 1, stream, function, packed, None, None, None, *operands, *fixed)

    return start


def _known() -> bool:
    """Whether this Triton's launchers are called as those that were read and tried, 3.6 to 3.9."""
    try:
        major, minor = (int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False
    return (3, 6) <= (major, minor) <= (3, 9)


_KNOWN = _known()


def start(launch: Launch, *operands: Any) -> None:
    """The one place that starts a kernel, on the tensors' own device."""
    first = operands[0]
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            launch(*operands)
    else:
        (launch.again or launch)(*operands)


def stride(values: Tensor | None) -> int:
    """The stride of a [B] argument, 0 for an absent one."""
    return 0 if values is None else values.stride(0)
