"""Triton kernel of :func:`reflow_kernels.fused_adamw` and of its 8-bit form: each state is read and written once."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .adamw_reference import BLOCK as SHARE
from .tiles import divide, lerp, load, square_root, store

CHUNK = 1024  # elements a program handles, 8 a lane; half of both where they lie at any address, which takes registers


class Numbers(NamedTuple):
    """What a step needs besides tensors, in the order of the kernel's arguments; given by name.

    Those that live on the device are given as one-element tensors (:class:`Scalars`) and then not read here.
    """

    rate: float
    shrink: float  # 1 - rate * weight_decay
    weight_decay: float
    correction1: float  # 1 - beta1^step
    root2: float  # sqrt(1 - beta2^step)
    weight1: float  # 1 - beta1
    beta2: float
    weight2: float  # 1 - beta2
    eps: float
    average_weight: float  # 1 - decay
    logarithm1: float  # log beta1, as the next for a step on the device
    logarithm2: float


class Moments(NamedTuple):
    """Both moments [N]: in fp32, or codes of 8 bits with the scale of each block of 256 and their maps [256]."""

    state1: Tensor
    state2: Tensor
    absmax1: Tensor | None = None
    absmax2: Tensor | None = None
    qmap1: Tensor | None = None
    qmap2: Tensor | None = None


class Scalars(NamedTuple):
    """One-element tensors on the device, or None where :class:`Numbers` says it."""

    grad_scale: Tensor | None
    learning_rate: Tensor | None
    step: Tensor | None
    decay: Tensor | None


@triton.jit
def _remainder(logarithm, step):
    """1 - beta^step = -expm1(step log beta), without cancellation at the first steps."""
    x = logarithm * step
    tail = 1.0 + x / 5.0 * (1.0 + x / 6.0 * (1.0 + x / 7.0 * (1.0 + x / 8.0)))
    series = -x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * tail)))
    return tl.where(x > -0.5, series, 1.0 - tl.exp(x))


@triton.jit
def _nearest(qmap, b_share):
    """The entry of an ascending map of 256 that is nearest to each value, the lower one where two are equally near."""
    b_place = tl.zeros_like(b_share).to(tl.int32)
    for bit in tl.static_range(8):
        b_probe = b_place + (128 >> bit)
        b_place = tl.where(tl.load(qmap + b_probe) <= b_share, b_probe, b_place)
    b_next = tl.minimum(b_place + 1, 255)
    b_middle = (tl.load(qmap + b_place) + tl.load(qmap + b_next)) * 0.5
    return tl.where(b_share > b_middle, b_next, b_place)


@triton.jit
def _pack(b_moment, state, absmax, qmap, offsets, mask, o_block, m_block, EVEN: tl.constexpr):
    """Store a moment [ROWS, 256] in 8 bits, each row with its own scale."""
    b_scale = tl.max(tl.abs(b_moment), 1)  # [ROWS]
    tl.store(absmax + o_block, b_scale, mask=m_block)
    b_divisor = tl.zeros_like(b_moment) + tl.where(b_scale > 0, b_scale, 1.0)[:, None]
    b_code = _nearest(qmap, divide(b_moment, b_divisor, tl.float32)).to(tl.uint8)
    if EVEN:
        tl.store(state + offsets, b_code)
    else:
        tl.store(state + offsets, b_code, mask=mask)


@triton.jit
def _unpack(state, absmax, qmap, offsets, mask, o_block, m_block, EVEN: tl.constexpr):
    """A moment [ROWS, SHARE] in fp32; 0 beyond its end."""
    if absmax is None:
        b_moment = load(state, offsets, mask, tl.float32, EVEN)
    else:
        if EVEN:
            b_code = tl.load(state + offsets)
        else:
            b_code = tl.load(state + offsets, mask=mask, other=0)
        b_scale = tl.load(absmax + o_block, mask=m_block, other=0.0)
        b_moment = tl.load(qmap + b_code.to(tl.int32)) * b_scale[:, None]
        if not EVEN:
            b_moment = tl.where(mask, b_moment, 0.0)
    return b_moment


@triton.jit
def _adamw_kernel(
    param,  # [N], as the next three
    grad,
    state1,  # fp32, or codes of 8 bits, as the next
    state2,
    absmax1,  # [ceil(N / SHARE)], as the next; None, as the next three, where the moments are fp32
    absmax2,
    qmap1,  # [256], as the next
    qmap2,
    average,  # [N], or None without an average
    copy,  # [N], or None without a copy
    grad_scale,  # one element, as the three below, or None
    learning_rate,
    step,
    decay,
    N,
    rate,  # from here on the fields of Numbers, in their order
    shrink,
    weight_decay,
    correction1,
    root2,
    weight1,
    beta2,
    weight2,
    eps,
    average_weight,
    logarithm1,
    logarithm2,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCK // SHARE
    o_block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    o_n = o_block[:, None] * SHARE + tl.arange(0, SHARE)[None, :]  # [ROWS, SHARE]
    m_n = o_n < N
    m_block = o_block * SHARE < N
    b_param = load(param, o_n, m_n, tl.float32, EVEN)
    b_grad = load(grad, o_n, m_n, tl.float32, EVEN)
    b_first = _unpack(state1, absmax1, qmap1, o_n, m_n, o_block, m_block, EVEN)
    b_second = _unpack(state2, absmax2, qmap2, o_n, m_n, o_block, m_block, EVEN)
    if grad_scale is not None:
        b_grad = b_grad * tl.load(grad_scale).to(tl.float32)
    b_first = lerp(b_first, b_grad, weight1)
    b_second = b_second * beta2 + weight2 * (b_grad * b_grad)
    # Divisions take registers beside all that is still needed: moments in fp32 go before them, and what is divided for
    # the 8-bit ones comes last.
    if absmax1 is None:
        store(state1, o_n, b_first, m_n, EVEN)
        store(state2, o_n, b_second, m_n, EVEN)

    if step is not None:
        number = tl.load(step).to(tl.float32)
        correction1 = _remainder(logarithm1, number)
        root2 = square_root(_remainder(logarithm2, number), tl.float32)
    if learning_rate is not None:
        rate = tl.load(learning_rate).to(tl.float32)
        shrink = 1.0 - rate * weight_decay
    b_zero = tl.zeros_like(b_param)
    b_denominator = divide(square_root(b_second, tl.float32), b_zero + root2, tl.float32) + eps
    b_size = divide(b_zero + rate, b_zero + correction1, tl.float32)
    b_param = b_param * shrink - b_size * divide(b_first, b_denominator, tl.float32)
    store(param, o_n, b_param, m_n, EVEN)
    if average is not None:
        b_average = load(average, o_n, m_n, tl.float32, EVEN)
        if decay is not None:
            average_weight = (1.0 - tl.load(decay)).to(tl.float32)
        store(average, o_n, lerp(b_average, b_param, b_zero + average_weight), m_n, EVEN)
    if copy is not None:
        store(copy, o_n, b_param, m_n, EVEN)
    if absmax1 is not None:
        _pack(b_first, state1, absmax1, qmap1, o_n, m_n, o_block, m_block, EVEN)
        _pack(b_second, state2, absmax2, qmap2, o_n, m_n, o_block, m_block, EVEN)


def adamw(
    param: Tensor,
    grad: Tensor,
    moments: Moments,
    average: Tensor | None,
    copy: Tensor | None,
    scalars: Scalars,
    numbers: Numbers,
) -> None:
    """One launch over flat tensors [N], nothing of which is kept."""
    operands = (param, grad, *moments, average, copy, *scalars)
    launch.start(prepare(param, grad, moments, average, copy), *operands, param.numel(), *numbers)


def prepare(
    param: Tensor, grad: Tensor, moments: Moments, average: Tensor | None, copy: Tensor | None
) -> launch.Launch:
    """The launch for tensors of this size; its numbers change from step to step and are given with the tensors."""
    size = param.numel()
    block = _block(param, grad, *moments[:2], average, copy)
    if moments.absmax1 is None:
        block = min(block, max(128, launch.power_of_two(size)))
    warps = min(max(CHUNK // (8 * launch._LANES), 1), max(block // (4 * launch._LANES), 1))
    return launch.Launch(
        _adamw_kernel,
        -(-size // block),
        warps,
        (),
        SHARE=block if moments.absmax1 is None else SHARE,
        BLOCK=block,
        EVEN=size % block == 0,
    )


def _block(*tensors: Tensor | None) -> int:
    """Elements a program handles, by whether Triton can tell that each of its 16-byte accesses is whole."""
    given = [tensor for tensor in tensors if tensor is not None]
    whole = given[0].numel() % 16 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in given)
    return CHUNK if whole else CHUNK // 2
