"""The specification: every op in plain PyTorch, on any device and in any float dtype (fp64 too).

Arithmetic is fp32, or fp64 where an operand is fp64; operands are cast before anything is computed. ``[B]`` marks a
value per sample, which may also be a float. Time runs from t=1 (noise) to t=0 (data).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .adamw_reference import dynamic_map, fused_adamw, fused_adamw8bit, quantize

__all__ = [
    "AlignedVLoss",
    "aligned_v_loss",
    "aligned_v_loss_backward",
    "cfg_combine",
    "dynamic_map",
    "fused_adamw",
    "fused_adamw8bit",
    "guided_step",
    "quantize",
    "window_chord",
]

PerSample = Tensor | float


class AlignedVLoss(NamedTuple):
    """What :func:`aligned_v_loss` returns: ``loss`` is a scalar, the other three are [B] and carry no gradient."""

    loss: Tensor
    mse: Tensor
    magnitude: Tensor
    cosine: Tensor


def aligned_v_loss(
    model_output: Tensor,
    target: Tensor,
    *,
    direction_weight: PerSample,
    sample: Tensor | None = None,
    sample_coef: PerSample | None = None,
    output_coef: PerSample | None = None,
    weight: PerSample | None = None,
    eps: float = 1e-4,
) -> AlignedVLoss:
    """Magnitude and direction of a predicted velocity against its target (ProReflow, arXiv 2503.04824, eq. 6 and 7).

    v^ = sample_coef * sample + output_coef * model_output (or model_output alone), v = target, d = v^ - v,
    P = max(|v^|, eps sqrt(N)) and V = max(|v|, eps sqrt(N)), constants where clamped, N elements a sample:

        mse = |d|^2 / N      magnitude = (|v^| - |v|)^2 / N      1 - cosine = |v^/P - v/V|^2 / 2
        loss = mean over the batch of weight * (mse + direction_weight * (1 - cosine));   0 for an empty batch

    The cosine part has no gradient where the target is exactly zero.
    """
    return AlignedV(model_output, target, sample, sample_coef, output_coef, eps).loss(direction_weight, weight)


def aligned_v_loss_backward(
    grad_loss: Tensor,
    model_output: Tensor,
    target: Tensor,
    *,
    direction_weight: PerSample,
    sample: Tensor | None = None,
    sample_coef: PerSample | None = None,
    output_coef: PerSample | None = None,
    weight: PerSample | None = None,
    eps: float = 1e-4,
) -> Tensor:
    """The gradient of ``loss`` to ``model_output`` in closed form, in ``model_output``'s dtype.

    With u = v^/P - v/V the cosine part's gradient to v^ is (u - (u . v^/P) v^/P) / P, or u / P where P is clamped.
    """
    parts = AlignedV(model_output, target, sample, sample_coef, output_coef, eps)
    return parts.gradient(grad_loss, model_output, direction_weight, weight, output_coef)


class AlignedV:
    """The quantities of the aligned-v loss, rows flattened to [B, N]; norms are those of the scaled rows.

    Who takes the loss and its gradient of the same operands makes them once. What only the loss needs is taken when it
    is asked for.
    """

    def __init__(
        self,
        model_output: Tensor,
        target: Tensor,
        sample: Tensor | None,
        sample_coef: PerSample | None,
        output_coef: PerSample | None,
        eps: float,
    ) -> None:
        self.dtype = accumulate_dtype(model_output, target, sample)
        batch = model_output.shape[0]
        self.size = math.prod(model_output.shape[1:])
        prediction = model_output.to(self.dtype).reshape(batch, self.size)
        velocity = target.to(self.dtype).reshape(batch, self.size)
        if sample is not None:
            assert sample_coef is not None and output_coef is not None
            rows = sample.to(self.dtype).reshape(batch, self.size)
            prediction = _column(sample_coef, rows) * rows + _column(output_coef, rows) * prediction
        self.error = prediction - velocity

        # Rows with huge elements are scaled by a power of two (exact), so that no square overflows; None: no row is.
        self.scale, self.target_scale, target_peak = _shrink(prediction, velocity)
        self.active = target_peak > 0
        self.prediction, self.velocity = _scaled(prediction, self.scale), _scaled(velocity, self.target_scale)
        self.prediction_norm = torch.linalg.vector_norm(self.prediction, dim=1, keepdim=True)
        self.target_norm = torch.linalg.vector_norm(self.velocity, dim=1, keepdim=True)
        floor = eps * math.sqrt(self.size)
        least = _scaled(floor, self.scale)
        self.free = self.prediction_norm > least
        self.floored_prediction = torch.where(self.free, self.prediction_norm, least)
        floored_target = self.target_norm.clamp(min=_scaled(floor, self.target_scale))
        self.unit = self.prediction / self.floored_prediction
        self.unit_difference = self.unit - self.velocity / floored_target

    def loss(self, direction_weight: PerSample, weight: PerSample | None) -> AlignedVLoss:
        """As :func:`aligned_v_loss` returns it."""
        direction = torch.where(self.active, self.one_minus_cosine, self.one_minus_cosine.detach())
        losses = self.mse + _cast(direction_weight, self.dtype) * direction
        if weight is not None:
            losses = _cast(weight, self.dtype) * losses
        loss = losses.mean() if losses.numel() else losses.sum()
        cosine = 1 - self.one_minus_cosine
        return AlignedVLoss(loss, self.mse.detach(), self.magnitude.detach(), cosine.detach())

    def gradient(
        self,
        grad_loss: Tensor,
        model_output: Tensor,
        direction_weight: PerSample,
        weight: PerSample | None,
        output_coef: PerSample | None,
    ) -> Tensor:
        """As :func:`aligned_v_loss_backward` returns it."""
        along = (self.unit_difference * self.unit).sum(1, keepdim=True) * self.free
        scale = 1.0 if self.scale is None else self.scale
        direction = (self.unit_difference - along * self.unit) * (scale / self.floored_prediction)
        direction = direction * (_column(direction_weight, direction) * self.active.unsqueeze(1))
        factor = grad_loss.to(self.dtype) / max(direction.shape[0], 1)
        if weight is not None:
            factor = factor * _column(weight, direction)
        if output_coef is not None:
            factor = factor * _column(output_coef, direction)
        grad: Tensor = factor * (self.error * (2 / max(self.size, 1)) + direction)
        return grad.reshape(model_output.shape).to(model_output.dtype)

    @functools.cached_property
    def mse(self) -> Tensor:
        mse: Tensor = self.error.square().sum(1) / max(self.size, 1)
        return mse

    @functools.cached_property
    def one_minus_cosine(self) -> Tensor:
        missing: Tensor = self.unit_difference.square().sum(1) / 2
        return missing

    @functools.cached_property
    def magnitude(self) -> Tensor:
        common = by = target_by = None  # one scale for both
        if self.scale is not None and self.target_scale is not None:
            common = torch.minimum(self.scale, self.target_scale)
            by, target_by = common / self.scale, common / self.target_scale
        # |v^| - |v| from the difference of the vectors, which stays accurate where the two are close.
        rows, target_rows = _scaled(self.prediction, by), _scaled(self.velocity, target_by)
        total = (_scaled(self.prediction_norm, by) + _scaled(self.target_norm, target_by)).squeeze(1)
        gap = ((rows - target_rows) * (rows + target_rows)).sum(1)
        gap = gap / torch.where(total > 0, total, 1.0)
        gap = gap if common is None else gap / common.squeeze(1)
        magnitude: Tensor = gap.square() / max(self.size, 1)
        return magnitude


def _shrink(prediction: Tensor, target: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(the scale [B, 1] of each, 1 except for rows with huge elements, or None for both where it is known that there
    are none; the target's largest absolute value [B])."""
    if not target.shape[1]:
        return None, None, target.new_zeros(target.shape[0])
    peak, target_peak = (torch.linalg.vector_norm(rows.detach(), math.inf, dim=1) for rows in (prediction, target))
    limit, shrink = (2.0**40, 2.0**-88) if target.dtype is torch.float32 else (2.0**400, 2.0**-624)
    # On a GPU nobody asks: that would wait for it. A tensor that is traced has no values to ask for.
    if dispatch.eager_on_cpu(target, prediction) and bool((torch.maximum(peak, target_peak) < limit).all()):
        return None, None, target_peak
    # Of two numbers `where` would make fp32, in which fp64's factor is 0.
    one, other = (torch.where(one < limit, torch.ones_like(one), shrink).unsqueeze(1) for one in (peak, target_peak))
    return one, other, target_peak


def _scaled(value: Any, scale: Tensor | None) -> Any:
    return value if scale is None else value * scale


def guided_step(
    state: Tensor,
    model_output: Tensor,
    state_coef: PerSample,
    output_coef: PerSample,
    *,
    guidance_scale: PerSample | None = None,
    input_scale: PerSample | None = None,
    input_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """One first-order ODE step: state' = state_coef * state + output_coef * guided(model_output), in state's dtype.

    Without ``guidance_scale`` model_output has B rows. With it, 2B rows [uncond; cond], guided = uncond + scale *
    (cond - uncond), and model_input comes back twice over. model_input = input_scale * state' in ``input_dtype``
    (default: model_output's dtype).
    """
    output = model_output.to(state.dtype)
    if guidance_scale is not None:
        output = _guided(output, guidance_scale)
    new_state = _column(state_coef, state) * state + _column(output_coef, state) * output
    scaled = new_state if input_scale is None else _column(input_scale, state) * new_state
    dtype = model_output.dtype if input_dtype is None else input_dtype
    model_input = scaled.to(dtype)
    if guidance_scale is not None:
        return new_state, torch.cat([model_input, model_input])
    return new_state, model_input.clone() if model_input is new_state else model_input


def window_chord(
    z_start: Tensor, z_end: Tensor, tau: PerSample, dt: PerSample, *, input_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Points on the straight line between a window's ends, its velocity, and the points cast for the network.

    z_t = z_start + tau (z_end - z_start), tau [B] or [M, B], 0 at z_start (noise side) and 1 at z_end;
    velocity = (z_end - z_start) / dt with dt = t_end - t_start < 0; model_input = z_t in ``input_dtype`` (default:
    z_start's dtype). z_t and model_input are [B, ...] or [M, B, ...], velocity is [B, ...].
    """
    tau = _cast(tau, z_start.dtype)
    if isinstance(tau, Tensor):
        tau = tau.reshape(tau.shape + (1,) * (z_start.dim() - 1))
    z_t = torch.lerp(z_start, z_end, tau)
    velocity = (z_end - z_start) / _column(dt, z_start)
    model_input = z_t.clone() if input_dtype in (None, z_t.dtype) else z_t.to(input_dtype)
    return z_t, velocity, model_input


def cfg_combine(model_output: Tensor, guidance_scale: PerSample, *, rescale: PerSample = 0.0) -> Tensor:
    """Classifier-free guidance of 2B rows [uncond; cond] to B rows, in model_output's dtype.

    guided = uncond + guidance_scale * (cond - uncond). With ``rescale`` r, guided is multiplied by
    1 + r (std(cond) / std(guided) - 1), standard deviations per sample (arXiv 2305.08891, section 3.4);
    a sample whose guided output is constant is left alone.
    """
    output = model_output.to(accumulate_dtype(model_output))
    guided = _guided(output, guidance_scale)
    if isinstance(rescale, Tensor) or rescale != 0:
        conditional, spread = _spread(output[guided.shape[0] :]), _spread(guided)
        ratio = torch.where(spread > 0, conditional / torch.where(spread > 0, spread, 1.0), 1.0)
        guided = guided * (1 + _column(rescale, guided) * (ratio - 1))
    return guided.to(model_output.dtype)


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 where one of the tensors is fp64, fp32 otherwise."""
    double = any(tensor is not None and tensor.dtype is torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def _guided(output: Tensor, scale: PerSample) -> Tensor:
    uncond, cond = output.chunk(2)
    return torch.lerp(uncond, cond, _column(scale, uncond))  # exact at 0 and at 1


def _spread(rows: Tensor) -> Tensor:
    """sqrt(N) times the standard deviation of each sample, shaped to broadcast."""
    if rows.dim() == 1:
        return torch.zeros_like(rows)
    dims = tuple(range(1, rows.dim()))
    spread: Tensor = torch.linalg.vector_norm(rows - rows.mean(dims, keepdim=True), dim=dims, keepdim=True)
    return spread


def _cast(value: PerSample, dtype: torch.dtype) -> PerSample:
    return value.to(dtype) if isinstance(value, Tensor) else value


def _column(value: PerSample, rows: Tensor) -> PerSample:
    """A [B] tensor shaped to broadcast over ``rows``; floats pass."""
    if not isinstance(value, Tensor):
        return value
    return value.to(rows.dtype).reshape((value.shape[0],) + (1,) * (rows.dim() - 1))
