"""Noise schedules: the pair (alpha, sigma) of z = alpha * x0 + sigma * eps as a function of time.

Time runs from t=1 (noise) to t=0 (data) everywhere. Values are computed in fp64 and returned in the dtype of the time
that was asked for, on its device; nothing here copies from the device to the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, overload, runtime_checkable

import torch
from torch import Tensor

TRAIN_STEPS = 1000
NETWORK_TIMES = ("index", "perflow", "flow")  # what a student's network is told of the time, see `network_time`
MOST_STEPS = 100_000  # of a table; published bases have a thousand


@overload
def index(t: float, train_steps: int = TRAIN_STEPS) -> int: ...
@overload
def index(t: Tensor, train_steps: int = TRAIN_STEPS) -> Tensor: ...


def index(t: float | Tensor, train_steps: int = TRAIN_STEPS) -> int | Tensor:
    """Schedule index of a time: max(round(1000 t) - 1, 0), so 1 -> 999, .75 -> 749, 0 -> 0.

    A float gives an int, a tensor of any shape a LongTensor on its device. `train_steps` replaces 1000 for a schedule
    of another length. The one function of windows, solver and sampler.
    """
    if isinstance(t, Tensor):
        return (torch.round(t.double() * train_steps).long() - 1).clamp_(min=0)
    return max(round(float(t) * train_steps) - 1, 0)


def network_time(t: Tensor, mode: str = "index", train_steps: int = TRAIN_STEPS) -> Tensor:
    """The timestep a student's network is given at time t: fp32, shape of t.

    mode "index": index(t), 999 ... 0, the integers of the base model and of stock DDIM. mode "perflow": 1000 t, as the
    published PeRFlow weights expect (PeRFlow, arXiv 2405.07510, code). mode "flow": 1000 t as well, what bases that are
    rectified flows were trained with.
    """
    if mode == "index":
        return index(t, train_steps).to(torch.float32)
    if mode in ("perflow", "flow"):
        return (t.double() * train_steps).to(torch.float32)
    known = '"index" (the base model\'s integers), "perflow" or "flow" (1000 t)'
    raise ValueError(f'network_time is "{mode}"; write {known}.')


@runtime_checkable
class Schedule(Protocol):
    """What the rest of the room asks of a noise schedule."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at times t in [0, 1], any shape; dtype and device of t."""
        ...

    def timestep(self, t: Tensor) -> Tensor:
        """The number that a network pre-trained on this schedule is given at time t; dtype and device of t."""
        ...

    def at_timestep(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at such a number, the inverse reading of `timestep`."""
        ...


class DiscreteVP:
    """Variance preserving on a table: alpha = sqrt(abar[i]), sigma = sqrt(1 - abar[i]), i = 0 (data) .. N-1 (noise).

    alphas_cumprod: [N], decreasing, in [0, 1]; kept in fp64. Times read the table at index(t, N), so t=0 is abar[0],
    as in PeRFlow (its clean end is a very slightly noisy latent).
    """

    def __init__(self, alphas_cumprod: Tensor):
        table = torch.as_tensor(alphas_cumprod).detach().to(device="cpu", dtype=torch.float64).clone()
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(f"alphas_cumprod has shape {tuple(table.shape)}; give one value for each train step.")
        if not bool(((table >= 0) & (table <= 1)).all()) or not bool((table[1:] < table[:-1]).all()):
            raise ValueError("alphas_cumprod must decrease from near 1 (index 0, data) to near 0 (last index, noise).")
        self.alphas_cumprod = table
        self._alpha_sigma: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DiscreteVP:
        """From a diffusers scheduler config: beta_start, beta_end, beta_schedule, num_train_timesteps, trained_betas
        and rescale_betas_zero_snr (Lin et al., arXiv 2305.08891, algorithm 1). Keys left out mean what they mean in
        diffusers.

        The table is diffusers' own, bit for bit: it is taken in fp32 as there (8e-7 relative from an fp64 one, which
        alone would cost stock equality its last digit), and everything derived from it is fp64.
        Raises ValueError for a beta schedule that this class does not know and for a config without betas.
        """
        betas = betas_from_config(config)
        abar = torch.cumprod(1.0 - betas, dim=0)
        if config.get("rescale_betas_zero_snr", False):
            root = abar.sqrt()
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            ratio = torch.cat([root[:1] ** 2, root[1:] ** 2 / root[:-1] ** 2])
            abar = torch.cumprod(1.0 - (1.0 - ratio), dim=0)
        return cls(abar)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at integer indices 0 .. N-1, any shape: fp64 on the device of `index`."""
        device = index.device
        if device not in self._alpha_sigma:
            abar = self.alphas_cumprod
            self._alpha_sigma[device] = (abar.sqrt().to(device), (1.0 - abar).sqrt().to(device))
        alpha, sigma = self._alpha_sigma[device]
        return alpha[index], sigma[index]

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.at(index(t, len(self)))
        return alpha.to(t.dtype), sigma.to(t.dtype)

    def timestep(self, t: Tensor) -> Tensor:
        return index(t, len(self)).to(t.dtype)

    def at_timestep(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.at(timestep.long())
        return alpha.to(timestep.dtype), sigma.to(timestep.dtype)


def betas_from_config(config: Mapping[str, Any]) -> Tensor:
    """betas [N] in fp32 of a diffusers scheduler config, before any rescaling."""
    given, steps = config.get("trained_betas"), config.get("num_train_timesteps", TRAIN_STEPS)
    for count in (steps, TRAIN_STEPS if given is None else len(given)):
        if not isinstance(count, int) or not 2 <= count <= MOST_STEPS:
            raise ValueError(f"The scheduler config has {count!r:.40} train steps; a discrete VP schedule has between "
                             f"2 and {MOST_STEPS}.")
    if given is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float32)
    name = config.get("beta_schedule", "linear")
    if name == "squaredcos_cap_v2":
        edge = torch.arange(steps + 1, dtype=torch.float64) / steps
        abar = torch.cos((edge + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1.0 - abar[1:] / abar[:-1]).clamp(max=0.999).float()
    if config.get("beta_start") is None or config.get("beta_end") is None:
        raise ValueError(
            "The scheduler config has neither beta_start and beta_end nor trained_betas, so it describes no discrete "
            "VP schedule; use the scheduler folder of an SD1.5 or SDXL base, or another schedule class."
        )
    start, end = float(config["beta_start"]), float(config["beta_end"])
    if name == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float32)
    if name == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    known = '"linear", "scaled_linear" and "squaredcos_cap_v2"'
    raise ValueError(f'beta_schedule "{name}" is not known here; known are {known}.')


class ContinuousVP:
    """Continuous VP (score_sde): beta(t) = beta_min + (beta_max - beta_min) t, alpha = exp(-int_0^t beta / 2).

    Its networks take 999 t. Source: Song et al., arXiv 2011.13456, appendix B. By default
    alpha = exp(-(9.95 t^2 + .1 t)/2).
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        if not 0 <= beta_min < beta_max:
            raise ValueError(f"beta_min={beta_min} must be at least 0 and below beta_max={beta_max}.")
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        s = t.double()
        integral = 0.5 * (self.beta_max - self.beta_min) * s**2 + self.beta_min * s
        return torch.exp(-0.5 * integral).to(t.dtype), torch.sqrt(-torch.expm1(-integral)).to(t.dtype)

    def timestep(self, t: Tensor) -> Tensor:
        return 999.0 * t

    def at_timestep(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return self.alpha_sigma(timestep / 999.0)


class VE:
    """Variance exploding (EDM): alpha = 1, sigma = t/(1-t), t = sigma/(alpha+sigma) its flow time, up to sigma_max.

    Its networks take sigma itself. t=1 is sigma_max (EDM was trained up to 80, t=.98765), t=0 is sigma_min.
    """

    def __init__(self, sigma_max: float = 80.0, sigma_min: float = 0.0):
        if not 0 <= sigma_min < sigma_max:
            raise ValueError(f"sigma_min={sigma_min} must be at least 0 and below sigma_max={sigma_max}.")
        self.sigma_max, self.sigma_min = float(sigma_max), float(sigma_min)

    def _sigma(self, t: Tensor) -> Tensor:
        # 1 - t is floored where the clamp has long taken over, so that t=1 is no division by zero.
        return (t / (1.0 - t).clamp(min=0.5 / (1.0 + self.sigma_max))).clamp(self.sigma_min, self.sigma_max)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self._sigma(t.double()).to(t.dtype)
        return torch.ones_like(sigma), sigma

    def timestep(self, t: Tensor) -> Tensor:
        return self.alpha_sigma(t)[1]

    def at_timestep(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(timestep), timestep


class EDM(VE):
    """VE with Karras spacing: sigma = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho, t=1 noise.

    Source: Karras et al., arXiv 2206.00364, equation 5 (their i/(N-1) is 1-t).
    """

    def __init__(self, sigma_max: float = 80.0, sigma_min: float = 0.002, rho: float = 7.0):
        super().__init__(sigma_max, sigma_min)
        self.rho = float(rho)

    def _sigma(self, t: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigma: Tensor = (low + t * (high - low)) ** self.rho
        return sigma


@overload
def shifted(u: float, shift: float) -> float: ...
@overload
def shifted(u: Tensor, shift: float) -> Tensor: ...


def shifted(u: float | Tensor, shift: float) -> float | Tensor:
    """Time t = a u / (1 + (a - 1) u) of an even time u, a = `shift`: above 1 more steps near noise, at 1 none moved.

    Esser et al., arXiv 2403.03206, equation 23. A resolution's mu of FLUX and its kin is a = e^mu; the inverse is the
    shift by 1/a.
    """
    return shift * u / (1.0 + (shift - 1.0) * u)


class Rectified:
    """Straight flow: alpha = 1 - t, sigma = t. Its networks take 1000 t, as diffusers' flow-matching models do.

    shift: of the even grids on which it is solved and sampled, as the base's own sampler has it; see `shifted`.
    """

    def __init__(self, shift: float = 1.0):
        if not 0 < shift < math.inf:
            raise ValueError(f"A flow's shift is {shift}; write a number above 0, 1 for an even grid.")
        self.shift = float(shift)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1.0 - t, t.clone()

    def timestep(self, t: Tensor) -> Tensor:
        return 1000.0 * t

    def at_timestep(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return self.alpha_sigma(timestep / 1000.0)
