"""Data whose flow is known exactly: what solvers and training are tested on.

Time runs from t=1 (noise) to t=0 (data). z = alpha x0 + sigma eps; tensors are [B, ...] with the data's own trailing
shape, alpha and sigma [B] or scalars, and everything is computed in the dtype of z.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .chord import ChordTable
from .prediction import expand, from_x0_eps
from .schedule import Schedule


class Data(Protocol):
    """Data with a known posterior mean."""

    def x0_eps(self, z: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        """E[x0 | z] and E[eps | z], what a perfect network reads as; shape of z."""
        ...


@dataclass(frozen=True)
class GaussianData:
    """x0 ~ N(mean, std^2) with independent entries; mean and std broadcast to the sample's shape."""

    mean: Tensor
    std: Tensor

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """[count, ...] draws."""
        shape = (self.mean + self.std).shape
        noise = torch.randn((count, *shape), generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + self.std * noise

    def x0_eps(self, z: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        a, s, mean, var = expand(alpha, z), expand(sigma, z), self.mean.to(z), self.std.to(z) ** 2
        centred = (z - a * mean) / (a * a * var + s * s)
        return mean + a * var * centred, s * centred

    def spread(self, alpha: Tensor | float, sigma: Tensor | float, like: Tensor) -> Tensor:
        """Standard deviation of z at (alpha, sigma), broadcast over `like`."""
        a, s = expand(alpha, like), expand(sigma, like)
        return torch.sqrt((a * self.std.to(like)) ** 2 + s * s)

    def solve(
        self,
        z: Tensor,
        alpha: Tensor | float,
        sigma: Tensor | float,
        alpha_end: Tensor | float,
        sigma_end: Tensor | float,
    ) -> Tensor:
        """The probability-flow ODE's exact map from (alpha, sigma) to (alpha_end, sigma_end): z keeps its
        standardised value."""
        mean = self.mean.to(z)
        ratio = self.spread(alpha_end, sigma_end, z) / self.spread(alpha, sigma, z)
        return expand(alpha_end, z) * mean + ratio * (z - expand(alpha, z) * mean)

    def chord_velocity(self, z_t: Tensor, table: ChordTable, window: Tensor, t: Tensor) -> Tensor:
        """The exact velocity of the one chord of the window through z_t at t: chords of a Gaussian do not cross."""
        mean = self.mean.to(z_t)
        ratio = self.spread(table.alpha_end[window], table.sigma_end[window], z_t)
        ratio = ratio / self.spread(table.alpha_start[window], table.sigma_start[window], z_t)
        tau, (alpha, _) = expand(table.tau(window, t), z_t), table.alpha_sigma(window, t)
        start = (z_t - expand(alpha, z_t) * mean) / (1.0 + tau * (ratio - 1.0))
        rise = expand(table.alpha_end[window] - table.alpha_start[window], z_t) * mean
        return (rise + (ratio - 1.0) * start) / expand(table.dt[window], z_t)


@dataclass(frozen=True)
class MixtureData:
    """x0 from M isotropic Gaussians: means [M, ...], one std for all, weights [M] that sum to 1."""

    means: Tensor
    std: float
    weights: Tensor

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """[count, ...] draws."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        shape = (count, *self.means.shape[1:])
        noise = torch.randn(shape, generator=generator, dtype=self.means.dtype, device=self.means.device)
        return self.means[chosen] + self.std * noise

    def x0_eps(self, z: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        a, s, means = expand(alpha, z), expand(sigma, z), self.means.to(z)
        var = a * a * self.std**2 + s * s
        centred = z[:, None] - (a[:, None] if a.ndim else a) * means
        variance = var.reshape(-1, 1) if var.ndim else var
        logits = self.weights.to(z).log() - centred.flatten(2).square().sum(2) / (2.0 * variance)
        mean = torch.einsum("bm,m...->b...", torch.softmax(logits, 1), means)
        scaled = (z - a * mean) / var
        return mean + a * self.std**2 * scaled, s * scaled

    def solve(self, z: Tensor, schedule: Schedule, t_start: float, t_end: float, steps: int = 256) -> Tensor:
        """The ODE's map from t_start to t_end of a schedule, to the accuracy of `steps` classical Runge-Kutta steps in
        y = z/(alpha+sigma) over s = sigma/(alpha+sigma), where dy/ds = eps - x0 and (alpha, sigma) is (1-s, s)."""
        ends = torch.tensor([t_start, t_end], dtype=torch.float64)
        alpha, sigma = (value.tolist() for value in schedule.alpha_sigma(ends))
        scale: list[float] = [a + s for a, s in zip(alpha, sigma, strict=True)]
        place, last = sigma[0] / scale[0], sigma[1] / scale[1]
        step = (last - place) / steps

        def slope(y: Tensor, s: float) -> Tensor:
            x0, eps = self.x0_eps(y, 1.0 - s, s)
            return eps - x0

        y = z / scale[0]
        for i in range(steps):
            s = place + i * step
            k1 = slope(y, s)
            k2 = slope(y + 0.5 * step * k1, s + 0.5 * step)
            k3 = slope(y + 0.5 * step * k2, s + 0.5 * step)
            k4 = slope(y + step * k3, s + step)
            y = y + step / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
        return y * scale[1]


def network(data: Data, schedule: Schedule, prediction_type: str = "epsilon") -> Callable[[Tensor, Tensor], Tensor]:
    """The perfect network of `data` on `schedule`: (z [B, ...], timestep [B]) -> output of prediction_type, like z."""

    def call(z: Tensor, timestep: Tensor) -> Tensor:
        alpha, sigma = (value.to(z.dtype) for value in schedule.at_timestep(timestep.double()))
        x0, eps = data.x0_eps(z, alpha, sigma)
        return from_x0_eps(prediction_type, x0, eps, alpha, sigma)

    return call
