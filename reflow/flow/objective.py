"""What a student is trained on: where in a window, and how its output is compared with the chord.

Time runs from t=1 (noise) to t=0 (data); tau = 0 at a window's noisy start, 1 at its clean end. Per-sample
numbers are [B].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reflow_kernels import AlignedVLoss, aligned_v_loss

from .chord import ChordTable
from .prediction import ddim_coefficients, expand

TIME_DENSITIES = ("uniform", "u_shaped", "window_start", "exponential")
LOSSES = ("aligned_v", "mse", "pseudo_huber")
SPACES = ("velocity", "eps")
TIME_WEIGHTS = ("none", "reciprocal", "rcp_win")
WINDOW_WEIGHTS = ("none", "speed")
NORMALIZATIONS = ("none", "loss")
# Added to a loss that a sample is divided by: below it errors count as they are, and gradients stay bounded.
NORMAL_FLOOR = 1e-6
# Pseudo-Huber constants: per element as in PeRFlow and Rectified Diffusion, per sample and dimension as in rfpp.
HUBER_C = {"element": 1e-3, "sample": 5.4e-4}
_BELOW_ONE = 1.0 - 2.0**-24


def _check(value: str, known: tuple[str, ...], key: str) -> None:
    if value not in known:
        raise ValueError(f'{key} "{value}" is not known; known are ' + ", ".join(f'"{name}"' for name in known) + ".")


def sample_tau(
    u: Tensor, kind: str = "window_start", *, share: float = 0.5, upper: float = 0.7, sharpness: float = 4.0
) -> Tensor:
    """Places inside windows from uniforms: u [..., 2] in [0, 1) -> tau [...] in [0, 1), dtype and device of u.

    A deterministic function of u, so that a sample's time belongs to the sample alone. u[..., 0] makes the mixture's
    choice and u[..., 1] the place:

    "uniform"       all of the window (PeRFlow).
    "u_shaped"      rfpp's symmetric density a (e^{a tau} + e^{a (1-tau)}) / (2 (e^a - 1)) with a = `sharpness`, inside
                    the window (arXiv 2405.20320, code; the paper prints a one-sided form).
    "window_start"  the start itself for `share` of the samples, the rest uniform over [0, upper): a few-step student
                    is used at the starts, and the second half of a window hurts most.
    "exponential"   a e^{-a tau} / (1 - e^{-a}) with a = `sharpness`: most at the start, everywhere some. Simple
                    ReFlow's 10^t (arXiv 2410.07815) is a = ln 10; that it runs towards the noisy end is inferred.
    """
    _check(kind, TIME_DENSITIES, "time_density")
    choice, place = u[..., 0], u[..., 1]
    if kind == "uniform":
        return place.clone()
    if kind in ("u_shaped", "exponential"):
        if not sharpness > 0:
            raise ValueError(f'"{kind}" has sharpness {sharpness}; it must be above 0 (rfpp uses 4).')
        if kind == "exponential":
            return (-torch.log1p(place * math.expm1(-sharpness)) / sharpness).clamp(0.0, _BELOW_ONE)
        one_sided = torch.log1p(place * math.expm1(sharpness)) / sharpness
        return torch.where(choice < 0.5, one_sided, 1.0 - one_sided).clamp(0.0, _BELOW_ONE)
    if not (0.0 <= share <= 1.0 and 0.0 < upper <= 1.0):
        raise ValueError(f'"window_start" has share {share} and upper {upper}; both must be in [0, 1], upper above 0.')
    return torch.where(choice < share, torch.zeros_like(place), (place * upper).clamp(max=_BELOW_ONE))


def u_shaped_density(tau: Tensor, sharpness: float = 4.0) -> Tensor:
    """The density that "u_shaped" samples, on [0, 1]: 2.075 at both ends and .551 in the middle for sharpness 4."""
    a = sharpness
    return a * (torch.exp(a * tau) + torch.exp(a * (1.0 - tau))) / (2.0 * math.expm1(a))


def time_weight(kind: str, table: ChordTable, window: Tensor, t: Tensor) -> Tensor | None:
    """[B] loss weight by time, as PeRFlow's SDXL code names them; None for "none".

    "reciprocal": 1/max(1-t, .1)/2.3. "rcp_win": t_start of the window over the mean of all starts, (K+1)/(2K) for
    uniform windows from 1 to 0.
    """
    _check(kind, TIME_WEIGHTS, "time_weight")
    if kind == "none":
        return None
    if kind == "reciprocal":
        return 1.0 / (1.0 - t.to(table.dtype)).clamp(min=0.1) / 2.3
    return table.t_start[window] / table.t_start.mean()


def window_weight(kind: str, table: ChordTable, window: Tensor) -> Tensor | None:
    """[B] loss weight by window; None for "none".

    "speed": mean over all windows of their squared speeds, over the window's own. The squared velocity of the cleanest
    window is 11 (4 windows) to 26 times (8) that of the noisiest, and an unweighted loss counts equal shares so.
    """
    _check(kind, WINDOW_WEIGHTS, "window_weight")
    if kind == "none":
        return None
    square = table.speed**2
    return square.mean() / square[window]


def chord_loss(
    output: Tensor,
    target_velocity: Tensor,
    z_t: Tensor,
    table: ChordTable,
    window: Tensor,
    t: Tensor,
    *,
    kind: str = "aligned_v",
    space: str = "velocity",
    direction_weight: float = 1.0,
    direction_scale: str = "speed",
    weight: Tensor | None = None,
    huber_c: float | None = None,
    huber_norm: str = "element",
    normalize: str = "none",
) -> AlignedVLoss:
    """The student's chord velocity, read from `output` at z_t by `table`, against the window's (z_end - z_start)/dt.

    output, target_velocity, z_t [B, ...]; window, t and weight [B]. Only output gets a gradient. The loss is a scalar;
    mse, magnitude and cosine are [B], of velocities and without any weight, whatever the kind and the space.

    kind: "aligned_v" (ProReflow, arXiv 2503.04824: mse + a (1 - cosine)), "mse", or "pseudo_huber" (sqrt(d^2 + c^2) -
        c, by huber_norm per "element", averaged, or per "sample" with c = huber_c N, divided by N).
    space: "velocity", or "eps" to weight time as a noise-matching loss does: errors of eps^ are |D/E| times those of
        the velocity, so the MSE is exactly that of the two noises.
    direction_scale: "speed" takes a = direction_weight * speed^2 of the sample's window, which multiplies the
        direction part of the mse by 1 + direction_weight/2 in every window; "none" takes direction_weight as it is,
        which boosts the direction ~11 (K=4) to ~26 (K=8) times more in the noisiest window than in the cleanest.
    normalize: "loss" divides each sample's loss by its own detached value (Simple ReFlow, arXiv 2410.07815), before
        `weight`: the gradient is that of its logarithm, and the loss is near the mean weight whatever was learnt.
    """
    _check(normalize, NORMALIZATIONS, "normalize")
    _check(kind, LOSSES, "loss")
    _check(space, SPACES, "loss_space")
    _check(direction_scale, ("speed", "none"), "direction_scale")
    coefficients = None if table.prediction_type == "velocity" else table.velocity_coefficients(window, t)
    factor = table.eps_weight(window, t) if space == "eps" else None
    if kind == "pseudo_huber":
        scale = None if factor is None else factor.sqrt()
        return _pseudo_huber(output, target_velocity, z_t, coefficients, scale, weight, huber_c, huber_norm, normalize)
    if factor is not None and normalize == "none":  # else it divides itself out
        weight = factor if weight is None else factor * weight
    direction: float | Tensor = 0.0
    if kind == "aligned_v":
        direction = direction_weight * table.speed[window] ** 2 if direction_scale == "speed" else direction_weight
    return _aligned(output, target_velocity, z_t, coefficients, direction, weight, normalize)


def schedule_point(table: ChordTable, z_start: Tensor, z_end: Tensor, window: Tensor, t: Tensor) -> Tensor:
    """The point at time t on the noise schedule of the pair's own (x0, eps): alpha_t x* + sigma_t eps*, [B, ...].

    x* and eps* are what z_start and z_end determine together, so this is phased rectified diffusion's intermediate
    point (arXiv 2410.07303), alpha_t (z_s/alpha_s + (nsr_t - nsr_s) eps*), also where alpha_s is 0. The chord point of
    the same time lies 2 to 7 % away at four windows.
    """
    alpha, sigma = (value.to(table.dtype) for value in table.schedule.alpha_sigma(t.double()))
    a_s, s_s = table.alpha_start[window], table.sigma_start[window]
    a_e, s_e = table.alpha_end[window], table.sigma_end[window]
    cross = s_e * a_s - a_e * s_s
    from_start, from_end = (alpha * s_e - sigma * a_e) / cross, (sigma * a_s - alpha * s_s) / cross
    return expand(from_start, z_start) * z_start + expand(from_end, z_end) * z_end


def schedule_end_coefficients(table: ChordTable, window: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q), both [B]: z_end^ = p z_t + q output, a DDIM step from the noise schedule to the window's end."""
    kinds = {"ddim_eps": "epsilon", "ddim_v": "v_prediction"}
    if table.prediction_type not in kinds:
        raise ValueError(
            'Points on the noise schedule need prediction_type "ddim_eps" or "ddim_v", not '
            f'"{table.prediction_type}", whose output has a meaning on the chord only.'
        )
    alpha, sigma = table.schedule.alpha_sigma(t.double())
    a_e, s_e = table.alpha_end[window].double(), table.sigma_end[window].double()
    p, q = ddim_coefficients(kinds[table.prediction_type], alpha, sigma, a_e, s_e)
    return p.to(table.dtype), q.to(table.dtype)


def schedule_loss(
    output: Tensor,
    z_end: Tensor,
    z_t: Tensor,
    table: ChordTable,
    window: Tensor,
    t: Tensor,
    *,
    kind: str = "pseudo_huber",
    weight: Tensor | None = None,
    huber_c: float | None = None,
    huber_norm: str = "element",
    normalize: str = "none",
) -> AlignedVLoss:
    """Phased rectified diffusion's loss: z_end^ of a point on the noise schedule against the teacher's z_end.

    Shapes and normalize as in chord_loss; kind "pseudo_huber" (the paper's) or "mse". mse, magnitude and cosine are
    those of z_end. t should lie above t_end: at the window's end nothing is left to predict.
    """
    _check(kind, ("pseudo_huber", "mse"), "loss")
    _check(normalize, NORMALIZATIONS, "normalize")
    coefficients = schedule_end_coefficients(table, window, t)
    if kind == "mse":
        return _aligned(output, z_end, z_t, coefficients, 0.0, weight, normalize)
    return _pseudo_huber(output, z_end, z_t, coefficients, None, weight, huber_c, huber_norm, normalize)


def _aligned(
    output: Tensor,
    target: Tensor,
    sample: Tensor,
    coefficients: tuple[Tensor, Tensor] | None,
    direction_weight: float | Tensor,
    weight: Tensor | None,
    normalize: str = "none",
) -> AlignedVLoss:
    if normalize == "loss":
        with torch.no_grad():
            parts = _aligned(output.detach(), target, sample, coefficients, direction_weight, None)
            own = 1.0 / (parts.mse + direction_weight * (1.0 - parts.cosine) + NORMAL_FLOOR)
        weight = own if weight is None else own * weight
    if coefficients is None:
        return aligned_v_loss(output, target, direction_weight=direction_weight, weight=weight)
    return aligned_v_loss(
        output,
        target,
        direction_weight=direction_weight,
        sample=sample,
        sample_coef=coefficients[0],
        output_coef=coefficients[1],
        weight=weight,
    )


def _pseudo_huber(
    output: Tensor,
    target: Tensor,
    sample: Tensor,
    coefficients: tuple[Tensor, Tensor] | None,
    scale: Tensor | None,
    weight: Tensor | None,
    c: float | None,
    norm: str,
    normalize: str = "none",
) -> AlignedVLoss:
    _check(norm, tuple(HUBER_C), "huber_norm")
    c = HUBER_C[norm] if c is None else c
    if not c > 0:
        raise ValueError(f"huber_c is {c}; it must be above 0, where the loss has a gradient everywhere.")
    with torch.no_grad():
        parts = _aligned(output.detach(), target, sample, coefficients, 0.0, None)
    prediction = output.to(target.dtype)
    if coefficients is not None:
        prediction = expand(coefficients[0], sample) * sample + expand(coefficients[1], sample) * prediction
    error = prediction - target
    if scale is not None:
        error = expand(scale, error) * error
    if norm == "element":
        rows = _huber(error.flatten(1).square(), c).mean(1)
    else:
        size = math.prod(error.shape[1:])
        rows = _huber(error.flatten(1).square().sum(1), c * size) / size
    if normalize == "loss":
        rows = rows / (rows.detach() + NORMAL_FLOOR)
    if weight is not None:
        rows = rows * weight
    loss = rows.mean() if rows.numel() else rows.sum()
    return AlignedVLoss(loss, parts.mse, parts.magnitude, parts.cosine)


def _huber(square: Tensor, c: float) -> Tensor:
    # sqrt(d^2 + c^2) - c without its cancellation at small d
    return square / (torch.sqrt(square + c * c) + c)
