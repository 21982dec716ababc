"""Device functions shared by the kernels. Loads are cast before any arithmetic: raw bf16 arithmetic is wrong in the
interpreter, and the accumulation dtype is the contract everywhere."""

import torch
import triton
import triton.language as tl


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The Triton dtype of an accumulation dtype."""
    return tl.float64 if dtype is torch.float64 else tl.float32


@triton.jit
def load(pointer, offsets, mask, ACC: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        values = tl.load(pointer + offsets)
    else:
        values = tl.load(pointer + offsets, mask=mask, other=0.0)
    return values.to(ACC)


@triton.jit
def store(pointer, offsets, values, mask, EVEN: tl.constexpr):
    if pointer.dtype.element_ty == tl.bfloat16:
        values = values.to(tl.float32)  # the interpreter has no cast from fp64 to bf16
    values = values.to(pointer.dtype.element_ty)
    if EVEN:
        tl.store(pointer + offsets, values)
    else:
        tl.store(pointer + offsets, values, mask=mask)


@triton.jit
def lerp(start, end, weight):
    """start + weight (end - start), exact at weight 0 and 1; the formula of torch.lerp."""
    difference = end - start
    return tl.where(tl.abs(weight) < 0.5, start + weight * difference, end - difference * (1.0 - weight))


@triton.jit
def divide(numerator, denominator, ACC: tl.constexpr):
    """Correctly rounded quotient: plain fp32 division is an approximation on a GPU."""
    if ACC == tl.float32:
        return tl.math.div_rn(numerator, denominator)
    else:
        return numerator / denominator


@triton.jit
def square_root(value, ACC: tl.constexpr):
    """Correctly rounded square root."""
    if ACC == tl.float32:
        return tl.math.sqrt_rn(value)
    else:
        return tl.sqrt(value)
