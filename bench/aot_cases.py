"""The launches that ``python -m bench aot`` compiles, recorded from the launchers so that they cannot drift apart."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from reflow_kernels import (
    adamw_kernels,
    aligned_v_finish_kernels,
    aligned_v_kernels,
    chord_kernels,
    guidance_kernels,
    guided_step_kernels,
    launch,
    layout,
    plans,
)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
POINTERS = {dtype: f"*{name}" for name, dtype in DTYPES.items()} | {torch.uint8: "*u8"}

# Sample shapes that lead to each specialisation: no mask; a mask with sizes divisible by 16; neither; and no mask with
# tensors that start anywhere.
SHAPES = {"even": (4, 64, 64), "masked": (4, 60, 60), "ragged": (3, 69, 71), "unaligned": (4, 64, 64)}
# Of more partial sums than the loss' last stage reads at a time: in two reads and in eight.
HUGE = {"even": (4, 2048, 1024), "masked": (4, 2048, 1020), "ragged": (3, 1001, 999), "unaligned": (4, 2048, 1024)}
VIDEO = {"even": (16, 2048, 1024), "masked": (16, 2048, 1020), "ragged": (15, 1001, 999), "unaligned": (16, 2048, 1024)}
LARGE = {"even": (4, 128, 128), "masked": (4, 120, 120), "ragged": (3, 99, 101), "unaligned": (4, 128, 128)}
# Elements of an optimizer's flat shard.
FLAT = {"even": 4096, "masked": 4080, "ragged": 4001, "unaligned": 4096}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel as one call compiles it: signature, constants and hints derived from the values as the JIT does."""

    kernel: Any
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    warps: int
    block: int | None


def recorded(dtype: torch.dtype, specialisation: str, lanes: int) -> list[Launch]:
    """Every launch of every op for tensors of this dtype, on a target whose warps have ``lanes`` lanes."""
    launches: list[Launch] = []
    with _recording(launches, lanes):
        for shape in (sizes[specialisation] for sizes in (SHAPES, LARGE, HUGE, VIDEO)):
            _run_all(shape, dtype, offset=specialisation == "unaligned")
        _run_many(SHAPES[specialisation], dtype)
        if specialisation == "even":
            _run_far(SHAPES[specialisation], dtype)
        _run_optimizer(FLAT[specialisation], dtype, offset=specialisation == "unaligned")
    return list(dict.fromkeys(launches))


@contextlib.contextmanager
def _recording(launches: list[Launch], lanes: int) -> Iterator[None]:
    start, before = launch.start, launch._LANES
    launch.start = lambda one, *pointers: launches.append(
        describe(one.kernel, one.warps, (*pointers, *one.numbers), one.constants)
    )
    launch._LANES = lanes
    plans.forget()  # those of another target's warps
    try:
        yield
    finally:
        launch.start, launch._LANES = start, before
        plans.forget()


def describe(kernel: Any, warps: int, args: tuple, constants: dict[str, Any]) -> Launch:
    """The specialisation that these arguments select."""
    signature, fixed, divisible = {}, dict(constants), []
    names = kernel.arg_names
    plain = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    anywhere = {parameter.name for parameter in kernel.params if parameter.do_not_specialize_on_alignment}
    for position, (name, value) in enumerate(zip(names, args, strict=False)):
        if value is None or (isinstance(value, int) and value == 1 and name not in plain):
            fixed[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible += [position] if value.data_ptr() % 16 == 0 and name not in anywhere else []
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible += [position] if value % 16 == 0 and name not in plain else []
    for name in fixed:
        signature[name] = "constexpr"
    ordered = tuple((name, signature[name]) for name in names)
    values = tuple(fixed.items())
    return Launch(kernel, kernel.fn.__name__, ordered, values, tuple(divisible), warps, constants.get("BLOCK"))


def _run_all(shape: tuple[int, ...], dtype: torch.dtype, offset: bool) -> None:
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    batch = 2
    order = layout.contiguous_order((batch, *shape))

    def empty(*leading, dtype=wide):
        plain = layout.empty(leading, torch.empty(0, *shape), order, dtype)
        if not offset:
            return plain
        memory = torch.empty(plain.numel() + 1, dtype=dtype)[1:]
        return memory.as_strided(plain.shape, plain.stride(), 1)

    output, doubled, state = empty(batch, dtype=dtype), empty(2 * batch, dtype=dtype), empty(batch)
    values = torch.zeros(batch, dtype=wide)
    stats = torch.zeros(aligned_v_kernels.STATS, batch, dtype=wide)
    grad = torch.zeros((), dtype=wide)

    for sample, coef, weight, target in ((state, values, values, state), (None, None, None, output)):
        aligned_v_kernels.forward(output, target, values, weight, sample, coef, coef, 1e-4, True)
        aligned_v_kernels.backward(grad, output, target, values, weight, sample, coef, coef, stats, True)
    for result, scale in ((doubled, values), (output, None)):
        buffers = empty(batch), empty(result.shape[0], dtype=dtype)
        guided_step_kernels.step(state, result, values, values, scale, scale, *buffers, True)
    for tau in (values, values.expand(2, batch)):
        leading = tau.shape
        chord_kernels.chord(
            state, state, tau, values, empty(*leading), empty(batch), empty(*leading, dtype=dtype), True
        )
    for rescale in (None, values):
        guidance_kernels.combine(doubled, values, rescale, empty(batch, dtype=dtype), True)


def _run_many(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The loss of more samples than one program finishes."""
    batch = aligned_v_finish_kernels.SAMPLES + 1
    output = torch.empty(batch, *shape, dtype=dtype)
    ones = torch.ones(batch, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    aligned_v_kernels.forward(output, output, ones, None, None, None, None, 1e-4, True)


def _run_far(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Samples 2^31 elements apart, whose strides need 64 bits; on the meta device, which has no memory to give."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    inner = torch.empty(0, *shape).stride()[1:]

    def far(rows: int, dtype: torch.dtype = wide) -> torch.Tensor:
        return torch.empty_strided((rows, *shape), (2**31, *inner), dtype=dtype, device="meta")

    values = torch.zeros(2, dtype=wide, device="meta")
    stats = torch.zeros(aligned_v_kernels.STATS, 2, dtype=wide, device="meta")
    output, doubled, state = far(2, dtype), far(4, dtype), far(2)
    operands = (output, state, values, values, state, values, values)
    aligned_v_kernels.forward(*operands, 1e-4, True)
    aligned_v_kernels.backward(values[0], *operands, stats, True)
    guided_step_kernels.step(state, doubled, values, values, values, values, far(2), far(4, dtype), True)
    chord = torch.empty_like(state), torch.empty_like(state), torch.empty_like(state, dtype=dtype)
    chord_kernels.chord(state, state, values, values, *chord, True)
    for rescale in (None, values):
        guidance_kernels.combine(doubled, values, rescale, far(2, dtype), True)


def _run_optimizer(size: int, dtype: torch.dtype, offset: bool) -> None:
    """Gradients and copies in ``dtype``, states in fp32 or 8 bits; scalars from the host, and all of them on the device."""

    def empty(count: int = size, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(count + 16, dtype=dtype)[1 if offset else 0 :][:count]

    one, shares = torch.ones(()), -(-size // adamw_kernels.SHARE)
    numbers = adamw_kernels.Numbers(*[0.5] * len(adamw_kernels.Numbers._fields))
    param, grad = empty(), empty(dtype=dtype)
    codes = (empty(dtype=torch.uint8) for _ in range(2))
    single = adamw_kernels.Moments(empty(), empty())
    packed = adamw_kernels.Moments(*codes, empty(shares), empty(shares), torch.empty(256), torch.empty(256))
    full = empty(), empty(dtype=dtype), adamw_kernels.Scalars(one, one, one, one)
    bare = None, None, adamw_kernels.Scalars(None, None, None, None)
    for rest in (full, bare):
        for moments in (single, packed):
            adamw_kernels.adamw(param, grad, moments, *rest, numbers)
