"""Samplers that draw noise on the way, and a score that is wrong by a fixed smooth field: the same error at the same place.

A network is asked for eps at z = alpha x0 + sigma eps of any scale; all samplers run between the noise levels sigma / alpha of the bed's
table and leave z at its clean end. Time runs from t=1 (noise) to t=0 (data). Sources: Song, Meng and Ermon, arXiv 2010.02502 (DDIM with eta);
Song et al., arXiv 2011.13456 (the SDEs); Karras et al., arXiv 2206.00364, algorithm 2 (churn).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reflow.experiments.beds.exact import ExactBed
from reflow.experiments.beds.mixture import LowRankMixture
from reflow.flow import DiscreteVP, Windows
from reflow.flow.solver import time_grid

Eps = Callable[[Tensor, float, float], Tensor]  # (z [B, D], alpha, sigma) -> eps [B, D]
BETA_MIN, BETA_MAX = 0.1, 20.0


@dataclass(frozen=True)
class Field:
    """A draw of a Gaussian process over (x, angle) with values [D], x = z / sqrt(alpha^2 + sigma^2) and angle = arctan(sigma / alpha): random
    Fourier features of an RBF kernel whose length is `length` in RMS pixel distance and `SPAN` in angle, times `scale`. even "eps": as large at
    every time; "v": times cos(angle), which is an even error of v, as that of a network whose output is scaled well at every noise level."""

    frequencies: Tensor
    phases: Tensor
    values: Tensor
    even: str = "v"
    scale: float = 1.0

    SPAN = 0.25
    FEATURES = 256

    @classmethod
    def drawn(cls, size: int, length: float, seed: int, even: str = "v", dtype: torch.dtype = torch.float32, device: str = "cpu") -> Field:
        generator = torch.Generator().manual_seed(60_013 + seed)
        frequencies = torch.randn((size + 1, cls.FEATURES), generator=generator, dtype=torch.float64)
        frequencies[:size] /= length * math.sqrt(size)
        frequencies[size] /= cls.SPAN
        phases = 2 * math.pi * torch.rand(cls.FEATURES, generator=generator, dtype=torch.float64)
        values = torch.randn((cls.FEATURES, size), generator=generator, dtype=torch.float64) * math.sqrt(2 / cls.FEATURES)
        frequencies, phases, values = (value.to(device, dtype) for value in (frequencies, phases, values))
        return cls(frequencies, phases, values, even)

    def __call__(self, z: Tensor, alpha: float, sigma: float) -> Tensor:
        inside = torch.addmm(self.phases + math.atan2(sigma, alpha) * self.frequencies[-1], z / math.hypot(alpha, sigma), self.frequencies[:-1])
        return inside.cos() @ self.values * (self.scale * (alpha / math.hypot(alpha, sigma) if self.even == "v" else 1.0))


@dataclass(frozen=True)
class Network:
    """The exact eps of rows of these labels [B], plus `size` times a field; no field: exact."""

    mixture: LowRankMixture
    labels: Tensor
    size: float = 0.0
    field: Field | None = None

    def __call__(self, z: Tensor, alpha: float, sigma: float) -> Tensor:
        eps = self.mixture.x0_eps(z, self.labels, alpha, sigma)[1]
        return eps if self.field is None else eps + self.size * self.field(z, alpha, sigma)

    def on(self, schedule: DiscreteVP) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """As the bed's solvers ask it: all rows at one timestep of the table."""

        def call(z: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
            alpha, sigma = schedule.at(timestep[:1].long())
            return self(z, float(alpha), float(sigma))

        return call


def like_eps(bed: ExactBed, field: Field, *, samples: int = 1000, places: int = 20) -> Field:
    """The field as large as the exact eps is, in RMS over noised data at evenly spaced times of the table."""
    labels, generator = torch.arange(samples, device=bed.device) % 10, torch.Generator().manual_seed(17)
    data = bed.mixture.sample(labels, generator)
    noise = torch.randn(data.shape, generator=generator).to(data)
    exact, mine, theirs = Network(bed.mixture, labels), 0.0, 0.0
    for alpha, sigma in zip(*(x.tolist() for x in table(bed, places)), strict=True):
        z = alpha * data + sigma * noise
        mine, theirs = mine + float(field(z, alpha, sigma).square().mean()), theirs + float(exact(z, alpha, sigma).square().mean())
    return replace(field, scale=field.scale * math.sqrt(theirs / mine))


def table(bed: ExactBed, steps: int) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) [steps + 1] in fp64 where the bed's own solver of so many steps stops."""
    return bed.schedule.alpha_sigma(time_grid(Windows.uniform(1), steps)[:, 0])


def ends(bed: ExactBed) -> tuple[float, float]:
    """sigma / alpha at the noisy and at the clean end."""
    alpha, sigma = table(bed, 1)
    return float(sigma[0] / alpha[0]), float(sigma[1] / alpha[1])


def noised(z: Tensor, size: float, generator: torch.Generator) -> Tensor:
    return z + size * torch.randn(z.shape, generator=generator, dtype=torch.float32).to(z) if size else z


def ancestral(eps: Eps, z: Tensor, alpha: Tensor, sigma: Tensor, generator: torch.Generator, *, eta: float = 1.0) -> Tensor:
    """DDPM's ancestral steps along a grid [S + 1] of (alpha, sigma) that preserves variance; eta 0: DDIM."""
    for i in range(len(alpha) - 1):
        (a, s), (b, r) = ((float(alpha[j]), float(sigma[j])) for j in (i, i + 1))
        out = eps(z, a, s)
        size = eta * r / s * math.sqrt(max(0.0, 1.0 - (a / b) ** 2))
        z = noised(b * (z - s * out) / a + math.sqrt(max(0.0, r * r - size * size)) * out, size, generator)
    return z


def karras(largest: float, smallest: float, steps: int, rho: float = 7.0) -> Tensor:
    """Noise levels [steps + 1] in fp64, falling."""
    place = torch.arange(steps + 1, dtype=torch.float64) / steps
    return (largest ** (1 / rho) + place * (smallest ** (1 / rho) - largest ** (1 / rho))) ** rho


def churned(eps: Eps, z: Tensor, levels: Tensor, generator: torch.Generator, *, churn: float) -> Tensor:
    """Heun in z / alpha along noise levels [S + 1], each step after noise that raises its level by churn / S, at most by sqrt(2) - 1 of it;
    0: Heun. Its noise is as large as the law asks (S_noise 1) and drawn at every level. z and the result at alpha = 1."""
    for level, after in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        raised = level * (1.0 + min(churn / (len(levels) - 1), math.sqrt(2.0) - 1.0))
        z = noised(z, math.sqrt(raised**2 - level**2), generator)
        first = eps(z, 1.0, raised)
        moved = z + (after - raised) * first
        z = z + (after - raised) * 0.5 * (first + eps(moved, 1.0, after))
    return z


@dataclass(frozen=True)
class Diffusion:
    """dz = f z ds + g dw of the kinds "VP", "VE" and "sub-VP" between two noise levels sigma / alpha, s falling towards data."""

    kind: str
    largest: float
    smallest: float

    def times(self, steps: int) -> list[float]:
        """Evenly spaced s, noise first."""
        first, last = (1.0, 0.0) if self.kind == "VE" else (self._time(self.largest), self._time(self.smallest))
        return torch.linspace(first, last, steps + 1, dtype=torch.float64).tolist()

    def _time(self, ratio: float) -> float:
        """s of a noise level, from the integral of beta."""
        alpha = 1.0 / math.hypot(1.0, ratio) if self.kind == "VP" else (math.sqrt(ratio**2 + 4.0) - ratio) / 2.0
        whole, slope = -2.0 * math.log(alpha), BETA_MAX - BETA_MIN
        return 2.0 * whole / (BETA_MIN + math.sqrt(BETA_MIN**2 + 2.0 * slope * whole))

    def alpha_sigma(self, s: float) -> tuple[float, float]:
        if self.kind == "VE":
            return 1.0, self.smallest * (self.largest / self.smallest) ** s
        left = math.exp(-(0.5 * (BETA_MAX - BETA_MIN) * s * s + BETA_MIN * s))  # alpha^2
        return math.sqrt(left), math.sqrt(1.0 - left) if self.kind == "VP" else 1.0 - left

    def rates(self, s: float) -> tuple[float, float]:
        """(f, g^2)."""
        alpha, sigma = self.alpha_sigma(s)
        if self.kind == "VE":
            return 0.0, 2.0 * sigma**2 * math.log(self.largest / self.smallest)
        beta = BETA_MIN + (BETA_MAX - BETA_MIN) * s
        return -0.5 * beta, beta if self.kind == "VP" else beta * (1.0 - alpha**4)


def reversed_in_time(eps: Eps, z: Tensor, diffusion: Diffusion, steps: int, generator: torch.Generator, *, noise: float = 1.0) -> Tensor:
    """Euler-Maruyama of dz = (f z + (1 + noise^2) / 2 g^2 eps / sigma) ds + noise g dw: 1 the reverse SDE, 0 Euler of its flow."""
    times = diffusion.times(steps)
    for s, after in zip(times[:-1], times[1:], strict=True):
        (alpha, sigma), (drift, square) = diffusion.alpha_sigma(s), diffusion.rates(s)
        slope = drift * z + 0.5 * (1.0 + noise**2) * square / sigma * eps(z, alpha, sigma)
        z = noised(z + (after - s) * slope, noise * math.sqrt(square * (s - after)), generator)
    return z
