"""Guidance scales per step: one number, a list such as 7.5, 4, 4, 4, or that list as text.

``guidance_scale`` w means what it means in diffusers: uncond + w (cond - uncond), so 1 is no guidance and needs no
unconditional half. Few-step students gain from a strong first step and weak later ones (PeRFlow, arXiv 2405.07510,
"dynamic CFG").
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from reflow.errors import UserError

Guidance = float | Sequence[float] | str


def guidance_scales(guidance: Guidance, steps: int) -> tuple[float, ...]:
    """One scale for each of ``steps`` steps, noisiest first.

    A number holds for all steps; of a list ("7.5,4,4" or "7.5-4-4" as text) the last value holds for the remaining
    steps. Raises UserError for an empty list, more values than steps, a negative, infinite or unreadable value.
    """
    if isinstance(guidance, str):
        parts = [part for part in re.split(r"[,;\s]+|(?<=[\d.])-(?=[\d.])", guidance.strip()) if part]
        try:
            values = [float(part) for part in parts]
        except ValueError:
            raise UserError(
                f"guidance_scale {guidance!r} cannot be read; write a number, or one for each step as in '7.5,4,4,4'."
            ) from None
    elif isinstance(guidance, (int, float)):
        values = [float(guidance)]
    else:
        values = [float(value) for value in guidance]
    if not values:
        raise UserError("guidance_scale is empty; write a number, or one for each step as in '7.5,4,4,4'.")
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise UserError(
            f"guidance_scale {guidance!r} holds a value that is negative or not finite; 1 means no guidance."
        )
    if len(values) > steps:
        raise UserError(
            f"guidance_scale {guidance!r} names {len(values)} values for {steps} steps; leave out the last "
            f"{len(values) - steps} or sample with more steps."
        )
    return tuple(values + [values[-1]] * (steps - len(values)))


# What a diffusers pipeline doubles under guidance, in the order of its callback names.
DOUBLED_INPUTS = ("prompt_embeds", "add_text_embeds", "add_time_ids")


def guidance_callback(guidance: Guidance, steps: int) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    """A ``callback_on_step_end`` that changes the guidance of a Stable Diffusion (XL) pipeline from step to step.

    ``steps`` is the number that the call really runs (image to image: fewer than num_inference_steps). Give the
    pipeline ``guidance_scale=guidance_scales(guidance, steps)[0]``, which governs the first step, this callback and,
    if the schedule reaches 1, ``callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"]`` (SDXL: also
    "add_text_embeds" and "add_time_ids"), from which the unconditional half is then dropped. Raises UserError for a
    schedule that goes back up from 1: that half is gone by then.
    """
    scales = guidance_scales(guidance, steps)
    for i in range(1, steps):
        if scales[i] > 1 >= scales[i - 1]:
            raise UserError(
                f"guidance_scale {guidance!r} rises above 1 at step {i + 1} after a step without guidance; a "
                "diffusers pipeline cannot bring back the unconditional half, so put the unguided steps last."
            )

    def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step + 1 < steps:
            now, then = scales[step], scales[step + 1]
            if now > 1 >= then:
                wanted = [name for name in DOUBLED_INPUTS if name in pipeline._callback_tensor_inputs]
                missing = [name for name in wanted if name not in tensors]
                if missing:
                    raise UserError(
                        f"The guidance schedule stops guiding after step {step + 1}, so the pipeline call also needs "
                        f"callback_on_step_end_tensor_inputs={['latents', *wanted]}; {', '.join(missing)} were not "
                        "handed over."
                    )
                for name in wanted:
                    tensors[name] = tensors[name].chunk(2)[1]
            pipeline._guidance_scale = then
        return tensors

    return on_step_end
