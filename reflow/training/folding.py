"""What DeepSpeed does around an optimizer's step and reflow.training.fused can do in its pass: methods of its instance that are replaced.

Folded are the clip (a read and a write of every fp32 gradient), at ZeRO 1 to 3 the fp64 copy of the gradients whose norm is taken, at ZeRO 1 and 2 the search
for elements that are not finite, and at ZeRO 3 the cast of gradients to fp32 and the copy of the new weights. What DeepSpeed's `step` does in its own body
stays: README.md, "One pass", has its bytes. An optimizer that lacks a method keeps its own way, and the pass is told nothing then.
"""

from __future__ import annotations

from typing import Any

import torch

from reflow.training.fused import FusedAdamW


def fold(optimizer: Any, tail: FusedAdamW, stage: int, device: torch.device) -> None:
    """Let `tail`, which DeepSpeed's `optimizer` of this ZeRO stage steps, do what it can in its pass."""
    if hasattr(optimizer, "unscale_and_clip_grads"):
        clip_in_pass(optimizer, tail, stage, device)
    if hasattr(optimizer, "get_grad_norm_direct"):
        norm_in_one_read(optimizer)
    if stage in (1, 2) and getattr(optimizer, "compute_grad_norm", False) and hasattr(optimizer, "has_overflow"):
        # The norm is not finite where a gradient is not, and DeepSpeed drops the step for that too: a second look is left out.
        optimizer.has_overflow = lambda *_, **__: False
    if stage == 3:
        copy_in_pass(optimizer, tail)
        cast_in_pass(optimizer, tail)


def clip_in_pass(optimizer: Any, tail: FusedAdamW, stage: int, device: torch.device) -> None:
    """The factor that DeepSpeed would multiply the gradients by is handed on."""
    def scale(total_norm: Any) -> None:
        factor, limit = float(optimizer.loss_scale), optimizer.clip_grad
        if not limit and factor == 1.0:
            tail.scale = None
            return
        excess = torch.ones((), device=device)
        if limit:
            norm = torch.as_tensor(total_norm, dtype=torch.float32, device=device)
            # DeepSpeed marks a norm that is not finite by -1.
            excess = torch.where(norm < 0, torch.inf, ((norm / factor + 1e-6) / limit).clamp(min=1.0))
        tail.scale = 1.0 / (excess * factor)

    if stage:
        optimizer.unscale_and_clip_grads = lambda _, total_norm: scale(total_norm)
    else:
        optimizer.unscale_and_clip_grads = scale


def norm_in_one_read(optimizer: Any) -> None:
    """DeepSpeed's own sum over parameters and ranks, of norms instead of the gradients, which it would copy to fp64 first."""
    original = optimizer.get_grad_norm_direct

    def of_norms(gradients: Any, params: Any, norm_type: float = 2) -> Any:
        if norm_type != 2:
            return original(gradients, params, norm_type)
        parts = list(gradients)
        real = [g for g in parts if not getattr(g, "_zero_padding", False)]
        norms = iter(torch._foreach_norm(real, 2, dtype=torch.float32) if real else ())
        return original([g if getattr(g, "_zero_padding", False) else next(norms).view(1) for g in parts], params, norm_type)

    optimizer.get_grad_norm_direct = of_norms


def copy_in_pass(optimizer: Any, tail: FusedAdamW) -> None:
    """ZeRO 3: the pass writes the rank's flat share of the network's weights, which are then views of it as before."""
    masters, halves = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat
    original = optimizer._reassign_or_swap_out_partitioned_parameters
    for master, half in zip(masters, halves, strict=True):
        if half is not None and half.is_contiguous() and half.numel() == master.numel() and half.data_ptr() != master.data_ptr():
            tail.copies[id(master)] = half

    def reassign(group: int) -> None:
        name = id(masters[group])
        if name in tail.copied and tail.copies[name] is halves[group]:
            optimizer._unflatten_partitioned_parameters(group)
        else:
            original(group)
        tail.copied.discard(name)

    optimizer._reassign_or_swap_out_partitioned_parameters = reassign


def cast_in_pass(optimizer: Any, tail: FusedAdamW) -> None:
    """ZeRO 3: the pass reads the gradients in their own dtype, so that no fp32 copy of them is made."""
    def prepare(group: int) -> None:
        parts = optimizer.averaged_gradients[group]
        tail.gradients[id(optimizer.fp32_partitioned_groups_flat[group])] = optimizer.flatten(parts)
        for part in parts:
            if part.is_cuda:
                part.record_stream(torch.cuda.current_stream())
        optimizer.averaged_gradients[group] = None

    optimizer._prepare_fp32_grad_for_sub_group = prepare
