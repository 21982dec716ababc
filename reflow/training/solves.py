"""From data to solved windows: noised real latents (or noise) in, (z_start, z_end) out."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from reflow.data import sampler
from reflow.data.latents import LatentDataset
from reflow.flow.captured import CapturedSolve
from reflow.models.conditioning import Conditioning, denoise
from reflow.recipes.settings import Recipe
from reflow.training import teachers
from reflow.training.networks import solver_dtype
from reflow.training.stages import StageFlow


@dataclass
class Solved:
    """Solved windows on the device: z_start, z_end [B,C,h,w] fp32, window [B], conditioning of the student (captions dropped)."""

    z_start: torch.Tensor
    z_end: torch.Tensor
    window: torch.Tensor
    conditioning: Conditioning

    def finite(self) -> tuple[torch.Tensor, Solved]:
        """Which rows [B] are finite throughout, and the same with zeros in the others; no host sync."""
        c = self.conditioning
        tensors = [t for t in (self.z_start, self.z_end, c.encoder_hidden_states, c.text_embeds, c.time_ids) if t is not None]
        good = torch.stack([torch.isfinite(t).flatten(1).all(1) for t in tensors]).all(0)

        def clean(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else torch.where(good.view(-1, *[1] * (t.dim() - 1)), t, torch.zeros_like(t))

        kept = Conditioning(clean(c.encoder_hidden_states), clean(c.text_embeds), clean(c.time_ids))
        return good, Solved(clean(self.z_start), clean(self.z_end), self.window, kept)


class Solver:
    """Solves by global index: which item, noise and dropped caption a solve has depends on (seed, stage, index) alone."""

    def __init__(self, recipe: Recipe, flow: StageFlow, data: LatentDataset, teacher: torch.nn.Module, device: torch.device) -> None:
        self.recipe, self.flow, self.data, self.teacher, self.device = recipe, flow, data, teacher, device
        self.dtype = solver_dtype(recipe)
        self.captured: CapturedSolve | None = None
        self.parked = teachers.park(teacher, device) if recipe.teacher.offload else None
        self.rounding = teachers.to_fp8(self, recipe.teacher.fp8_max_error) if recipe.teacher.precision == "fp8" else None

    def inputs(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Items [B], dropped [B] bool and noise [B,C,h,w] of the solves, on the CPU."""
        seed, stage = self.recipe.train.seed, self.flow.index
        block = self.recipe.train.micro_batch // self.flow.stage.chords_per_solve
        items = torch.tensor(sampler.items_of(seed, stage, indices, self.data.counts, block))
        drop, noise = sampler.solve_draws(seed, stage, indices, self.data.group_of(items).shape)
        return items, drop < self.recipe.data.caption_drop, noise

    def by_shape(self, indices: list[int]) -> list[list[int]]:
        """The indices in lists whose latents have one shape each; one list where the data have one shape."""
        block = self.recipe.train.micro_batch // self.flow.stage.chords_per_solve
        items = sampler.items_of(self.recipe.train.seed, self.flow.index, indices, self.data.counts, block)
        return [indices[run] for run in self.data.runs(items)]

    def __call__(self, indices: list[int]) -> Solved:
        items, dropped, noise = self.inputs(indices)
        window = self.flow.window_of(torch.tensor(indices, device=self.device))
        student = self.data.conditioning(items, dropped).to(self.device, torch.float32)
        taught = student if self.recipe.teacher.drops_captions else self.data.conditioning(items).to(self.device, torch.float32)
        # Contiguous, as networks answer: an operand in another order than the others would be copied by every fused op.
        latent = self.data.latent(items).to(self.device, torch.float32, memory_format=torch.contiguous_format)
        noise = noise.to(self.device)
        with torch.no_grad(), self.parked.here() if self.parked else contextlib.nullcontext():
            z_start = self.flow.table.start(latent, noise, window) if self.recipe.objective.starts == "data" else None
            if z_start is not None:
                z_end = self.solve(z_start, window, self.teacher_rows(taught, items))
            else:
                z_start, z_end = self.from_noise(noise, window, self.teacher_rows(taught, items))
        return Solved(z_start, z_end, window, student)

    def solve(self, z: torch.Tensor, window: torch.Tensor, rows: Conditioning) -> torch.Tensor:
        """One window, as a CUDA graph where the recipe says so; a batch of another size than the first is solved plainly."""
        if self.recipe.teacher.cuda_graph and z.device.type == "cuda":
            inputs = tuple(t for t in (rows.encoder_hidden_states, rows.text_embeds, rows.time_ids) if t is not None)
            if self.captured is None:
                self.captured = CapturedSolve(self.flow.solver, lambda x, t, *c: denoise(self.teacher, x, t, Conditioning(*c)), z, window,
                                              *inputs, input_dtype=self.dtype)
            if self.captured.fits(z, window, *inputs):
                return self.captured(z, window, *inputs)
        return self.flow.solver.solve(lambda x, t: denoise(self.teacher, x, t, rows), z, window, input_dtype=self.dtype)

    def from_noise(self, noise: torch.Tensor, window: torch.Tensor, rows: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's own trajectory from pure noise: each sample keeps both ends of its window."""
        z, starts, ends = noise, torch.empty_like(noise), torch.empty_like(noise)
        for k in range(int(self.flow.active.max()) + 1):
            here = (window == k).view(-1, 1, 1, 1)
            starts = torch.where(here, z, starts)
            z = self.solve(z, torch.full_like(window, k), rows)
            ends = torch.where(here, z, ends)
        return starts, ends

    def teacher_rows(self, conditioning: Conditioning, items: torch.Tensor) -> Conditioning:
        """Conditioning of the teacher's rows in its dtype; with guidance the items' null rows come first."""
        if self.flow.solver.guidance_scale is not None:
            conditioning = self.data.null_rows(items).to(self.device, torch.float32).cat(conditioning)
        return conditioning.to(self.device, self.dtype)
