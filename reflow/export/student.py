"""What every export asks of a student first: that its weights fit the base, are finite and are sampled as they say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from reflow.errors import UserError
from reflow.flow import Windows
from reflow.quiet import quiet_imports
from reflow.sampling.sampler import Scheduler
from reflow.weights.delta import student_settings
from reflow.weights.files import State, cast
from reflow.weights.guard import on_meta


def checked_unet(state: State, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state in ``dtype``, if it fits the base's UNet, or the transformer of this config, name by name and shape by shape and stays
    finite."""
    quiet_imports()
    import diffusers

    kind = getattr(diffusers, str(config.get("_class_name", "UNet2DConditionModel")), diffusers.UNet2DConditionModel)
    expected = on_meta(lambda: kind.from_config(config), "The config of the base's network").state_dict()
    wrong = sorted(expected.keys() ^ state.keys()) + [
        key for key in expected if key in state and expected[key].shape != state[key].shape
    ]
    if wrong:
        raise UserError(
            f"The student's weights do not fit the base's UNet: {len(wrong)} differ in name or shape, the first is "
            f"{wrong[0]}. Give the base that this student was trained from."
        )
    ready = cast(state, dtype)
    for key, tensor in ready.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            cause = (
                f"does not fit into {dtype}; export in fp32 or bf16"
                if torch.isfinite(state[key]).all()
                else "is not finite; export an earlier stage"
            )
            raise UserError(f"The student's weight {key} {cause}.")
    return ready


def same_reading(source: str | Path | State, scheduler: Scheduler) -> None:
    """Raises UserError where a weights file says itself that its student is sampled in another way."""
    if isinstance(source, Mapping) or not Path(source).is_file():
        return
    config = scheduler.config
    asked = {"prediction_type": config.prediction_type, "network_time": config.network_time}
    for key, value in student_settings(source).items():
        value = value.boundaries if isinstance(value, Windows) else value
        wanted = scheduler.windows.boundaries if key == "windows" else asked[key]
        if value != wanted:
            raise UserError(
                f"{source} was trained with {key} {value!r}, and is exported as {wanted!r}; its images would be wrong. "
                "Export it as it was trained: reflow.weights.delta.student_settings reads what the file says."
            )
