"""A windowed reflow step as published trainers write it: the baseline of the step benchmark.

Written from a description of such scripts, not from their code. What makes it "published-style":

* Images and captions go through the VAE and the text encoders in every step.
* The window of each sample is looked up in Python, and so is the schedule in every solver step, after a copy of the
  timesteps to the CPU: one host sync a solver step, two more for the logged numbers.
* Latents and the schedule's values have the network's dtype (bf16 with a bf16 network).
* A solver step goes `1000 // (windows * steps)` indices down from a rounded timestep, so it may miss the next one by 1.
* The loss is an upcast, `F.mse_loss` and `F.cosine_similarity`; the EMA a Python loop over parameters.

At guidance scale 1 the unconditional half is not computed, as in the published code; `always_guided` computes it.
Time runs from t=1 (noise) to t=0 (data).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reflow.models.conditioning import Conditioning, denoise
from reflow.models.family import Base

Network = Callable[..., Any]
STEPS = 1000


@dataclass
class Settings:
    """windows and solver_steps of a stage; the rest as in the recipe. direction_weight is a float or [windows]."""

    windows: int
    solver_steps: int
    guidance_scale: float = 1.0
    always_guided: bool = False
    caption_drop: float = 0.1
    direction_weight: float | Tensor = 1.0
    clip: float = 1.0
    ema_decay: float = 0.999


def lookup(t: Tensor, windows: int) -> tuple[Tensor, Tensor, list[int]]:
    """(t_start, t_end, window) of each time in [B], one sample at a time."""
    starts, ends, numbers = torch.zeros_like(t), torch.zeros_like(t), []
    for row in range(len(t)):
        k = 0
        while 1.0 - (k + 1) / windows >= t[row] - 1e-4 and k < windows - 1:
            k += 1
        starts[row], ends[row] = 1.0 - k / windows, 1.0 - (k + 1) / windows
        numbers.append(k)
    return starts, ends, numbers


def index(t: Tensor) -> Tensor:
    """The schedule's index of a time: 999 at t=1, 0 at t=0."""
    return ((STEPS * t).round().long() - 1).clamp(min=0)


def column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, like.dtype).view(-1, *[1] * (like.dim() - 1))


def add_noise(latents: Tensor, noise: Tensor, t: Tensor, abar: Tensor) -> Tensor:
    """A noised latent at time t [B]; abar [1000] is the schedule on the CPU."""
    value = abar[index(t).cpu()]
    return column(value.sqrt(), latents) * latents + column((1 - value).sqrt(), latents) * noise


@torch.no_grad()
def solve(
    network: Network,
    latents: Tensor,
    t_start: Tensor,
    t_end: Tensor,
    prompt: Conditioning,
    null: Conditioning,
    abar: Tensor,
    settings: Settings,
) -> Tensor:
    """DDIM from t_start to t_end [B] in the latents' own dtype. network(sample, timestep, conditioning) -> eps."""
    steps, scale = settings.solver_steps, settings.guidance_scale
    guided = scale > 1.0 or settings.always_guided
    rows = null.cat(prompt) if guided else prompt
    places = torch.arange(steps, device=latents.device) / steps
    times = t_start[:, None] + (t_end - t_start)[:, None] * places
    timesteps = (STEPS * times - 1).round().long().clamp(min=0)
    interval = STEPS // (settings.windows * steps)
    for i in range(steps):
        t = timesteps[:, i]
        doubled, both = (torch.cat([latents] * 2), torch.cat([t] * 2)) if guided else (latents, t)
        eps = network(doubled, both, rows)
        if guided:
            empty, full = eps.chunk(2)
            eps = empty + scale * (full - empty)
        now = t.cpu()
        value, following = abar[now], torch.zeros(len(now))
        for row in range(len(now)):
            place = now[row] - interval
            following[row] = abar[place] if place >= 0 else abar[0]
        noise_now = column(1 - value, latents)
        value, following = column(value, latents), column(following, latents)
        x0 = (latents - noise_now**0.5 * eps) / value**0.5
        latents = following**0.5 * x0 + (1 - following) ** 0.5 * eps
    return latents


def velocity_of(eps: Tensor, z: Tensor, t: Tensor, t_start: Tensor, t_end: Tensor, abar: Tensor) -> Tensor:
    """The velocity that a noise prediction at z on the chord means: PeRFlow's closed form (arXiv 2405.07510, eq. 6)."""
    a_s, a_e = abar[index(t_start).cpu()], abar[index(t_end).cpu()]
    ratio = (a_e / a_s).sqrt()
    slope = (1 - a_e).sqrt() - (a_e * (1 - a_s) / a_s).sqrt()
    ratio, slope = column(ratio, z), column(slope, z)
    t, t_start, t_end = column(t, z), column(t_start, z), column(t_end, z)
    return ((1 - ratio) * z - slope * eps) / (t - t_end + ratio * (t_start - t))


def aligned_loss(velocity: Tensor, target: Tensor, direction_weight: float | Tensor) -> Tensor:
    """Squared error plus direction_weight (float or [B]) times 1 - cosine (ProReflow, arXiv 2503.04824)."""
    velocity, target = velocity.float(), target.float()
    cosine = F.cosine_similarity(velocity.flatten(1), target.flatten(1), dim=1)
    return F.mse_loss(velocity, target) + (direction_weight * (1 - cosine)).mean()


def average(shadow: Iterable[Tensor], parameters: Iterable[Tensor], decay: float) -> None:
    """EMA, one parameter after another."""
    with torch.no_grad():
        for kept, parameter in zip(shadow, parameters, strict=True):
            kept.sub_((1 - decay) * (kept - parameter))


class PublishedLoop:
    """A training step with the networks of a base. Calling it runs one step and returns the loss as a float.

    base: VAE and text encoders. pixels [n,c,H,W], sentences [n]: the raw data. encoded: (latents [n,C,h,w], their
    captions, one null row) made before, with which the loop encodes nothing.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        base: Base,
        settings: Settings,
        *,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        abar: Tensor,
        pixels: Tensor,
        sentences: list[str],
        optimizer: torch.optim.Optimizer,
        encoded: tuple[Tensor, Conditioning, Conditioning] | None = None,
    ) -> None:
        self.teacher, self.student, self.base, self.settings = teacher, student, base, settings
        self.batch, self.device, self.dtype, self.abar = batch, device, dtype, abar.float().cpu()
        self.pixels, self.sentences, self.optimizer, self.encoded = pixels, sentences, optimizer, encoded
        self.shadow: list[Tensor] = []
        self.logged: dict[str, float] = {}
        self.count = 0

    def inputs(self) -> tuple[Tensor, Conditioning, Conditioning]:
        """(latents [B,C,h,w], captions, null prompts) of the next batch, in the network's dtype."""
        items = [(self.count + i) % len(self.pixels) for i in range(self.batch)]
        if self.encoded is not None:
            latents, captions, null = self.encoded
            items = torch.tensor([(self.count + i) % len(latents) for i in range(self.batch)])
            latents, captions = latents[items].to(self.device, self.dtype), captions.select(items)
        else:
            latents = self.base.encode_images(self.pixels[items].to(self.device)).to(self.dtype)
            texts = [self.sentences[(self.count + i) % len(self.sentences)] for i in range(self.batch)]
            captions, null = self.base.encode_prompts(texts), self.base.null_conditioning(1)
        null = null.select(torch.zeros(self.batch, dtype=torch.long, device=null.encoder_hidden_states.device))
        return latents, captions.to(self.device, self.dtype), null.to(self.device, self.dtype)

    def window(self, latents: Tensor, noise: Tensor, t: Tensor, taught: Conditioning, null: Conditioning):
        """(z_start, z_end, t_start, t_end, window): the teacher's part of a step."""
        t_start, t_end, numbers = lookup(t, self.settings.windows)
        z_start = add_noise(latents, noise, t_start, self.abar)
        z_end = solve(
            lambda x, time, rows: denoise(self.teacher, x, time, rows),
            z_start, t_start, t_end, taught, null, self.abar, self.settings,
        )  # fmt: skip
        return z_start, z_end, t_start, t_end, numbers

    def loss(self, solved: tuple, t: Tensor, seen: Conditioning) -> Tensor:
        """The student's loss at times t on solved windows."""
        z_start, z_end, t_start, t_end, numbers = solved
        with torch.no_grad():
            target = (z_end - z_start) / column(t_end - t_start, z_start)
            z_t = (z_start + target * column(t - t_start, z_start)).to(self.dtype)
        eps = denoise(self.student, z_t, index(t), seen)
        weight = self.settings.direction_weight
        if isinstance(weight, Tensor):
            weight = weight[numbers].to(self.device)
        return aligned_loss(velocity_of(eps, z_t, t, t_start, t_end, self.abar), target, weight)

    def tail(self) -> None:
        """Clip, optimizer and EMA."""
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not self.shadow:
            self.shadow = [p.detach().clone() for p in self.student.parameters()]
        average(self.shadow, self.student.parameters(), self.settings.ema_decay)

    def __call__(self) -> float:
        with torch.no_grad():
            latents, captions, null = self.inputs()
            keep = torch.zeros(self.batch, 1, 1, device=self.device, dtype=self.dtype)
            for row in range(self.batch):
                keep[row] = float(random.random() >= self.settings.caption_drop)
            seen = captions.where(keep.view(-1) > 0, null)
            t = 1 - (torch.rand(self.batch, device=self.device) * STEPS).floor() / STEPS
            taught = captions if self.settings.guidance_scale > 1.0 else seen
            solved = self.window(latents, torch.randn_like(latents), t, taught, null)
        self.count += self.batch
        loss = self.loss(solved, t, seen)
        gathered = loss.detach().repeat(self.batch).mean().item()
        loss.backward()
        self.tail()
        self.logged = {"train_loss": gathered, "step_loss": loss.detach().item()}
        return gathered
