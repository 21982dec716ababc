"""Networks of four families read as flows, and paths in the coordinates in which somebody calls them straight.

A network of any schedule is asked at z = c x, c = alpha + sigma, where sigma / (alpha + sigma) is the flow's time t; its answer, read as
eps - x0, is the flow's velocity of x. Time runs from t=1 (noise) to t=0 (data). Source: "Diffusion Meets Flow Matching" (2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reflow.evaluation.metrics import straightness
from reflow.experiments.beds.exact import ExactBed
from reflow.experiments.beds.mixture import LowRankMixture
from reflow.flow import EDM, ContinuousVP, Rectified, Schedule, Windows
from reflow.flow.prediction import convert, ddim_step, edm_sigma, vp_index, vp_time
from reflow.flow.solver import time_grid

Network = Callable[[Tensor, Tensor], Tensor]  # (z [B, D], timestep [B]) -> output [B, D]
EDM_SPAN = (80.0, 0.002)
STILL = 1e-20  # mean square velocity that is rounding


class SubVP(ContinuousVP):
    """alpha of `ContinuousVP`, sigma = 1 - alpha^2 (Song et al., arXiv 2011.13456): a `reflow.flow.Schedule` that the product does not have."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = super().alpha_sigma(t.double())
        return alpha.to(t.dtype), (sigma**2).to(t.dtype)

    def of_flow(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(timestep, c) at the flow's time, as `vp_time` tells them of VP: alpha^2 + alpha t / (1 - t) = 1, and the s of that alpha."""
        ratio, slope = t / (1.0 - t), self.beta_max - self.beta_min
        alpha = 2.0 / (ratio + torch.sqrt(ratio**2 + 4.0))
        whole = -2.0 * torch.log(alpha)
        return 999.0 * 2.0 * whole / (self.beta_min + torch.sqrt(self.beta_min**2 + 2.0 * slope * whole)), alpha / (1.0 - t)


@dataclass(frozen=True)
class Family:
    """kind: what the networks predict. of_flow: the flow's time, fp64 -> (timestep, c)."""

    schedule: Schedule
    kind: str
    windows: Windows
    of_flow: Callable[[Tensor], tuple[Tensor, Tensor]]

    def grid(self, steps: int) -> Tensor:
        """The family's own times [steps + 1] in fp64."""
        return time_grid(self.windows, steps)[:, 0]


def families(bed: ExactBed) -> dict[str, Family]:
    abar, sub = bed.schedule.alphas_cumprod, SubVP()
    ends = tuple(s / (1.0 + s) for s in EDM_SPAN)
    return {
        "VP, table": Family(bed.schedule, "epsilon", Windows.uniform(1), lambda t: vp_index(t, abar)),
        "VP, continuous": Family(ContinuousVP(), "v_prediction", Windows((1.0, 1e-3)), lambda t: (999.0 * vp_time(t)[0], vp_time(t)[1])),
        "VE (EDM)": Family(EDM(*EDM_SPAN), "sample", Windows.uniform(1), lambda t: (edm_sigma(t, None), 1.0 / (1.0 - t))),
        "sub-VP": Family(sub, "epsilon", Windows((1.0, 1e-3)), sub.of_flow),
        "flow matching": Family(Rectified(), "velocity", Windows(ends), lambda t: (1000.0 * t, torch.ones_like(t))),
    }


def ddim(family: Family, network: Network, x: Tensor, steps: int) -> Tensor:
    """DDIM in the family's own coordinates and times, from and to x = z / (alpha + sigma) [B, D]."""
    grid = family.grid(steps)
    alpha, sigma = (v.to(x.dtype) for v in family.schedule.alpha_sigma(grid))
    timestep = family.schedule.timestep(grid).to(x)
    z = x * (alpha[0] + sigma[0])
    for i in range(steps):
        z = ddim_step(family.kind, network(z, timestep[i].expand(len(z))), z, alpha[i], sigma[i], alpha[i + 1], sigma[i + 1])
    return z / (alpha[-1] + sigma[-1])


def euler(family: Family, network: Network, x: Tensor, times: Tensor, *, rescaled: bool = True) -> Tensor:
    """Euler of the flow that the family's network reads as, at flow times [S + 1] from noise; rescaled False: the network is asked at x."""
    timestep, scale = family.of_flow(times[:-1])
    for i in range(len(times) - 1):
        t, c = times[i].to(x.dtype), scale[i].to(x.dtype)
        z = c * x if rescaled else x
        output = network(z, timestep[i].to(x).expand(len(x)))
        x = x + (times[i + 1] - times[i]).to(x.dtype) * convert(family.kind, "velocity", output, z, c * (1.0 - t), c * t)
    return x


def flow_times(family: Family, steps: int) -> Tensor:
    """sigma / (alpha + sigma) [steps + 1] at the family's own times."""
    alpha, sigma = family.schedule.alpha_sigma(family.grid(steps))
    return sigma / (alpha + sigma)


# name -> (what z is divided by, the time of it), both of (alpha, sigma)
COORDINATES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "flow": (lambda a, s: a + s, lambda a, s: s / (a + s)),
    "VP": (torch.hypot, lambda a, s: torch.atan2(s, a)),
    "VE": (lambda a, s: a, lambda a, s: s / a),
}


def bent(states: list[Tensor], times: list[float]) -> dict[str, float]:
    """How far a path [S + 1] of states [B, D] at falling times is from straight: deviation, RMS of v_i - mean v over RMS of v, steps counted by
    their length; bow, 1 less the distance of its ends over its length; rfpp, the mean of (v_i - (z_noise - z_data))^2 of 2-rectified flow++.
    Paths that stand still are straight."""
    path = torch.stack(states).cpu().double()
    moves, lengths = path.diff(dim=0), -torch.tensor(times, dtype=torch.float64).diff()
    share = (lengths / lengths.sum())[:, None, None]
    v = moves / lengths[:, None, None]
    mean, square = (v * share).sum(0), (v.square() * share).sum(0)
    if float(square.mean()) < STILL:
        return {"deviation": 0.0, "bow": 0.0, "rfpp": 0.0}
    bow = 1.0 - (path[-1] - path[0]).norm(dim=1) / moves.norm(dim=2).sum(0)
    off = (square - mean.square()).mean().clamp(min=0.0)
    return {"deviation": float((off / square.mean()).sqrt()), "bow": float(bow.mean()), "rfpp": float(straightness(path, times).mean())}


def scaled(mixture: LowRankMixture, factor: float) -> LowRankMixture:
    """The mixture of factor * x0."""
    return replace(mixture, means=mixture.means * factor, spread=mixture.spread * factor**2, floor=mixture.floor * factor**2)


def unit_gaussian(mixture: LowRankMixture) -> LowRankMixture:
    """N(0, I) in as many dimensions, of class 0 alone."""
    one = torch.ones_like(mixture.weights[:1])
    return LowRankMixture(mixture.means[:1] * 0, mixture.axes[:1], mixture.spread[:1] * 0, 1.0, one, torch.zeros_like(mixture.classes[:1]))


def straight_steps(mixture: LowRankMixture, labels: Tensor, noise: Tensor, kind: str, steps: int, *, heun: bool = False) -> list[Tensor]:
    """z at steps of equal length from pure noise to sigma = 0: Euler (or Heun) of dz/dt = eps - x0 at (1 - t, t), "flow", or of
    dz/dphi = alpha eps - sigma x0 at (cos phi, sin phi), "VP"."""
    span = 1.0 if kind == "flow" else math.pi / 2

    def slope(z: Tensor, place: float) -> Tensor:
        alpha, sigma = (1.0 - place, place) if kind == "flow" else (math.cos(place), math.sin(place))
        x0, eps = mixture.x0_eps(z, labels, alpha, sigma)
        return eps - x0 if kind == "flow" else alpha * eps - sigma * x0

    states, step = [noise], -span / steps
    for i in range(steps):
        place = span * (1.0 - i / steps)
        first = slope(states[-1], place)
        if heun:
            first = 0.5 * (first + slope(states[-1] + step * first, span * (1.0 - (i + 1) / steps)))
        states.append(states[-1] + step * first)
    return states
