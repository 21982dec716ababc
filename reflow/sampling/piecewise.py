"""The diffusers scheduler of a windowed student: Euler steps along the chord of each window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput

from reflow.errors import quote
from reflow.flow.chord import PREDICTION_TYPES, ChordTable
from reflow.flow.schedule import NETWORK_TIMES, DiscreteVP, betas_from_config, network_time
from reflow.flow.windows import Windows
from reflow.sampling.window_steps import StepsError, WindowSteps

# A diffusers base names its own parameterisation; on a window's chord the same network reads as these.
FROM_BASE = {"epsilon": "ddim_eps", "v_prediction": "ddim_v"}
# What the network's output is; a base may become a velocity student, but nothing else changes its kind.
KINDS = {"ddim_eps": "noise", "diff_eps": "noise", "ddim_v": "v", "velocity": "velocity"}


def contradiction(stored: str | None, asked: str | None) -> str | None:
    """A sentence if a student of a model whose scheduler config stores one prediction_type cannot be read as the one
    that is asked for; None where it can, or where one of them is unknown. An eps network read as v, or the reverse,
    gives noise instead of images, with no other sign."""
    was, now = (KINDS.get(FROM_BASE.get(str(name), str(name))) for name in (stored, asked))
    if was is None or now is None or was == now or (now == "velocity" and stored in FROM_BASE):
        return None
    return (
        f"prediction_type is asked to be {asked!r}, but the config says {quote(stored)}, so these weights predict {was} and "
        f"not {now}. Leave prediction_type out, or give the config that belongs to the weights."
    )


class PiecewiseFlowScheduler(WindowSteps, SchedulerMixin, ConfigMixin):
    """Few-step sampling of a network trained on the chords of K time windows (PeRFlow, arXiv 2405.07510; ProReflow,
    2503.04824).

    Time runs from t=1 (noise) to t=0 (data). Inside a window alpha and sigma are linear in t, so one Euler step
    ``sample + v * dt`` follows the chord exactly; K steps on K windows of a ``ddim_*`` student are K-step DDIM.

    Config keys are those of published PeRFlow schedulers, plus:

    * ``prediction_type``: ``ddim_eps``, ``ddim_v``, ``diff_eps`` or ``velocity``; ``epsilon`` and ``v_prediction`` of
      a diffusers base are read as ``ddim_eps`` and ``ddim_v``. It must be the student's own, or images are mis-scaled.
    * ``network_time``: the time value the network is given, ``"index"`` (max(round(1000 t) - 1, 0), as the base was
      trained) or ``"perflow"`` (1000 t). None is ``"index"``, but for ``diff_eps``, the parameterisation of PeRFlow's
      published SD1.5 weights, ``"perflow"``. A config whose class is PeRFlowScheduler loads as ``"perflow"``, and its
      early ``epsilon`` as ``diff_eps``. PeRFlow's published SDXL weights are ``ddim_eps`` and need it given.
    * ``window_boundaries``: K+1 descending times, for windows that are not uniform; it decides ``num_time_windows``.
    * ``steps_per_window``: K numbers of steps, as (1, 9), where they are not to be spread evenly; a pipeline must then be
      called with their sum.

    Arithmetic is fp32 (fp64 for fp64 samples) whatever the dtype of the network; the result has the dtype of
    ``sample``. Raises :class:`StepsError`, a ``UserError`` and a ``ValueError``, for settings that cannot work.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "ddim_eps",
        t_noise: float = 1.0,
        t_clean: float = 0.0,
        num_time_windows: int = 4,
        window_boundaries: Sequence[float] | None = None,
        network_time: str | None = None,
        steps_per_window: Sequence[int] | None = None,
    ) -> None:
        prediction_type = FROM_BASE.get(str(prediction_type), prediction_type)
        if network_time is None:
            network_time = "perflow" if prediction_type == "diff_eps" else "index"
        if prediction_type not in PREDICTION_TYPES:
            raise StepsError(
                f"PiecewiseFlowScheduler: prediction_type is {quote(prediction_type)}; use one of "
                f"{', '.join(PREDICTION_TYPES)}, or epsilon or v_prediction for a student that kept its base's "
                "parameterisation."
            )
        if network_time not in NETWORK_TIMES:
            raise StepsError(
                f"PiecewiseFlowScheduler: network_time is {quote(network_time)}; use 'index' (as diffusers bases are "
                "trained) or 'perflow' (1000 t, as PeRFlow's published weights)."
            )
        try:
            if window_boundaries is not None:
                self.windows = Windows(tuple(float(t) for t in window_boundaries))
                t_noise, t_clean = self.windows.boundaries[0], self.windows.boundaries[-1]
            else:
                self.windows = Windows.uniform(num_time_windows, t_noise=t_noise, t_clean=t_clean)
            schedule = DiscreteVP.from_config(self.config)
            # fp64: the coefficients of a step become Python floats, rounded once by the arithmetic itself.
            self._table = ChordTable(schedule, self.windows, prediction_type, device="cpu", dtype=torch.float64)
        except (ValueError, TypeError, OverflowError) as error:  # a config's values may be of any type
            raise StepsError(f"PiecewiseFlowScheduler: {error}") from error
        if steps_per_window is not None:
            steps_per_window = self._split(steps_per_window)
        self.register_to_config(
            steps_per_window=steps_per_window,
            prediction_type=prediction_type,
            num_time_windows=len(self.windows),
            t_noise=t_noise,
            t_clean=t_clean,
            network_time=network_time,
        )
        # fp32 [num_train_timesteps] on the CPU, as in diffusers' schedulers: code that is written for those reads them.
        self.betas = betas_from_config(self.config)
        if rescale_betas_zero_snr:
            self.betas = rescale_zero_terminal_snr(self.betas)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = schedule.alphas_cumprod.to(torch.float32)
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._times: list[float] = []
        self._steps: list[tuple[float, float]] = []
        self._positions: dict[float, int] = {}
        # Before set_timesteps diffusers' schedulers show the whole training grid.
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers; reads configs of PeRFlowScheduler and of any diffusers scheduler with a discrete VP
        schedule. Raises StepsError where a prediction_type is given that contradicts the config's own."""
        if isinstance(config, Mapping):
            config = dict(config)
            if config.get("_class_name") == "PeRFlowScheduler":
                config.setdefault("network_time", "perflow")
                if config.get("prediction_type") == "epsilon":
                    config["prediction_type"] = "diff_eps"  # the only eps mode of the scheduler's first versions
            if "num_time_windows" in kwargs and "window_boundaries" not in kwargs:
                config.pop("window_boundaries", None)  # the caller asked for uniform windows
            if {"num_time_windows", "window_boundaries"} & kwargs.keys() and "steps_per_window" not in kwargs:
                config.pop("steps_per_window", None)  # of other windows
            problem = contradiction(config.get("prediction_type"), kwargs.get("prediction_type"))
            if problem:
                raise StepsError(f"PiecewiseFlowScheduler: {problem}")
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def for_student(
        cls,
        scheduler_config: Mapping[str, Any],
        windows: int | Windows,
        *,
        prediction_type: str | None = None,
        network_time: str | None = None,
    ) -> PiecewiseFlowScheduler:
        """The scheduler of a student trained on ``windows`` of the base whose scheduler has this config.

        ``windows`` is their number, if uniform, or the windows themselves; prediction_type None means the base's own,
        network_time None what the class says.
        """
        if isinstance(windows, Windows):
            first, last = windows.boundaries[0], windows.boundaries[-1]
            uniform = windows == Windows.uniform(len(windows), first, last)
            split = (
                dict(num_time_windows=len(windows), t_noise=first, t_clean=last)
                if uniform
                else dict(window_boundaries=windows.boundaries)
            )
        else:
            split = dict(num_time_windows=windows)
        given = {"prediction_type": prediction_type, "network_time": network_time}
        return cls.from_config(
            scheduler_config, **split, **{key: value for key, value in given.items() if value is not None}
        )

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def begin_index(self) -> int | None:
        """The step that an img2img pipeline starts at; None where it starts at the first."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """The step that ``step`` will take next; None before the first."""
        return self._step_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Called by img2img and inpaint pipelines. Raises StepsError where no step would be left to run."""
        if begin_index >= len(self.timesteps):
            raise self._no_step_left()
        self._begin_index = self._step_index = begin_index

    def _no_step_left(self) -> StepsError:
        steps = self.num_inference_steps or len(self.timesteps)
        return StepsError(
            f"Image to image with num_inference_steps={steps} starts after the last step, so there is nothing to run: "
            f"strength * num_inference_steps is below 1. Use a strength of at least {1 / steps:.4g} or more steps "
            "(SDXL: or an earlier denoising_start)."
        )

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """Identity: the network sees the sample as it is."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        steps_per_window: Sequence[int] | None = None,
    ) -> None:
        """N steps: N // K in every window, one more in each of the first N mod K (the noisiest), or as many as
        ``steps_per_window`` (here for this call, else the config's) says.

        ``timesteps[N]`` is int64 for network_time "index" and fp32 for "perflow"; every value is unique and names its
        window. Raises StepsError if N is below the number of windows or too large for the training grid.
        """
        self.need_a_step_each(num_inference_steps)
        times: list[float] = []
        window: list[int] = []
        split = self.counts(num_inference_steps, steps_per_window)
        for k, (start, end, steps) in enumerate(zip(self.windows.t_start, self.windows.t_end, split, strict=True)):
            times += [start + (end - start) * i / steps for i in range(steps)]
            window += [k] * steps
        t = torch.tensor(times, dtype=torch.float64)
        values = network_time(t, self.config.network_time, len(self))
        if self.config.network_time == "index":
            values = values.round().long()
        self._positions = {value: i for i, value in enumerate(values.tolist())}
        if len(self._positions) < num_inference_steps:
            raise StepsError(
                f"num_inference_steps={num_inference_steps} puts two steps on one of the {len(self)} training times; "
                "use fewer steps, or wider windows."
            )
        sample_coef, output_coef = self._table.velocity_coefficients(torch.tensor(window), t)
        dt = torch.tensor([*times[1:], self.windows.t_end[-1]], dtype=torch.float64) - t
        self._steps = list(zip((1 + dt * sample_coef).tolist(), (dt * output_coef).tolist(), strict=True))
        self._times = times
        self._windows_of_steps = torch.tensor(window)
        self.num_inference_steps = num_inference_steps
        self._begin_index = self._step_index = None
        self.timesteps = values.to(device)

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """The number of the step that starts at this timestep, one of ``timesteps``."""
        if isinstance(timestep, torch.Tensor):
            if timestep.numel() != 1:
                raise StepsError(
                    f"step takes one timestep for the whole batch, not a tensor of shape {tuple(timestep.shape)}."
                )
            # A pipeline passes elements of `timesteps` itself: their place in memory is their number, known without
            # waiting for the device.
            if timestep.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr():
                return timestep.storage_offset()
            timestep = timestep.item()
        if timestep not in self._positions:
            raise StepsError(
                f"timestep {timestep} is not one of this run's timesteps {list(self._positions)}; call set_timesteps "
                "first and pass its values."
            )
        return self._positions[timestep]

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """One Euler step ``sample + v * dt`` from ``timestep`` to the next one; sample and model_output are [B,C,H,W]
        of any float dtype."""
        if self.num_inference_steps is None:
            raise StepsError("Call set_timesteps(num_inference_steps) before step.")
        index = self.index_for_timestep(timestep)
        state_coef, output_coef = self._steps[index]
        work = torch.float64 if sample.dtype == torch.float64 else torch.float32
        prev_sample = (state_coef * sample.to(work) + output_coef * model_output.to(work)).to(sample.dtype)
        self._step_index = index + 1
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noise clean samples [B,C,H,W] to ``timesteps`` [B] or [1], with the chord's alpha and sigma inside a window.

        A value of ``self.timesteps`` stands for that step's exact time; any other for t = (timestep + 1) / 1000
        ("index") or timestep / 1000 ("perflow"). Raises StepsError for no timestep at all: the sign of an img2img
        strength that leaves no step.
        """
        timesteps = torch.as_tensor(timesteps).flatten().cpu()
        if timesteps.numel() == 0:
            raise self._no_step_left()
        offset = 1 if self.config.network_time == "index" else 0
        t = ((timesteps.double() + offset) / len(self)).clamp(self.windows.t_end[-1], self.windows.t_start[0])
        window = self.windows.lookup(t)
        for i, value in enumerate(timesteps.tolist()):
            if value in self._positions:
                step = self._positions[value]
                t[i], window[i] = self._times[step], self._windows_of_steps[step]
        alpha, sigma = self._table.alpha_sigma(window, t)
        shape = (-1, *[1] * (original_samples.ndim - 1))
        work = torch.float64 if original_samples.dtype == torch.float64 else torch.float32
        alpha = alpha.to(original_samples.device, work).view(shape)
        sigma = sigma.to(original_samples.device, work).view(shape)
        return (alpha * original_samples.to(work) + sigma * noise.to(work)).to(original_samples.dtype)


# model_index.json of a saved pipeline names this module, which also holds SchedulerMixin.
PiecewiseFlowScheduler.__module__ = "reflow.sampling"
