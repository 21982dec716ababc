"""How many steps a student takes in each of its windows, whatever its scheduler: what both of ours have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reflow.errors import UserError, quote
from reflow.flow.windows import Windows


class StepsError(UserError, ValueError):
    """A scheduler setting or a number of steps that cannot work; the sentence says what to write instead."""


class WindowSteps:
    """Of a scheduler with ``windows`` and, in its config, ``steps_per_window``."""

    windows: Windows
    config: Any

    def _split(self, steps: Sequence[int]) -> list[int]:
        """steps_per_window, checked. Raises StepsError for anything but a number of at least 1 for each window."""
        counts = list(steps) if isinstance(steps, Sequence) and not isinstance(steps, str) else []
        if len(counts) != len(self.windows) or not all(type(n) is int and n > 0 for n in counts):
            count = len(self.windows)
            raise StepsError(
                f"{type(self).__name__}: steps_per_window is {quote(steps)}; give {count} whole numbers of at least 1, one "
                f"for each of the {count} windows from noise to data."
            )
        return counts

    def counts(self, steps: int, split: Sequence[int] | None = None) -> list[int]:
        """Steps in each window, from noise to data, of ``steps`` in all: evenly, or by ``split`` or the config's
        steps_per_window, whose sum they then must be."""
        split = self.config.steps_per_window if split is None else self._split(split)
        if split is None:
            count = len(self.windows)
            return [steps // count + (k < steps % count) for k in range(count)]
        if sum(split) != steps:
            raise StepsError(
                f"num_inference_steps={steps} does not fit steps_per_window={list(split)}, which are {sum(split)} steps: use "
                f"num_inference_steps={sum(split)}, or set another steps_per_window (None spreads steps evenly)."
            )
        return list(split)

    def need_a_step_each(self, steps: int) -> None:
        """Raises StepsError for fewer steps than windows."""
        count = len(self.windows)
        if steps < count:
            raise StepsError(
                f"num_inference_steps={steps} is fewer than the {count} windows of this student, and "
                f"every window needs a step: use num_inference_steps={count} or more, or a student trained on fewer "
                "windows."
            )
