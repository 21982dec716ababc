"""The teacher's solve inside a window: from z at t_start to z at t_end, many windows in one batch.

Time runs from t=1 (noise) to t=0 (data). Everything that depends on the window is a table computed in fp64 and
gathered on the device by window number, so a solve has no host sync and no per-sample Python and can be captured in a
CUDA graph. The state is fp32 (or `dtype`); only the network's input is cast. Sources: PeRFlow, arXiv 2405.07510 (the
solve); Karras et al., arXiv 2206.00364, algorithm 1 (Heun).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reflow_kernels import guided_step

from .chord import MIN_ALPHA, ChordTable
from .prediction import KINDS, ddim_coefficients, expand, flow_coefficients
from .schedule import DiscreteVP, Schedule, index, network_time, shifted
from .windows import Windows

METHODS = ("ddim", "euler", "heun")
Network = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Corrector:
    """Heun's second half, [S, K] each: z' = keep z + predictor z~ + output o2, o2 the network at z~ and `timestep`."""

    keep: Tensor
    predictor: Tensor
    output: Tensor
    timestep: Tensor


class WindowSolver:
    """A pre-trained teacher that solves its ODE from each window's start to its end in `steps` steps.

    The grid is t_start + (t_end - t_start) i/S, of a flow with a shift evenly spaced before that shift. On a discrete
    schedule the solver goes from index(t_i) to index(t_{i+1}) on the table, with no floor division; repeated indices
    are a ValueError.

    prediction_type: what the network's output is ("epsilon", "v_prediction", "sample", "velocity").
    method: "ddim"; "euler", the same step, since DDIM is Euler in each reading's own coordinates; or "heun",
        the trapezoid of flow velocities in z/(alpha+sigma) over sigma/(alpha+sigma), with its second evaluation at the
        step's end. That step is Euler alone where the end has sigma = 0 (EDM's practice; abar[0] has sigma = .03, so
        VP tables keep Heun).
    guidance_scale: None means that no unconditional half exists. A float or [B], 1.0 included, means the network gets
        2B rows [uncond; cond], in diffusers' convention u + w (c - u).
    backward: solve from the window's clean end up to its noisy start (DDIM inversion): the same steps on the grid the
        other way round, each with the network asked where it begins, so it undoes a solve up to the method's order, and
        to rounding where the network's answer (eps, x0 or velocity) does not change along a step.
    """

    def __init__(
        self,
        schedule: Schedule,
        windows: Windows,
        steps: int,
        *,
        prediction_type: str = "epsilon",
        method: str = "ddim",
        guidance_scale: float | Tensor | None = None,
        backward: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        if method not in METHODS:
            raise ValueError(f'Solver method "{method}" is not known; known are "ddim", "euler" (the same) and "heun".')
        if prediction_type not in KINDS:
            known = ", ".join(f'"{name}"' for name in KINDS)
            raise ValueError(f'A teacher with prediction_type "{prediction_type}" is not known; known are {known}.')
        grid = time_grid(windows, steps, getattr(schedule, "shift", 1.0))
        if isinstance(schedule, DiscreteVP):
            _refuse_repeated_indices(grid, len(schedule), windows)
        grid = grid.flip(0) if backward else grid
        alpha, sigma = schedule.alpha_sigma(grid)
        if prediction_type == "epsilon" and bool((alpha[:-1] < MIN_ALPHA).any()):
            raise ValueError(
                "An epsilon teacher cannot start a window where alpha is 0 (zero terminal SNR): its output says "
                "nothing about the image there; use a v_prediction teacher, or the schedule without that rescaling."
            )
        if prediction_type == "sample" and bool((sigma[:-1] <= 0).any()):
            raise ValueError("A sample-prediction teacher cannot step from sigma = 0; end the windows there instead.")
        state, output = ddim_coefficients(prediction_type, alpha[:-1], sigma[:-1], alpha[1:], sigma[1:])
        times = schedule.timestep(grid)
        corrector = _heun(prediction_type, alpha, sigma, times) if method == "heun" else None
        self._set(windows, steps, state, output, times[:-1], corrector, guidance_scale, device, dtype)

    @classmethod
    def from_student(
        cls,
        table: ChordTable,
        windows: Windows,
        steps: int,
        *,
        network_time_mode: str = "index",
        guidance_scale: float | Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> WindowSolver:
        """Teacher "previous" of progressive reflow: a student trained on `table`'s windows steps through `windows`.

        Each step of the grid is an Euler step of the chord velocity that the student has in its own window at that
        time; a grid point at a boundary is in the window that starts there. With one step a sub-window and straight
        sub-windows the solve is exact, since the merged velocity is the mean of the two. Device and dtype default to
        the table's.

        Raises ValueError if a boundary of the student's windows falls between two grid points, since a step across it
        would use the velocity of a window that has ended.
        """
        grid = time_grid(windows, steps, getattr(table.schedule, "shift", 1.0))
        known = table.windows.boundaries
        if windows.boundaries[0] > known[0] + 1e-4 or windows.boundaries[-1] < known[-1] - 1e-4:
            raise ValueError(
                f"The windows run from {windows.boundaries[0]:g} to {windows.boundaries[-1]:g}, but the student was "
                f"trained from {known[0]:g} to {known[-1]:g} only; solve inside the times that it knows."
            )
        for k in range(len(windows)):
            for inner in known[1:-1]:
                inside = windows.t_end[k] + 1e-4 < inner < windows.t_start[k] - 1e-4
                if inside and float((grid[:, k] - inner).abs().min()) > 1e-4:
                    raise ValueError(
                        f"{steps} solver steps in the window from {windows.t_start[k]:g} to {windows.t_end[k]:g} step "
                        f"across the student's boundary at {inner:g}; use a multiple of the number of its windows that "
                        "are merged."
                    )
        exact = table.to("cpu", torch.float64)
        start, step = grid[:-1], grid[1:] - grid[:-1]
        sample_coef, output_coef = exact.velocity_coefficients(table.windows.lookup(start), start)
        times = network_time(start, network_time_mode).double()
        solver = cls.__new__(cls)
        place = device or table.device, dtype or table.dtype
        solver._set(windows, steps, 1.0 + step * sample_coef, step * output_coef, times, None, guidance_scale, *place)
        return solver

    def _set(
        self,
        windows: Windows,
        steps: int,
        state: Tensor,
        output: Tensor,
        timestep: Tensor,
        corrector: _Corrector | None,
        guidance_scale: float | Tensor | None,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.windows, self.steps, self.guidance_scale, self.dtype = windows, steps, guidance_scale, dtype

        def keep(value: Tensor) -> Tensor:
            return value.to(device=device, dtype=dtype)

        self._state, self._output, self._timestep = keep(state), keep(output), timestep.to(device, torch.float32)
        self._corrector = corrector and _Corrector(
            keep(corrector.keep),
            keep(corrector.predictor),
            keep(corrector.output),
            corrector.timestep.to(device, torch.float32),
        )

    @property
    def evaluations(self) -> int:
        """Network rows per solved sample: steps, twice that with Heun, twice again with an unconditional half."""
        return self.steps * (1 if self._corrector is None else 2) * (1 if self.guidance_scale is None else 2)

    def steps_table(self) -> tuple[Tensor, Tensor, Tensor]:
        """(state_coef, output_coef, timestep), each [S, K]: step i of window k is z' = state_coef z + output_coef
        output, with the network called at z and `timestep` (fp32). For Heun this is the predictor, and `heun_table`
        holds the rest."""
        return self._state, self._output, self._timestep

    def heun_table(self) -> _Corrector | None:
        """Heun's corrector (fields keep, predictor, output, timestep, each [S, K]); None for a first-order solver."""
        return self._corrector

    @torch.no_grad()
    def solve(
        self, model: Network, z_start: Tensor, window: Tensor, *, input_dtype: torch.dtype | None = None
    ) -> Tensor:
        """z at the windows' clean ends, [B, ...] in the solver's dtype, from z_start [B, ...] at their noisy ends; of a
        backward solver the other way round.

        window: [B] long, on the device. model(model_input, timestep) -> output is called with B rows, or with 2B rows
        [uncond; cond] if there is a guidance scale; model_input is in input_dtype (None: the state's), timestep is
        fp32. Any conditioning lives in the closure.
        """
        rows = 1 if self.guidance_scale is None else 2

        def doubled(value: Tensor, rows_at: int = 0) -> Tensor:
            return value if rows == 1 else torch.cat([value, value], rows_at)

        # What a step needs is there before the first, so that a step is one launch and the network.
        scale = self.guidance_scale
        if isinstance(scale, float | int):
            scale = torch.full((len(z_start),), float(scale), dtype=self.dtype, device=z_start.device)

        def advance(state: Tensor, output: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return guided_step(state, output, a, b, guidance_scale=scale, input_dtype=cast)

        z, cast = z_start.to(self.dtype), input_dtype or self.dtype
        state, output = self._state[:, window], self._output[:, window]
        timestep = doubled(self._timestep[:, window], 1)
        model_input = doubled(z.to(cast))
        if self._corrector is None:
            for i in range(self.steps):
                z, model_input = advance(z, model(model_input, timestep[i]), state[i], output[i])
            return z
        keep, predictor = self._corrector.keep[:, window], self._corrector.predictor[:, window]
        second, second_time = self._corrector.output[:, window], doubled(self._corrector.timestep[:, window], 1)
        one = torch.ones_like(keep[0])
        for i in range(self.steps):
            moved, moved_input = advance(z, model(model_input, timestep[i]), state[i], output[i])
            answer = model(moved_input, second_time[i])
            mixed = expand(keep[i], z) * z + expand(predictor[i], z) * moved
            z, model_input = advance(mixed, answer, one, second[i])
        return z


def time_grid(windows: Windows, steps: int, shift: float = 1.0) -> Tensor:
    """Times [S+1, K] in fp64: row 0 is every window's start, row S its end, and between them
    t_start + (t_end - t_start) i/S, or with a shift points that lie so before it (`shifted`)."""
    if steps < 1:
        raise ValueError(f"A window cannot be solved in {steps} steps; at least one is needed.")
    start = torch.tensor(windows.t_start, dtype=torch.float64)
    end = torch.tensor(windows.t_end, dtype=torch.float64)
    share = (torch.arange(steps + 1, dtype=torch.float64) / steps)[:, None]
    if shift == 1.0:
        return torch.lerp(start, end, share)
    grid = shifted(torch.lerp(shifted(start, 1.0 / shift), shifted(end, 1.0 / shift), share), shift)
    grid[0], grid[-1] = start, end  # to the bit, whatever the rounding of there and back
    return grid


def _refuse_repeated_indices(grid: Tensor, train_steps: int, windows: Windows) -> None:
    steps = len(grid) - 1
    repeated = (index(grid, train_steps).diff(dim=0) >= 0).any(dim=0)
    if bool(repeated.any()):
        k = int(repeated.nonzero()[0])
        raise ValueError(
            f"{steps} solver steps do not fit into the window from {windows.t_start[k]:g} to {windows.t_end[k]:g}: two "
            f"of them fall on one of the schedule's {train_steps} indices; use fewer steps or a wider window."
        )


def _heun(kind: str, alpha: Tensor, sigma: Tensor, times: Tensor) -> _Corrector:
    """With y = z/r, s = sigma/r, r = alpha + sigma and h = s' - s the DDIM step is z~ = r' (y + h u1), so the trapezoid
    r' (y + h (u1 + u2)/2) is (z~ + r' y + r' h u2)/2: u1 needs no second reading and nothing cancels."""
    r = alpha + sigma
    step = sigma[1:] / r[1:] - sigma[:-1] / r[:-1]
    sample_coef, output_coef = flow_coefficients(kind, alpha[1:], sigma[1:].clamp(min=torch.finfo(sigma.dtype).tiny))
    last = sigma[1:] <= 0
    keep = 0.5 * r[1:] / r[:-1]
    predictor = 0.5 * (1.0 + r[1:] * step * sample_coef)
    output = 0.5 * r[1:] * step * output_coef
    zero = torch.zeros_like(keep)
    return _Corrector(
        torch.where(last, zero, keep),
        torch.where(last, torch.ones_like(keep), predictor),
        torch.where(last, zero, output),
        # an Euler row still takes part in the batched call, so it is asked at a time the network knows
        torch.where(last, times[:-1], times[1:]),
    )
