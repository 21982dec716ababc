"""From data to solved windows: noised real latents (or noise) in, (z_start, z_end) out."""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from reflow.data import sampler
from reflow.data.latents import LatentDataset
from reflow.flow.captured import CapturedSolves
from reflow.models.conditioning import Conditioning, denoise
from reflow.recipes.sections import Objective
from reflow.recipes.settings import Recipe
from reflow.training import teachers
from reflow.training.draws import DATA, FORWARD, NOISE, on_paths
from reflow.training.draws import kinds as kinds_of
from reflow.training.networks import solver_dtype
from reflow.training.stages import StageFlow

AT_ONCE = 2**20  # pairs that are counted at once


def usable(*parts: torch.Tensor) -> torch.Tensor:
    """Rows [B] whose sum of squares, which the loss takes, is a number in fp32 in each of the parts [B,...]: no NaN, no infinity, no overflow
    on the way."""
    norms = torch.stack([torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=torch.float32) for rows in parts])
    return (norms.square() < math.inf).all(0)  # a NaN is not below it


def kept(rows: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
    """Rows [B,...] with zeros where `good` [B] is false."""
    return torch.where(good.view(-1, *[1] * (rows.dim() - 1)), rows, torch.zeros_like(rows))


def known_good(good: torch.Tensor) -> bool:
    """Whether all rows are known to be good, so that none need be taken out. On a GPU nobody asks: that would wait for it."""
    return good.device.type == "cpu" and bool(good.all())


@dataclass
class Solved:
    """Solved windows on the device: z_start, z_end [B,C,h,w] fp32, window [B], conditioning of the student (captions dropped)."""

    z_start: torch.Tensor
    z_end: torch.Tensor
    window: torch.Tensor
    conditioning: Conditioning

    def finite(self) -> tuple[torch.Tensor, Solved]:
        """Which rows [B] can be used (see `usable`), and the same with zeros in the others; no host sync on a GPU."""
        told = self.conditioning
        good = usable(self.z_start, self.z_end, *told.tensors)
        if known_good(good):
            return good, self

        rows = told.of([kept(t, good) for t in told.tensors])
        return good, Solved(kept(self.z_start, good), kept(self.z_end, good), self.window, rows)


class Solver:
    """Solves by global index: which item, noise and dropped caption a solve has depends on (seed, stage, index) alone.

    From data every solve has draws of its own. From noise a trajectory of the teacher gives a pair for each of the K trained windows:
    solve i is window i % K of trajectory i // K, and the draws are the trajectory's. With a share below 1 some of these are no
    trajectories: their K windows start at one noised latent, of the same draws. Forward pairs are trajectories from a real latent up to
    noise, made by the solver backwards.
    """

    def __init__(self, recipe: Recipe, flow: StageFlow, data: LatentDataset, teacher: torch.nn.Module, device: torch.device) -> None:
        self.recipe, self.flow, self.data, self.teacher, self.device = recipe.of_stage(flow.index), flow, data, teacher, device
        self.dtype = solver_dtype(recipe)
        self.active: list[int] = flow.active.tolist()
        objective = self.recipe.objective
        # Consecutive solves that have the same draws.
        self.share = len(self.active) if on_paths(objective) else 1
        # Replaying a recorded solve is the GPU's own; elsewhere every solve is plain and nothing is counted.
        self.captured = CapturedSolves(self.ask, input_dtype=self.dtype) if recipe.teacher.cuda_graph and device.type == "cuda" else None
        self.parked = teachers.park(teacher, device) if recipe.teacher.offload else None
        self.rounding = teachers.to_fp8(self, recipe.teacher.fp8_max_error) if recipe.teacher.precision == "fp8" else None

    def inputs(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Items [B], dropped [B] bool and noise [B,C,h,w] of the solves, on the CPU."""
        return self.drawn([i // self.share for i in indices])

    def drawn(self, draws: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`inputs` by the number of the draw: a solve's own or, from noise, its trajectory's."""
        seed, stage = self.recipe.train.seed, self.flow.index
        items = torch.tensor(self.items(draws))
        drop, noise = sampler.solve_draws(seed, stage, draws, self.data.group_of(items).shape)
        return items, drop < self.recipe.data.caption_drop, noise

    def items(self, draws: list[int]) -> list[int]:
        block = max(1, self.recipe.train.micro_batch // self.flow.stage.chords_per_solve // self.share)
        return sampler.items_of(self.recipe.train.seed, self.flow.index, draws, self.data.counts, block)

    def by_shape(self, indices: list[int]) -> list[list[int]]:
        """The indices in lists whose latents have one shape each; one list where the data have one shape."""
        return [indices[run] for run in self.data.runs(self.items([i // self.share for i in indices]))]

    def __call__(self, indices: list[int]) -> Solved:
        draws = [i // self.share for i in indices]
        kinds = self.kinds(np.array(draws))
        if len(set(kinds)) > 1:
            return self.mixed(indices, kinds)
        together = kinds[0] != DATA  # the windows of a trajectory, which is solved once
        different = list(dict.fromkeys(draws)) if together else draws
        items, dropped, noise = self.drawn(different)
        window = self.flow.window_of(torch.tensor(indices, device=self.device))
        student = self.data.conditioning(items, dropped).to(self.device, torch.float32)
        taught = student if self.recipe.teacher.drops_captions else self.data.conditioning(items).to(self.device, torch.float32)
        noise = noise.to(self.device)
        with torch.no_grad(), self.parked.here() if self.parked else contextlib.nullcontext():
            if together:
                place = {draw: row for row, draw in enumerate(different)}
                rows, windows = [place[draw] for draw in draws], [self.active[i % self.share] for i in indices]
                if kinds[0] == NOISE:
                    z_start, z_end = self.trajectories(noise, rows, windows, taught, items)
                else:
                    z_end, z_start = self.trajectories(self.clean(items, noise), rows, windows, taught, items, backward=True)
                return Solved(z_start, z_end, window, student.select(torch.tensor(rows, device=self.device)))
            # Contiguous, as networks answer: an operand in another order than the others would be copied by every fused op.
            latent = self.data.latent(items).to(self.device, torch.float32, memory_format=torch.contiguous_format)
            z_start = self.flow.table.start(latent, noise, window)
            return Solved(z_start, self.solve(z_start, window, self.teacher_rows(taught, items)), window, student)

    def whole(self, indices: list[int]) -> Solved:
        """`__call__` with every chord solved to its end by the teacher alone, where windows merge within the stage."""
        solved, merger = self(indices), self.flow.merger
        if merger is None:
            return solved
        items, dropped, _ = self.inputs(indices)
        taught = self.data.conditioning(items, dropped if self.recipe.teacher.drops_captions else None).to(self.device, torch.float32)
        part, z_end = solved.window.cpu(), solved.z_end.clone()
        with torch.no_grad(), self.parked.here() if self.parked else contextlib.nullcontext():
            for n in range(1, 2**merger.merges):
                here = (2**merger.levels[part] > n).nonzero()[:, 0]
                rows = here.to(self.device)
                z_end[rows] = self.solve(z_end[rows], (part[here] + n).to(self.device), self.teacher_rows(taught.select(rows), items[here]))
        return replace(solved, z_end=z_end)

    def kinds(self, draws: np.ndarray) -> np.ndarray:
        """What each draw [n] is of: DATA, NOISE or FORWARD."""
        return kinds_of(draws, self.recipe.objective)

    def mixed(self, indices: list[int], kinds: np.ndarray) -> Solved:
        """Solves of several kinds, in the order of the indices."""
        places = [np.flatnonzero(kinds == kind) for kind in sorted(set(kinds))]
        parts = [self([indices[place] for place in here]) for here in places]
        order = torch.from_numpy(np.concatenate(places)).to(self.device).argsort()
        z_start, z_end, window = (torch.cat([getattr(part, name) for part in parts])[order] for name in ("z_start", "z_end", "window"))
        return Solved(z_start, z_end, window, functools.reduce(Conditioning.cat, [part.conditioning for part in parts]).select(order))

    def clean(self, items: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The items' latents at the end of the last window, where a table has a little noise left."""
        table = self.flow.table
        latent = self.data.latent(items).to(self.device, torch.float32, memory_format=torch.contiguous_format)
        return table.alpha_end[-1] * latent + table.sigma_end[-1] * noise

    def solve(self, z: torch.Tensor, window: torch.Tensor, rows: Conditioning, backward: bool = False) -> torch.Tensor:
        """One window, in a CUDA graph where the recipe says so and the same form of batch has come before."""
        solver = self.flow.inverter if backward else self.flow.solver
        self.told = rows
        if self.captured is not None:
            return self.captured(solver, z, window, *rows.tensors)
        return solver.solve(lambda x, t: self.ask(x, t, *rows.tensors), z, window, input_dtype=self.dtype)

    def ask(self, x: torch.Tensor, t: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        """The teacher's output, with the tensors of a conditioning of the names that the last solve had."""
        return denoise(self.teacher, x, t, self.told.of(inputs))

    def trajectories(self, begin: torch.Tensor, rows: list[int], windows: list[int], taught: Conditioning, items: torch.Tensor,
                     backward: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Both ends [B,C,h,w], in the order of the solving, of pairs that lie on the teacher's own trajectories which begin at [T,C,h,w],
        noise or, backward, latents: pair b is window windows[b] of trajectory rows[b]. taught, items: of the trajectories. Each of them
        is solved as far as its last pair needs and no further."""
        order = list(range(len(self.flow.parts)))[::-1 if backward else 1]
        last = [max(order.index(w) for r, w in zip(rows, windows, strict=True) if r == n) for n in range(len(begin))]
        starts: dict[int, torch.Tensor] = {}
        ends: dict[int, torch.Tensor] = {}
        going, z, conditioning = list(range(len(begin))), begin, self.teacher_rows(taught, items)
        for n_th, k in enumerate(order[:max(last) + 1]):
            kept = [n for n in going if last[n] >= n_th]
            if len(kept) < len(going):
                z = z[torch.tensor([going.index(n) for n in kept], device=self.device)]
                left = torch.tensor(kept)
                conditioning = self.teacher_rows(taught.select(left.to(self.device)), items[left])
                going = kept
            here = [(b, going.index(r)) for b, (r, w) in enumerate(zip(rows, windows, strict=True)) if w == k]
            starts.update((b, z[row]) for b, row in here)
            z = self.solve(z, torch.full((len(z),), k, device=self.device), conditioning, backward)
            ends.update((b, z[row]) for b, row in here)
        return tuple(torch.stack([kind[b] for b in range(len(rows))]) for kind in (starts, ends))

    def teacher_rows(self, conditioning: Conditioning, items: torch.Tensor) -> Conditioning:
        """Conditioning of the teacher's rows in its dtype; with guidance the items' null rows come first."""
        scale = self.flow.solver.guidance_scale
        if scale is not None:
            conditioning = self.data.null_rows(items).to(self.device, torch.float32).cat(conditioning).guiding(scale)
        return conditioning.to(self.device, self.dtype)


def windows_solved(active: list[int], windows: int, count: int, part: int, objective: Objective) -> int:
    """Window solves of the teacher for `count` consecutive pairs of a stage with so many windows, taken in batches of `part`.

    A trajectory gives one pair for each of the K active windows and costs as many solves as it passes windows; one that a batch's edge
    cuts is begun in both batches, so whole trajectories (part a multiple of K) cost least. A window of noised data is one solve.
    """
    width, total = len(active), 0
    down, up = np.array(active) + 1, windows - np.array(active)
    for first in range(0, count, max(1, AT_ONCE // part) * part):  # whole batches
        pairs = np.arange(first, min(first + max(1, AT_ONCE // part) * part, count))
        draws = pairs // width
        # The last pair of a trajectory in a batch says how far it is solved there; of one from data up to noise the first.
        edge = (np.diff(draws) != 0) | (np.diff(pairs // part) != 0)
        last, first_ = np.append(edge, True), np.insert(edge, 0, True)
        of = kinds_of(draws, objective)
        total += int(down[pairs[last & (of == NOISE)] % width].sum() + up[pairs[first_ & (of == FORWARD)] % width].sum() + (of == DATA).sum())
    return total
