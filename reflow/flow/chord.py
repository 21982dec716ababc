"""The chord: inside a window alpha and sigma are linear in t between the window's two boundary values.

Time runs from t=1 (noise) to t=0 (data), so dt = t_end - t_start < 0, and tau = (t - t_start)/dt runs from 0 to 1
inside a window. One schedule serves every parameterisation of a student: with x^, eps^ read from its output on the
chord,

    velocity = ((A_e - A_s) x^ + (S_e - S_s) eps^) / (t_e - t_s)

with A, S the alpha, sigma at the window's start (s) and end (e). This is PeRFlow's closed form (arXiv 2405.07510,
equation 6) for eps networks, gives v-prediction bases the same treatment and stays finite for them at zero terminal
SNR. All coefficients are [B] tensors on the table's device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .prediction import expand
from .schedule import Schedule
from .windows import Windows

PREDICTION_TYPES = ("ddim_eps", "ddim_v", "diff_eps", "velocity")
# Below this alpha an eps output says nothing about the data: x^ = (z - sigma eps^)/alpha multiplies its error by 1000.
MIN_ALPHA = 1e-3


class Rows(NamedTuple):
    """Constants of each sample's window, all [B]: :class:`ChordTable`'s and what its reading of an output takes."""

    t_start: Tensor
    t_end: Tensor
    dt: Tensor
    alpha_start: Tensor
    sigma_start: Tensor
    alpha_end: Tensor
    sigma_end: Tensor
    alpha_rate: Tensor  # slope of the chord's alpha in t
    cross_rate: Tensor
    eps_rate: Tensor
    radial: Tensor  # d(r^2)/dt / 2 at the window's start, and its growth over the window
    radial_growth: Tensor

    def time(self, tau: Tensor) -> Tensor:
        """t = t_start + tau dt, [B], for tau in [0, 1]."""
        return torch.lerp(self.t_start, self.t_end, tau.to(self.t_start.dtype))

    def tau(self, t: Tensor) -> Tensor:
        """Place inside the window, [B]: 0 at t_start (noisy), 1 at t_end (clean)."""
        return (t.to(self.t_start.dtype) - self.t_start) / self.dt

    def alpha(self, tau: Tensor) -> Tensor:
        """The chord's alpha at places inside the window, [B]."""
        return torch.lerp(self.alpha_start, self.alpha_end, tau)

    def sigma(self, tau: Tensor) -> Tensor:
        """The chord's sigma at places inside the window, [B]."""
        return torch.lerp(self.sigma_start, self.sigma_end, tau)


class ChordTable:
    """Constants of K windows on a schedule and the student's reading of its output in them.

    prediction_type is "ddim_eps", "ddim_v" (ordinary eps- and v-prediction read on the chord), "diff_eps" (ddim_eps
    with a per-window rescale, the published PeRFlow SD1.5 weights) or "velocity" (the output is the velocity).
    Computed in fp64, kept as `dtype` [K] tensors on `device`:

    t_start, t_end, dt              the window, dt < 0
    alpha_start, sigma_start, alpha_end, sigma_end   the schedule at its boundaries
    speed                           root mean square of v_target for unit-variance x0 and one constant eps: the size
                                    that an error in velocity should be compared with

    ends: clean ends of the chords where they are not the windows' own: of windows that merge while they are learnt,
        whose chords reach beyond the next boundary (`reflow.flow.merging`).

    Raises ValueError for an unknown prediction type and for an eps type in a window whose start carries no signal.
    """

    def __init__(
        self,
        schedule: Schedule,
        windows: Windows,
        prediction_type: str,
        *,
        ends: tuple[float, ...] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        if prediction_type not in PREDICTION_TYPES:
            known = ", ".join(f'"{name}"' for name in PREDICTION_TYPES)
            raise ValueError(f'prediction_type "{prediction_type}" is not known for a student; known are {known}.')
        self.schedule, self.windows, self.prediction_type, self.ends = schedule, windows, prediction_type, ends
        self.device, self.dtype = torch.device(device), dtype

        t_start, t_end = (torch.tensor(t, dtype=torch.float64) for t in (windows.t_start, ends or windows.t_end))
        (a_s, s_s), (a_e, s_e), dt = schedule.alpha_sigma(t_start), schedule.alpha_sigma(t_end), t_end - t_start
        if prediction_type in ("ddim_eps", "diff_eps") and bool((a_s < MIN_ALPHA).any()):
            k = int((a_s < MIN_ALPHA).nonzero()[0])
            raise ValueError(
                f'prediction_type "{prediction_type}" cannot be used in window {k}, which starts at '
                f"t={windows.t_start[k]:g} with alpha={float(a_s[k]):.2g}: at zero terminal SNR a noise prediction "
                "says nothing about the image; use "
                '"ddim_v" or "velocity", or a schedule without the rescaling to zero terminal SNR.'
            )
        cross = s_e * a_s - a_e * s_s
        if bool((cross.abs() < 1e-9).any()):
            k = int((cross.abs() < 1e-9).nonzero()[0])
            raise ValueError(f"Window {k} has the same noise level at both ends of its schedule; make it wider.")
        d_a, d_s = a_e - a_s, s_e - s_s
        scale = torch.ones_like(dt)
        if prediction_type == "diff_eps":
            # z_s is z_e diffused forward: z_s = g z_e + sqrt(S_s^2 - g^2 S_e^2) eps with g = A_s/A_e
            g = a_s / a_e
            scale = -torch.sqrt(s_s**2 - (g * s_e) ** 2) / g / (cross / a_s)

        def keep(value: Tensor) -> Tensor:
            return value.to(device=self.device, dtype=dtype)

        self.t_start, self.t_end, self.dt = keep(t_start), keep(t_end), keep(dt)
        self.alpha_start, self.sigma_start = keep(a_s), keep(s_s)
        self.alpha_end, self.sigma_end = keep(a_e), keep(s_e)
        self.speed = keep(torch.sqrt(d_a**2 + d_s**2) / dt.abs())
        # The constants of d(r^2)/dt and of the cross term are free of cancellation.
        radial, radial_growth = (d_a * a_s + d_s * s_s) / dt, (d_a**2 + d_s**2) / dt
        rates = (d_a / dt, cross / dt, scale * cross / dt, radial, radial_growth)
        self._columns = keep(torch.stack([t_start, t_end, dt, a_s, s_s, a_e, s_e, *rates]))

    def __len__(self) -> int:
        return len(self.windows)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ChordTable:
        """The same table on another device or in another dtype, computed afresh in fp64."""
        kind, dtype = self.prediction_type, dtype or self.dtype
        return ChordTable(self.schedule, self.windows, kind, ends=self.ends, device=device, dtype=dtype)

    def rows(self, window: Tensor) -> Rows:
        """The constants of window numbers [B], looked up together: one by one takes longer than their use."""
        return Rows(*self._columns[:, window].unbind(0))

    def time(self, window: Tensor, tau: Tensor) -> Tensor:
        """t at places tau [B] in window numbers `window` [B]: see :meth:`Rows.time`."""
        return self.rows(window).time(tau)

    def tau(self, window: Tensor, t: Tensor) -> Tensor:
        """Places of times t [B] in window numbers `window` [B]: see :meth:`Rows.tau`."""
        return self.rows(window).tau(t)

    def alpha_sigma(self, window: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Chord-linear (alpha, sigma) at times t in window numbers `window`, both [B]."""
        at = self.rows(window)
        tau = at.tau(t)
        return at.alpha(tau), at.sigma(tau)

    def velocity_coefficients(self, window: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(sample_coef, output_coef), both [B]: velocity^ = sample_coef * z_t + output_coef * output. "velocity":
        (0, 1)."""
        if self.prediction_type == "velocity":
            zero = torch.zeros_like(self.dt[window])
            return zero, torch.ones_like(zero)
        at = self.rows(window)
        tau = at.tau(t)
        alpha = at.alpha(tau)
        if self.prediction_type == "ddim_v":
            sigma = at.sigma(tau)
            r2 = alpha * alpha + sigma * sigma
            return (at.radial + tau * at.radial_growth) / r2, at.cross_rate / torch.sqrt(r2)
        return at.alpha_rate / alpha, at.eps_rate / alpha

    def end_coefficients(self, window: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(p, q), both [B]: the window's end seen from z_t, z_end^ = z_t + (t_end - t) velocity^ = p z_t + q output."""
        sample_coef, output_coef = self.velocity_coefficients(window, t)
        remaining = self.t_end[window] - t.to(self.dtype)
        return 1.0 + remaining * sample_coef, remaining * output_coef

    def output_target_coefficients(self, window: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(m, n), both [B]: the output that reads as velocity v at z_t is m z_t + n v, the inverse of
        velocity_coefficients."""
        sample_coef, output_coef = self.velocity_coefficients(window, t)
        return -sample_coef / output_coef, 1.0 / output_coef

    def eps_weight(self, window: Tensor, t: Tensor) -> Tensor:
        """[B] factor that turns a velocity MSE into the eps-space MSE of the same prediction.

        diff_eps counts its own, rescaled noise; every other type counts the noise eps^ that its velocity implies at
        z_t. Finite for all of them: 0 where the chord's alpha is 0.
        """
        at = self.rows(window)
        return (at.alpha(at.tau(t)) / at.eps_rate) ** 2

    def add_noise(self, x0: Tensor, noise: Tensor, window: Tensor, t: Tensor) -> Tensor:
        """alpha x0 + sigma noise on the chord, [B, ...] in the table's dtype; window and t are [B]."""
        alpha, sigma = self.alpha_sigma(window, t)
        return self._mix(x0, noise, alpha, sigma)

    def start(self, x0: Tensor, noise: Tensor, window: Tensor) -> Tensor:
        """z at the window's noisy end, A_s x0 + S_s noise, [B, ...] in the table's dtype (PeRFlow's noised start)."""
        return self._mix(x0, noise, self.alpha_start[window], self.sigma_start[window])

    def _mix(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        x0, noise = x0.to(self.dtype), noise.to(self.dtype)
        return expand(alpha, x0) * x0 + expand(sigma, x0) * noise
