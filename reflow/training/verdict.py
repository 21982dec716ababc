"""Whether a stage is worth it: the student beside the teacher's own solver at as many steps, both against the teacher's fine solve."""

from __future__ import annotations

from typing import Any

import torch

from reflow.recipes.settings import Recipe

AWAY = 1.1  # times the untrained student's error, beyond which training leads away


def compare(student: torch.Tensor, own: torch.Tensor, fine: torch.Tensor) -> dict[str, Any]:
    """Distances of latents [B,C,h,w] from the same noises and prompts: RMS over all elements to the fine solve, of the student and of
    the teacher's own few steps; `gain` 1 - student / teacher (negative: worse), and in how many of `pairs` the student is closer."""
    ours, theirs = ((z.double() - fine.double()).square().flatten(1).mean(1) for z in (student, own))
    a, b = float(ours.mean().sqrt()), float(theirs.mean().sqrt())
    return {"student_error": a, "teacher_error": b, "gain": 1 - a / b if b else None, "closer": int((ours < theirs).sum()), "pairs": len(fine)}


def sentence(stage: int, steps: int, fine_steps: int, found: dict[str, Any]) -> str:
    """`compare` in words; stage counted from 1."""
    start = f"Stage {stage}, {steps} step{'s' if steps > 1 else ''}:"
    if fine_steps <= steps or found["gain"] is None:
        return (f"{start} the student is {found['student_error']:.3g} from the teacher's {fine_steps} steps (RMS of latents); whether that is better than the "
                f"teacher's own {steps} cannot be told, because validate.teacher_steps = {fine_steps} is not more.")
    better = found["gain"] > 0
    word = "closer" if better else "FURTHER AWAY"
    verdict = "beats" if better else "is WORSE than" if found["gain"] < 0 else "only equals"
    return (f"{start} the student {verdict} the teacher's own solver: {found['student_error']:.3g} from the teacher's {fine_steps} steps against "
            f"{found['teacher_error']:.3g} (RMS of latents), {abs(found['gain']):.0%} {word}; closer in {found['closer']} of {found['pairs']} pictures.")


def behind(stage: int, steps: int, share: float, found: dict[str, Any], why: str) -> str:
    """What is said once on the way, where a student is behind its teacher after a share of its stage; stage counted from 1."""
    return (f"Stage {stage}: after {share:.0%} of it the student is still WORSE at {steps} step{'s' if steps > 1 else ''} than the teacher's own solver: "
            f"{found['student_error']:.3g} against {found['teacher_error']:.3g} (RMS of latents). {why}")


def cause(recipe: Recipe, began: dict[str, Any] | None, found: dict[str, Any]) -> str:
    """The likely reason that a student is behind, and what to write. recipe: with the stage's own values; began: `compare` of the untrained student."""
    objective, rate = recipe.objective, recipe.train.learning_rate
    if began and found["student_error"] > AWAY * began["student_error"]:
        return (f"It is further away than before training ({began['student_error']:.3g}), so the likely cause is train.learning_rate = {rate:g}, or "
                f"objective.time_density = '{objective.time_density}' where that is not 'window_start'.")
    if objective.time_density in ("uniform", "u_shaped"):
        return (f"The likely cause is objective.time_density = '{objective.time_density}', which spreads the training over the whole of each window, while a "
                f"student of one step a window is used at their starts: 'window_start' learns that first.")
    came = f", from {began['student_error']:.3g}" if began else ""
    return f"It is coming closer{came}: the likely cause is too short a stage (samples), or a small train.learning_rate = {rate:g}."


def first_after(share: float, done: int, total: int, every: int, batch: int) -> bool:
    """Whether the validation after `done` of a stage's `total` samples is the first at or beyond a share of them; they come every `every` samples."""
    before = done - batch if every <= batch else -(-(done // every - 1) * every // batch) * batch
    return before < share * total <= done
