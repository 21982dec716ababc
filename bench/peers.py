"""Every way to do what the four ops do: as published, in fair eager PyTorch, compiled, and ours.

Functions take the operands of a case and return tensors. "published" is what PeRFlow's and ProReflow's code does, host
syncs and half-precision states included; "eager" is the best that plain PyTorch does: coefficients folded and on the
device, an fp32 state, no sync, buffers that are reused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import reflow_kernels
from reflow_kernels import dispatch

DIRECTION_WEIGHT, GUIDANCE, RESCALE = 0.1, 7.5, 0.7
COMPILED = {"compile": {}, "compile-cooperative": {"triton.cooperative_reductions": True}}


def ours_backend(device: torch.device) -> tuple[str, str]:
    """(backend for our ops, what a reader must know about it)."""
    if device.type == "cuda":
        return "triton", ""
    if dispatch.interpreting():
        return "triton", "Triton's CPU interpreter"
    return "torch", "the PyTorch reference: no GPU, and TRITON_INTERPRET is not 1"


def compiled(function: Callable, name: str, device: torch.device) -> tuple[Callable, str]:
    """(function under torch.compile, a note). On a CPU the graph is captured and run without generated code."""
    import torch._dynamo
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # backward-only timing runs a backward many times
    # A new shape must never fall back to eager quietly.
    torch._dynamo.config.recompile_limit = 512
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if device.type != "cuda":
        return torch.compile(function, backend="aot_eager", dynamic=False), "on a CPU with the aot_eager backend"
    return torch.compile(function, dynamic=False, options=COMPILED[name] or None), ""


# ---- the aligned-v loss: (output, target, weight [B]) -> scalar, differentiable in output --------------------------


def loss_published(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """F.mse_loss and F.cosine_similarity on fp32 copies, and the logged value read by the host."""
    prediction, velocity = output.float(), target.float()
    loss = F.mse_loss(prediction, velocity, reduction="mean")
    cosine = F.cosine_similarity(prediction.flatten(1), velocity.flatten(1), dim=1)
    loss = loss + (weight * (1.0 - cosine)).mean()
    loss.detach().item()
    return loss


class EagerLoss(torch.autograd.Function):
    """The loss and its closed-form gradient in as few plain calls as there are: fp32 copies kept, no sync."""

    @staticmethod
    def forward(ctx, output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        p, v = output.flatten(1).float(), target.flatten(1).float()
        d = p - v
        p_norm, v_norm, d_norm = (torch.linalg.vector_norm(rows, dim=1) for rows in (p, v, d))
        inverse = (p_norm * v_norm).clamp_(min=1e-8).reciprocal_()
        cosine = torch.linalg.vecdot(p, v) * inverse
        ctx.save_for_backward(p, v, d, p_norm, inverse, cosine, weight)
        ctx.of = output.shape, output.dtype
        loss = d_norm.square().div_(p.shape[1])
        return torch.addcmul(loss, weight, 1 - cosine).mean()

    @staticmethod
    def backward(ctx, incoming: Tensor):
        p, v, d, p_norm, inverse, cosine, weight = ctx.saved_tensors
        shape, dtype = ctx.of
        scaled = weight * (incoming / p.shape[0])
        grad = d * (incoming * (2 / p.numel()))
        grad.addcmul_(p, (scaled * cosine / p_norm.square()).unsqueeze(1))
        grad.addcmul_(v, (scaled * inverse).unsqueeze(1), value=-1)
        return grad.to(dtype).view(shape), None, None


def loss_eager(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return EagerLoss.apply(output, target, weight)


def loss_function(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """What a compiler is given: the formula in fp32, gradients by autograd."""
    prediction, velocity = output.flatten(1).float(), target.flatten(1).float()
    mse = (prediction - velocity).square().mean(1)
    norms = torch.linalg.vector_norm(prediction, dim=1) * torch.linalg.vector_norm(velocity, dim=1)
    cosine = (prediction * velocity).sum(1) / norms.clamp(min=1e-8)
    return (mse + weight * (1.0 - cosine)).mean()


def loss_row(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    from bench import row_kernels

    return row_kernels.row_loss(output, target, weight)


def loss_ours(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return reflow_kernels.aligned_v_loss(output, target, direction_weight=weight, backend=backend).loss

    return run


# ---- one guided step: state, [uncond; cond] -> (state', the doubled network input) ---------------------------------


@dataclasses.dataclass
class Step:
    """Operands of one DDIM step with guidance; coefficients [B] fp32, buffers for peers that reuse memory."""

    state: Tensor
    output: Tensor  # [2B, ...]
    timesteps: Tensor  # [B] long, on the device
    previous: Tensor
    alphas: Tensor  # the table of alpha_bar, fp64
    out: Tensor
    input_out: Tensor

    @classmethod
    def make(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Step:
        batch = shape[0]
        state = torch.randn(shape, generator=generator, device=device)
        half = torch.randn(shape, generator=generator, device=device)
        other = half + 0.1 * torch.randn(shape, generator=generator, device=device)
        steps = torch.linspace(0.2, 0.9, batch, device=device).mul(1000).long()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64, device=device).square()
        alphas = torch.cumprod(1.0 - betas, 0)
        return cls(
            state, torch.cat([half, other]).to(dtype), steps, steps - 100, alphas,
            torch.empty_like(state), torch.empty((2 * batch, *shape[1:]), dtype=dtype, device=device),
        )  # fmt: skip

    def coefficients(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(state_coef, output_coef), [B]: z' = state_coef z + output_coef eps."""
        a, b = self.alphas[self.timesteps], self.alphas[self.previous]
        return (b / a).sqrt().to(dtype), ((1 - b).sqrt() - (b * (1 - a) / a).sqrt()).to(dtype)


def step_published(case: Step) -> Callable[[], Any]:
    """PeRFlow's solver: timesteps to the host, alphas filled in a Python loop and copied back, a bf16 or fp16 state."""
    dtype = case.output.dtype
    latents, table = case.state.to(dtype), case.alphas.to(dtype).tolist()
    shape = (-1,) + (1,) * (latents.dim() - 1)

    def run() -> Any:
        times, previous = case.timesteps.cpu().tolist(), case.previous.cpu().tolist()
        now, then = [0.0] * len(times), [0.0] * len(times)
        for i in range(len(times)):
            now[i], then[i] = table[times[i]], table[previous[i]]
        alpha, alpha_next = (torch.tensor(v, dtype=dtype).to(latents.device).reshape(shape) for v in (now, then))
        uncond, cond = case.output.chunk(2)
        noise = uncond + GUIDANCE * (cond - uncond)
        beta = 1 - alpha
        data = (latents - beta**0.5 * noise) / alpha**0.5
        direction = (1 - alpha_next) ** 0.5 * noise
        state = alpha_next**0.5 * data + direction
        return state, torch.cat([state] * 2)

    return run


def step_eager(case: Step) -> Callable[[], Any]:
    """Folded coefficients, an fp32 state, buffers: cast, lerp, two multiply-adds, one copy into both halves."""
    shape = (-1,) + (1,) * (case.state.dim() - 1)
    a, b = (value.reshape(shape) for value in case.coefficients())
    scale = torch.full_like(a, GUIDANCE)
    halves = case.input_out.view(2, *case.state.shape)

    def run() -> Any:
        uncond, cond = case.output.float().chunk(2)
        guided = torch.lerp(uncond, cond, scale)
        torch.mul(case.state, a, out=case.out)
        case.out.addcmul_(guided, b)
        halves.copy_(case.out)
        return case.out, case.input_out

    return run


def step_function(state: Tensor, output: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The step as a function for torch.compile; a, b and scale broadcast."""
    uncond, cond = output.chunk(2)
    state = a * state + b * torch.lerp(uncond.float(), cond.float(), scale)
    return state, state.to(output.dtype).repeat((2,) + (1,) * (state.dim() - 1))


def step_compiled(case: Step, name: str) -> tuple[Callable[[], Any], str]:
    shape = (-1,) + (1,) * (case.state.dim() - 1)
    a, b = (value.reshape(shape) for value in case.coefficients())
    scale = torch.full_like(a, GUIDANCE)
    function, note = compiled(step_function, name, case.state.device)
    return lambda: function(case.state, case.output, a, b, scale), note


def step_ours(case: Step, backend: str) -> Callable[[], Any]:
    a, b = case.coefficients()
    scale = torch.full_like(a, GUIDANCE)
    return lambda: reflow_kernels.guided_step(
        case.state, case.output, a, b, guidance_scale=scale, out=case.out, input_out=case.input_out, backend=backend
    )


# ---- the chord of a window: ends, tau, dt -> (z_t, velocity, the network's input) ----------------------------------


def chord_published(start: Tensor, end: Tensor, tau: Tensor, dt: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """PeRFlow's script: ends in the network's dtype, times per sample broadcast, the target taken once more."""
    shape = (-1,) + (1,) * (start.dim() - 1)
    start, end = start.to(dtype), end.to(dtype)
    t_start = torch.ones_like(dt)
    t_end, t = t_start + dt, t_start + tau * dt
    passed = (t - t_start).reshape(shape).to(dtype)
    latents = start + (end - start) / (t_end - t_start).reshape(shape).to(dtype) * passed
    velocity = (end - start) / (t_end - t_start).reshape(shape).to(dtype)
    return latents, velocity, latents.to(dtype)


def chord_eager(start: Tensor, end: Tensor, tau: Tensor, dt: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """tau and dt broadcast already: lerp, subtract, divide in place, cast."""
    z_t = torch.lerp(start, end, tau)
    return z_t, torch.sub(end, start).div_(dt), z_t.to(dtype, copy=True)


def chord_function(start: Tensor, end: Tensor, tau: Tensor, dt: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    z_t = torch.lerp(start, end, tau)
    return z_t, (end - start) / dt, z_t.to(dtype, copy=True)


# ---- guidance of a doubled batch ----------------------------------------------------------------------------------


def guidance_published(output: Tensor, scale: float, rescale: float) -> Tensor:
    """diffusers' pipelines: three calls, and rescale_noise_cfg with standard deviations of the cast tensors."""
    uncond, cond = output.chunk(2)
    guided = uncond + scale * (cond - uncond)
    if rescale:
        dims = list(range(1, guided.dim()))
        spread_cond, spread = cond.std(dim=dims, keepdim=True), guided.std(dim=dims, keepdim=True)
        guided = rescale * (guided * (spread_cond / spread)) + (1 - rescale) * guided
    return guided


def guidance_eager(output: Tensor, scale: Tensor, rescale: float) -> Tensor:
    """One lerp, which computes in fp32 by itself; the factors of the rescale folded into one multiplication."""
    uncond, cond = output.chunk(2)
    if not rescale:
        return torch.lerp(uncond, cond, scale.to(output.dtype))
    guided = torch.lerp(uncond.float(), cond.float(), scale)
    dims = list(range(1, guided.dim()))
    ratio = cond.float().std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return guided.mul_((ratio - 1).mul_(rescale).add_(1)).to(output.dtype)


def guidance_function(output: Tensor, scale: Tensor, rescale: float) -> Tensor:
    uncond, cond = output.float().chunk(2)
    guided = torch.lerp(uncond, cond, scale)
    if rescale:
        dims = list(range(1, guided.dim()))
        ratio = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
        guided = guided * (1 + rescale * (ratio - 1))
    return guided.to(output.dtype)
