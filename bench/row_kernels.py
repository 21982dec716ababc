"""Peers in Triton: the aligned-v loss as kernel libraries for language models write losses, and an empty kernel.

One program a sample walks its row in blocks, twice: sums, then the gradient, which is stored in the forward and
multiplied by the incoming gradient in the backward. The guard "is the incoming gradient one?" of such libraries is left
out: it syncs with the host. 1 - cosine comes from the plain dot product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _empty_kernel():
    pass


@triton.jit
def _row_kernel(
    output,  # [B, N]
    target,  # [B, N]
    direction_weight,  # [B]
    losses,  # [B]
    grad,  # [B, N] or None
    N,
    BATCH,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    dd = tl.zeros([BLOCK], tl.float32)
    pp = tl.zeros([BLOCK], tl.float32)
    vv = tl.zeros([BLOCK], tl.float32)
    pv = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        m_n = start + o_n < N
        p = tl.load(output + row * N + start + o_n, mask=m_n, other=0.0).to(tl.float32)
        v = tl.load(target + row * N + start + o_n, mask=m_n, other=0.0).to(tl.float32)
        dd += (p - v) * (p - v)
        pp += p * p
        vv += v * v
        pv += p * v
    weight = tl.load(direction_weight + row).to(tl.float32)
    p_norm = tl.maximum(tl.sqrt(tl.sum(pp)), EPS)
    v_norm = tl.maximum(tl.sqrt(tl.sum(vv)), EPS)
    cosine = tl.sum(pv) / (p_norm * v_norm)
    tl.store(losses + row, tl.sum(dd) / N + weight * (1.0 - cosine))
    if grad is not None:
        c_d = 2.0 / N / BATCH
        c_p = weight * cosine / (p_norm * p_norm) / BATCH
        c_v = weight / (p_norm * v_norm) / BATCH
        for start in range(0, N, BLOCK):
            m_n = start + o_n < N
            p = tl.load(output + row * N + start + o_n, mask=m_n, other=0.0).to(tl.float32)
            v = tl.load(target + row * N + start + o_n, mask=m_n, other=0.0).to(tl.float32)
            tl.store(grad + row * N + start + o_n, (c_d * (p - v) + c_p * p - c_v * v).to(grad.dtype.element_ty), m_n)


class RowLoss(torch.autograd.Function):
    """loss = mean over the batch of mse + direction_weight (1 - cosine); tensors [B, ...] contiguous."""

    @staticmethod
    def forward(ctx, output: Tensor, target: Tensor, direction_weight: Tensor) -> Tensor:
        batch, size = output.shape[0], output[0].numel()
        losses = torch.empty(batch, dtype=torch.float32, device=output.device)
        grad = torch.empty_like(output) if output.requires_grad else None
        _row_kernel[(batch,)](
            output, target, direction_weight, losses, grad, size, batch, EPS=1e-8,
            BLOCK=min(BLOCK, triton.next_power_of_2(size)), num_warps=8,
        )  # fmt: skip
        if grad is not None:
            ctx.save_for_backward(grad)
        return losses.mean()

    @staticmethod
    def backward(ctx, incoming: Tensor):
        return ctx.saved_tensors[0] * incoming, None, None


def row_loss(output: Tensor, target: Tensor, direction_weight: Tensor) -> Tensor:
    return RowLoss.apply(output, target, direction_weight)


def empty() -> None:
    """One launch that does nothing: the floor of every time beside it."""
    _empty_kernel[(1,)]()
