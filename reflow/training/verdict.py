"""Whether a stage was worth it: the student beside the teacher's own solver at as many steps, both against the teacher's fine solve."""

from __future__ import annotations

from typing import Any

import torch


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
