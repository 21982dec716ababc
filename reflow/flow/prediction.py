"""What a network's output means, read both ways, and the step that every reading shares.

kinds: "epsilon" (noise), "sample" (data), "v_prediction" (alpha eps - sigma x0, VP velocity), "velocity" (eps - x0,
flow velocity); the first three are diffusers' names. alpha and sigma are tensors of shape [B], [] or the sample's, or
floats; [B] is broadcast over the sample's other dimensions. Time runs from t=1 (noise) to t=0 (data). Sources:
Salimans and Ho, arXiv 2202.00512 (v); diffusionflow.github.io (u, and DDIM as Euler).
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("epsilon", "sample", "v_prediction", "velocity")


def _unknown(kind: str) -> ValueError:
    known = ", ".join(f'"{name}"' for name in KINDS)
    return ValueError(f'Prediction kind "{kind}" is not known; known are {known}.')


def expand(coefficient: Tensor | float, like: Tensor) -> Tensor:
    """A [B] coefficient as [B, 1, ..., 1] over `like`; scalars and full-size tensors pass through."""
    value = torch.as_tensor(coefficient, dtype=like.dtype, device=like.device)
    if value.ndim in (0, like.ndim):
        return value
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def to_x0_eps(
    kind: str, output: Tensor, sample: Tensor, alpha: Tensor | float, sigma: Tensor | float
) -> tuple[Tensor, Tensor]:
    """(x0, eps) from an output of `kind` at z = sample. The v reading holds for any (alpha, sigma), not only VP: with
    r^2 = alpha^2 + sigma^2, x0 = (alpha z/r - sigma v)/r and eps = (sigma z/r + alpha v)/r."""
    a, s = expand(alpha, sample), expand(sigma, sample)
    if kind == "epsilon":
        return (sample - s * output) / a, output
    if kind == "sample":
        return output, (sample - a * output) / s
    if kind == "v_prediction":
        r = torch.sqrt(a * a + s * s)
        return (a * sample / r - s * output) / r, (s * sample / r + a * output) / r
    if kind == "velocity":
        return (sample - s * output) / (a + s), (sample + a * output) / (a + s)
    raise _unknown(kind)


def from_x0_eps(kind: str, x0: Tensor, eps: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """The output of `kind` that reads as (x0, eps): the inverse of `to_x0_eps` where z = alpha x0 + sigma eps."""
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x0
    if kind == "v_prediction":
        a, s = expand(alpha, x0), expand(sigma, x0)
        return (a * eps - s * x0) / torch.sqrt(a * a + s * s)
    if kind == "velocity":
        return eps - x0
    raise _unknown(kind)


def convert(
    source: str, target: str, output: Tensor, sample: Tensor, alpha: Tensor | float, sigma: Tensor | float
) -> Tensor:
    """An output of kind `source` as kind `target` at z = sample."""
    x0, eps = to_x0_eps(source, output, sample, alpha, sigma)
    return from_x0_eps(target, x0, eps, alpha, sigma)


def mse_weight(kind: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """MSE of `kind` over the MSE of eps, at one z: x0 (sigma/alpha)^2, v 1 + (sigma/alpha)^2, u (1 + sigma/alpha)^2.

    On VP the v weight is alpha^2 (e^-lambda + 1)^2 as usually printed, lambda = log(alpha^2/sigma^2).
    """
    ratio = sigma / alpha
    if kind == "epsilon":
        return torch.ones_like(ratio)
    if kind == "sample":
        return ratio**2
    if kind == "v_prediction":
        return 1.0 + ratio**2
    if kind == "velocity":
        return (1.0 + ratio) ** 2
    raise _unknown(kind)


def ddim_coefficients(
    kind: str, alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor
) -> tuple[Tensor, Tensor]:
    """(p, q) of the DDIM step z' = alpha' x0 + sigma' eps = p z + q output; shapes of the inputs.

    The four readings differ in what the cross term (sigma' alpha - alpha' sigma) is divided by:
    alpha, -sigma, r, alpha + sigma.
    """
    cross = sigma_next * alpha - alpha_next * sigma
    if kind == "epsilon":
        return alpha_next / alpha, cross / alpha
    if kind == "sample":
        return sigma_next / sigma, -cross / sigma
    if kind == "v_prediction":
        r2 = alpha * alpha + sigma * sigma
        return (alpha_next * alpha + sigma_next * sigma) / r2, cross / torch.sqrt(r2)
    if kind == "velocity":
        return (alpha_next + sigma_next) / (alpha + sigma), cross / (alpha + sigma)
    raise _unknown(kind)


def flow_coefficients(kind: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(m, n) with flow velocity u = eps - x0 = m z + n output; shapes of the inputs."""
    if kind == "epsilon":
        return -1.0 / alpha, 1.0 + sigma / alpha
    if kind == "sample":
        return 1.0 / sigma, -1.0 - alpha / sigma
    if kind == "v_prediction":
        r2 = alpha * alpha + sigma * sigma
        return (sigma - alpha) / r2, (alpha + sigma) / torch.sqrt(r2)
    if kind == "velocity":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    raise _unknown(kind)


def ddim_step(
    kind: str,
    output: Tensor,
    sample: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    alpha_next: Tensor | float,
    sigma_next: Tensor | float,
) -> Tensor:
    """One deterministic DDIM step (Song et al., arXiv 2010.02502, equation 12, eta 0) to the next (alpha, sigma)."""
    x0, eps = to_x0_eps(kind, output, sample, alpha, sigma)
    return expand(alpha_next, sample) * x0 + expand(sigma_next, sample) * eps


def flow_time(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Flow time t and scale c of a point on any schedule: t = sigma/(alpha+sigma), c = alpha+sigma, z = c x_t with
    x_t = (1-t) x0 + t eps."""
    scale = alpha + sigma
    return sigma / scale, scale


def edm_sigma(t: Tensor, sigma_max: float | None = 80.0) -> Tensor:
    """EDM's sigma = t/(1-t) of flow time t; z = x_t (1 + sigma). Held at sigma_max, the end of EDM's training range:
    the clip t <= 1 - 1e-5 of rfpp alone asks for sigma = 1e5. None leaves it free (t=1 is then infinite)."""
    sigma = t / (1.0 - t)
    return sigma if sigma_max is None else sigma.clamp(max=sigma_max)


def vp_time(t: Tensor, beta_min: float = 0.1, beta_max: float = 20.0) -> tuple[Tensor, Tensor]:
    """Continuous-VP time s and scale c of flow time t: sigma(s)/alpha(s) = t/(1-t) and z = c x_t (rfpp, corrected).

    c = alpha(s)/(1-t) is taken as 1/sqrt((1-t)^2 + t^2), the same number without the 0/0 at t=1; there s is infinite.
    """
    slope = beta_max - beta_min
    norm = torch.sqrt((1.0 - t) ** 2 + t**2)
    log_alpha = torch.log((1.0 - t) / norm)
    # the small root of slope s^2/2 + beta_min s + 2 log_alpha = 0, free of cancellation at t=0
    root = torch.sqrt(beta_min**2 - 4.0 * slope * log_alpha)
    return -4.0 * log_alpha / (beta_min + root), 1.0 / norm


def vp_index(t: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """(index, scale) of the discrete-VP entry nearest to flow time t: t_i = S_i/(A_i + S_i), z = (A_i + S_i) x_t.

    t any shape; alphas_cumprod [N] on the device of t. index is long. Read the network as u = eps - x0 there.
    """
    abar = alphas_cumprod.to(torch.float64)
    times, scale = flow_time(abar.sqrt(), (1.0 - abar).sqrt())
    query = t.double().contiguous()
    upper = torch.searchsorted(times, query).clamp(1, len(times) - 1)
    nearer = (query - times[upper - 1]) < (times[upper] - query)
    found = torch.where(nearer, upper - 1, upper)
    return found, scale[found].to(t.dtype)


def anchored_step(x0: Tensor, noise: Tensor, t_next: Tensor | float) -> Tensor:
    """rfpp's sampler update z' = (1-t') x0^ + t' z_1 with the initial noise z_1 (arXiv 2405.20320, section 4.3).

    Equal to the Euler step of u = (z - x0^)/t if and only if z lies on the line from x0^ to z_1.
    """
    t = expand(t_next, x0)
    return (1.0 - t) * x0 + t * noise
