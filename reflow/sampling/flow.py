"""The diffusers scheduler of a windowed student whose base is a rectified flow: Euler steps from boundary to boundary.

diffusers' own FlowMatchEulerDiscreteScheduler, called with a number of steps alone, shifts a grid twice that was shifted already and spends
its last step at almost no noise (diffusers #13243): a student of evenly shifted windows then ends a third off. Here a call with a number of
steps is right by itself. Time runs from t=1 (noise) to t=0 (data), and t is the noise level sigma.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config

from reflow.errors import quote
from reflow.flow.schedule import shifted
from reflow.flow.windows import Windows
from reflow.sampling.window_steps import StepsError, WindowSteps

# What of a base's scheduler config its student's has too: img2img of some pipelines reads them.
OF_BASE = ("num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len",
           "time_shift_type")  # fmt: skip


def shift_of(windows: Windows) -> float | None:
    """The time shift before which windows from 1 to 0 are even; None for one window, which every shift makes, and for others."""
    count = len(windows)
    if count < 2:
        return None
    first, even = windows.boundaries[1], 1 - 1 / count
    shift = first * (1 - even) / (even * (1 - first))
    return round(shift, 6) if even_before(windows, shift) else None


def even_before(windows: Windows, shift: float) -> bool:
    """Whether windows from 1 to 0 are even before this time shift."""
    made = Windows.shifted(len(windows), shift).boundaries
    return all(abs(a - b) < 1e-6 for a, b in zip(windows.boundaries, made, strict=True))


class FlowWindowScheduler(WindowSteps, FlowMatchEulerDiscreteScheduler):
    """Few-step sampling of a flow network trained on K time windows: N steps, N // K in each window, one more in the noisiest N mod K.

    Config keys beyond diffusers' own: ``window_boundaries``, K+1 descending times from 1 to 0 (None: ``num_time_windows`` even ones before
    ``shift``); ``steps_per_window``, K numbers, where steps are not to be spread evenly; ``prediction_type`` is "velocity" and
    ``network_time`` "flow" (1000 t), as the base's. The default ``sigmas`` that pipelines such as FLUX's pass (1 to 1/N, evenly) mean N steps;
    other ``sigmas`` are taken as they are, without a shift. Raises StepsError for settings that cannot work.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        time_shift_type: str = "exponential",
        num_time_windows: int = 4,
        window_boundaries: Sequence[float] | None = None,
        steps_per_window: Sequence[int] | None = None,
        prediction_type: str = "velocity",
        network_time: str = "flow",
    ) -> None:
        super().__init__(
            num_train_timesteps=num_train_timesteps, shift=shift, use_dynamic_shifting=use_dynamic_shifting, base_shift=base_shift,
            max_shift=max_shift, base_image_seq_len=base_image_seq_len, max_image_seq_len=max_image_seq_len, time_shift_type=time_shift_type,
        )  # fmt: skip
        if prediction_type != "velocity" or network_time != "flow":
            raise StepsError(
                f"FlowWindowScheduler: prediction_type is {quote(prediction_type)} and network_time {quote(network_time)}; a student of a flow "
                "has 'velocity' and 'flow'."
            )
        try:
            if window_boundaries is None:
                self.windows = Windows.shifted(num_time_windows, shift)
            else:
                self.windows = Windows(tuple(float(t) for t in window_boundaries))
        except (ValueError, TypeError, OverflowError) as error:  # a config's values may be of any type
            raise StepsError(f"FlowWindowScheduler: {error}") from error
        if steps_per_window is not None:
            steps_per_window = self._split(steps_per_window)
        self.register_to_config(
            num_time_windows=len(self.windows), window_boundaries=list(self.windows.boundaries), steps_per_window=steps_per_window,
            prediction_type=prediction_type, network_time=network_time,
        )  # fmt: skip

    @classmethod
    def for_student(
        cls,
        scheduler_config: Mapping[str, Any],
        windows: int | Windows,
        *,
        prediction_type: str | None = None,
        network_time: str | None = None,
        shift: float | None = None,
    ) -> FlowWindowScheduler:
        """The scheduler of a student trained on ``windows`` of the base whose scheduler has this config: the windows, or their number, even
        before ``shift`` (None: the config's, or that which made the windows: a base's static shift may be another, or follow the size)."""
        kept = {key: scheduler_config[key] for key in OF_BASE if scheduler_config.get(key) is not None}
        shift = shift or (shift_of(windows) if isinstance(windows, Windows) else None)
        if shift is not None:
            kept["shift"] = shift
        boundaries = windows.boundaries if isinstance(windows, Windows) else Windows.shifted(windows, kept.get("shift", 1.0)).boundaries
        given = {"prediction_type": prediction_type, "network_time": network_time}
        return cls(**kept, window_boundaries=list(boundaries), **{key: value for key, value in given.items() if value is not None})

    def grid(self, steps: int, split: Sequence[int] | None = None) -> list[float]:
        """The noise levels that ``steps`` steps start at, from 1 down; the last step ends at the last boundary."""
        self.need_a_step_each(steps)
        shift, times = self.config.shift, []
        for start, end, count in zip(self.windows.t_start, self.windows.t_end, self.counts(steps, split), strict=True):
            first, last = shifted(start, 1 / shift), shifted(end, 1 / shift)
            times += [start, *(shifted(first + (last - first) * i / count, shift) for i in range(1, count))]
        return times

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        steps_per_window: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """As in diffusers. ``mu``, which pipelines take from the image's size, is not needed: the windows are as they were trained."""
        if timesteps is not None:
            raise StepsError("FlowWindowScheduler takes no timesteps of your own; give num_inference_steps, or sigmas from noise to data.")
        if sigmas is not None:
            given = np.asarray(sigmas, dtype=np.float64)
            default = np.linspace(1.0, 1.0 / len(given), len(given))
            if np.abs(given - default).max() < 1e-6:
                num_inference_steps, sigmas = len(given), None
        if sigmas is None:
            if num_inference_steps is None:
                raise StepsError("FlowWindowScheduler needs num_inference_steps, or sigmas from noise to data.")
            levels = [*self.grid(num_inference_steps, steps_per_window), self.windows.t_end[-1]]
        else:
            levels = [*(float(level) for level in sigmas), 0.0]
            if any(a <= b for a, b in zip(levels, levels[1:], strict=False)):
                raise StepsError(f"sigmas are {quote(list(sigmas))}; they must fall from at most 1 (noise) and stay above 0.")
        self.num_inference_steps = len(levels) - 1
        self.sigmas = torch.tensor(levels, dtype=torch.float32, device=device)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self._step_index = self._begin_index = None


# model_index.json of a saved pipeline names this module, which also holds SchedulerMixin.
FlowWindowScheduler.__module__ = "reflow.sampling"
