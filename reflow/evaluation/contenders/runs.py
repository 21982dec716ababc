"""The networks of a training run as contenders, of any family: its teacher, and the student of each finished stage.

They are drawn by the project's own samplers, the student with the scheduler that is exported with it, the teacher by its own DDIM from
index to index. Time runs from t=1 (noise) to t=0 (data).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from reflow.errors import UserError
from reflow.evaluation.contenders.contender import Drawn, Seconds
from reflow.evaluation.intervals import t_interval
from reflow.evaluation.methods import fine_windows, trajectory
from reflow.evaluation.metrics import straightness, window_straightness
from reflow.evaluation.runs import Run, Student, open_run
from reflow.flow import Windows
from reflow.models import base_path, family_for
from reflow.models.conditioning import Conditioning
from reflow.models.family import Base
from reflow.sampling import initial_noise, sample, sample_teacher
from reflow.sampling.sampler import latent_shape
from reflow.weights.files import dtype_of, public_name

TEACHER = "teacher"
PATH_STEPS = 32


@dataclass(frozen=True)
class RunSpec:
    """One network of a run. stage: counted from 1; None for the teacher. resolution: side in pixels; None for the base's own."""

    run_dir: Path
    stage: int | None = None
    resolution: int | None = None

    @cached_property
    def run(self) -> Run:
        return open_run(self.run_dir)

    @property
    def student(self) -> Student | None:
        """Raises UserError where the stage is not finished."""
        if self.stage is None:
            return None
        found = next((s for s in self.run.students if s.stage + 1 == self.stage), None)
        if found is None:
            raise UserError(f"Stage {self.stage} of {self.run_dir} is not finished, so it cannot be measured; train it, or leave it out.")
        return found

    @property
    def label(self) -> str:
        student = self.student
        return TEACHER if student is None else student.label

    def files(self) -> list[Path]:
        """Files that decide its images, the base's apart, which the recipe names."""
        student = self.student
        return [self.run_dir / "recipe.toml", *([] if student is None else [student.path])]

    def open(self, device: str, dtype: str) -> RunContender:
        return RunContender(self, device, dtype)


class RunContender:
    """See `contender.Contender`."""

    def __init__(self, spec: RunSpec, device: str, dtype: str) -> None:
        self.spec, self.student, self.dtype = spec, spec.student, dtype
        model = spec.run.recipe.model
        self.base: Base = family_for(model).load(base_path(model), device=device, dtype=dtype_of(dtype))
        self.unet = self.base.unet
        if self.student is not None:
            self.unet = self.student.network(self.base, torch.device(device)).to(dtype_of(dtype))
        self.device = torch.device(device)

    @property
    def label(self) -> str:
        return self.spec.label

    def describe(self) -> dict[str, Any]:
        recipe, student = self.spec.run.recipe, self.student
        told = {
            "label": self.label,
            "kind": "run",
            "recipe": recipe.name,
            "family": recipe.model.family,
            "base": public_name(recipe.model.base),
            "training_seed": recipe.train.seed,
            "dtype": self.dtype,
            "resolution": self.spec.resolution or self.base.resolution,
            "parameters": sum(p.numel() for p in self.unet.parameters()),
        }
        if student is None:
            return told | {"scheduler": "DDIM from index to index", "prediction_type": self.base.prediction_type}
        return told | {
            "stage": student.stage + 1,
            "windows": list(student.windows.boundaries),
            "prediction_type": student.prediction_type,
            "network_time": student.network_time,
            "learnt_guidance": recipe.guidance_of(student.stage),
            "scheduler": "PiecewiseFlowScheduler",
            "weights": {student.path.name: student.digest()},
        }

    def check(self, steps: int, guidance: float) -> None:
        if self.student is not None and steps < len(self.student.windows):
            raise UserError(
                f"The {self.label} needs a step for each of its {len(self.student.windows)} windows, and {steps} was asked for; write --steps "
                f"{len(self.student.windows)} or more, or measure a stage of fewer windows."
            )

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """One row a prompt, each different prompt encoded once."""
        different = list(dict.fromkeys(prompts))
        rows = torch.tensor([different.index(prompt) for prompt in prompts], device=self.device)
        return self.base.encode_prompts(different, self.spec.resolution).select(rows)

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float) -> Drawn:
        start = self.now()
        conditioning = self.conditioning(prompts)
        encoded = self.now()
        options: dict[str, Any] = dict(guidance_scale=guidance, resolution=self.spec.resolution, decode=False)
        if self.student is None:
            drawn = sample_teacher(self.base, self.unet, conditioning, steps, seeds, **options)
        else:
            reading = dict(prediction_type=self.student.prediction_type, network_time=self.student.network_time)
            drawn = sample(self.base, self.unet, conditioning, steps, seeds, windows=self.student.windows, **reading, **options)
        solved = self.now()
        if not torch.isfinite(drawn.latents).all():
            hint = "draw with --dtype fp32" if self.dtype != "fp32" else "its weights are damaged, train that stage again"
            raise UserError(f"Samples of the {self.label} at {steps} steps are not finite; {hint}.")
        images = ((self.base.decode(drawn.latents) + 1) * 127.5).round().byte().cpu()
        seconds = Seconds(encoded - start, solved - encoded, self.now() - solved)
        return Drawn(images.expand(-1, 3, -1, -1).contiguous(), drawn.latents.cpu(), drawn.evaluations, seconds)

    def now(self) -> float:
        """Seconds by the clock, with the device waited for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @torch.no_grad()
    def straightness(self, prompts: Sequence[str], seeds: Sequence[int], guidance: float, windows: Windows, batch: int = 16) -> dict[str, Any]:
        """Of the paths of these samples, cut into at least 32 steps within `windows`: straightness over all of time, and deviation from
        the chord within each window (metrics.straightness)."""
        fine, parts = fine_windows(windows, PATH_STEPS), []
        for first in range(0, len(seeds), batch):
            some = list(prompts[first : first + batch])
            noise = initial_noise(seeds[first : first + batch], latent_shape(self.base, self.spec.resolution)).to(self.device)
            rows = self.conditioning(some).to(self.device, self.unet.dtype)
            parts.append(trajectory(self.base, self.unet, self.student, fine, noise, rows, guidance_scale=guidance).cpu())
        path = torch.cat(parts, 1)
        inside = window_straightness(path, fine.boundaries, windows)
        return {
            "model": self.label,
            "windows": len(windows),
            "guidance": guidance,
            "steps": len(fine),
            "path": t_interval(straightness(path, fine.boundaries)).as_dict(),
            "window_deviation": [t_interval(window).as_dict() for window in inside],
        }

    def close(self) -> None:
        del self.base, self.unet
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
