"""The exact bed: a teacher without error on 8x8 digits, and students that are this teacher plus a small network that starts at zero.

The teacher's answer is the closed form of `mixture.LowRankMixture` on the noise schedule of the digits base, so whatever a student does
worse than the fine solve is the student's and its windows' alone, and an untrained student is its teacher's own K-step DDIM. Schedules,
windows, solver, chords, objective and merging are the product's own (`reflow.flow`, `reflow.training.targets`): the bed judges them.
Time runs from t=1 (noise) to t=0 (data).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from reflow.experiments.beds import scans
from reflow.experiments.beds.mixture import NULL, LowRankMixture
from reflow.flow import ChordTable, DiscreteVP, Windows, WindowSolver
from reflow.flow.exact import network

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
Model = Callable[[Tensor, Tensor, Tensor], Tensor]  # (z [B, D], timestep [B], labels [B]) -> output [B, D]
FREQUENCIES = 8


@dataclass(frozen=True)
class ExactBed:
    """zero_snr: the schedule rescaled to zero terminal SNR, where the networks predict v; otherwise eps.

    scans: what the mixture is fitted to, a file or folder of 28x28 digits; "" for the bundled 8x8 ones. dtype: of everything that is
    computed."""

    zero_snr: bool = False
    scans: str = ""
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @cached_property
    def mixture(self) -> LowRankMixture:
        return scans.mixture(self.scans).to(self.dtype, self.device)

    @cached_property
    def schedule(self) -> DiscreteVP:
        return DiscreteVP.from_config({**SCHEDULE, "rescale_betas_zero_snr": self.zero_snr})

    @property
    def prediction_type(self) -> str:
        """Of the teacher, in diffusers' names."""
        return "v_prediction" if self.zero_snr else "epsilon"

    @property
    def student_type(self) -> str:
        """The student's reading on the chord that starts as the teacher."""
        return "ddim_v" if self.zero_snr else "ddim_eps"

    def teacher(self, z: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """The exact output at z [B, D], timestep [B], labels [B] (NULL: no class)."""
        return network(self.mixture.of(labels), self.schedule, self.prediction_type)(z, timestep)

    def clean(self) -> tuple[float, float]:
        """(alpha, sigma) at t = 0, the noise that the table leaves in a finished sample."""
        alpha, sigma = self.schedule.alpha_sigma(torch.zeros(1, dtype=torch.float64))
        return float(alpha), float(sigma)

    def table(self, windows: Windows, prediction_type: str = "") -> ChordTable:
        return ChordTable(self.schedule, windows, prediction_type or self.student_type, device=self.device, dtype=self.dtype)

    def solver(self, windows: Windows, steps: int, *, guidance: float | None = None, method: str = "ddim", backward: bool = False) -> WindowSolver:
        """The teacher's solver."""
        return WindowSolver(self.schedule, windows, steps, prediction_type=self.prediction_type, method=method, guidance_scale=guidance,
                            backward=backward, device=self.device, dtype=self.dtype)  # fmt: skip

    def fine(self, noise: Tensor, labels: Tensor, *, guidance: float | None = None, steps: int = 500) -> Tensor:
        """What the flow itself makes of noise [B, D]: so many steps of Heun over the whole of time, each index of the table at most once."""
        return self.sample(self.teacher, self.solver(Windows.uniform(1), steps, guidance=guidance, method="heun"), noise, labels)

    def sample(self, model: Model, solver: WindowSolver, noise: Tensor, labels: Tensor) -> Tensor:
        """z at t = 0 [B, D] from noise [B, D], one window after the other."""
        return self.path(model, solver, noise, labels)[-1]

    def path(self, model: Model, solver: WindowSolver, noise: Tensor, labels: Tensor, *, backward: bool = False) -> list[Tensor]:
        """z at every boundary of the solver's windows, noise first; backward: of a backward solver, from samples, which come first."""
        asked = labels if solver.guidance_scale is None else torch.cat([torch.full_like(labels, NULL), labels])
        states = [noise.to(self.dtype)]
        order = range(len(solver.windows))
        for k in reversed(order) if backward else order:
            window = torch.full((len(noise),), k, device=noise.device)
            states.append(solver.solve(lambda z, t: model(z, t, asked), states[-1], window))
        return states

    def student_solver(self, table: ChordTable, steps: int = 1, *, guidance: float | None = None) -> WindowSolver:
        """A student's sampler: so many Euler steps of its chord velocity in each of its windows."""
        return WindowSolver.from_student(table, table.windows, steps, guidance_scale=guidance)


class Correction(nn.Module):
    """What a student adds to the exact output: a small network of z, the exact output, time and class; zero before it is trained.

    seeds: one network for each, side by side, so that students that differ in their seed alone are trained at the cost of little more than
    one; rows [S B] belong to the S networks in turn, B each. width: of the hidden layers. sees_output: the exact output is given besides z,
    as a copy of a trained network has it inside."""

    SHAPES = ("enter", "time", "label", "first", "second", "leave")

    def __init__(self, size: int, width: int = 128, sees_output: bool = True, seeds: tuple[int, ...] = (0,)) -> None:
        super().__init__()
        self.sees_output = sees_output
        fan = {
            "enter": 2 * size if sees_output else size,
            "time": 2 * FREQUENCIES,
            "label": NULL + 1,
            "first": width,
            "second": width,
            "leave": width,
        }
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for name in self.SHAPES:
            out = size if name == "leave" else width
            drawn = [torch.randn((fan[name], out), generator=g) * (1.0 if name == "label" else 0.6 * fan[name] ** -0.5) for g in generators]
            weight = torch.stack(drawn) * (0.0 if name == "leave" else 1.0)
            self.register_parameter(name, nn.Parameter(weight))
            if name != "label":
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(len(seeds), 1, out)))

    def forward(self, z: Tensor, output: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        networks, rows = len(self.enter), len(z) // len(self.enter)

        def layer(name: str, x: Tensor) -> Tensor:
            bias, weight = getattr(self, f"{name}_bias"), getattr(self, name)
            return torch.baddbmm(bias, x.view(networks, rows, -1), weight).flatten(0, 1)

        angle = timestep[:, None] / 1000.0 * (2.0 ** torch.arange(FREQUENCIES, device=z.device)) * (math.pi / 2)
        features = torch.cat([angle.sin(), angle.cos()], 1).to(z.dtype)
        place = labels + (NULL + 1) * torch.arange(networks, device=z.device).repeat_interleave(rows)
        h = layer("enter", torch.cat([z, output], 1) if self.sees_output else z) + layer("time", features) + self.label.flatten(0, 1)[place]
        h = h + layer("second", nn.functional.silu(layer("first", nn.functional.silu(h))))
        # Normalised: where the exact output needs no correction, plain features die and no later stage finds them again.
        return layer("leave", nn.functional.silu(nn.functional.layer_norm(h, h.shape[-1:])))


def student(bed: ExactBed, correction: nn.Module) -> Model:
    """The student: the exact output plus the correction; only the correction has a gradient."""

    def call(z: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            exact = bed.teacher(z, timestep, labels)
        return exact + correction(z, exact, timestep, labels)

    return call


def untrained(bed: ExactBed, width: int = 128) -> Model:
    """The student before its first step: the teacher."""
    return student(bed, Correction(bed.mixture.means.shape[1], width).to(bed.device, bed.dtype))
