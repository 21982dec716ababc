"""One training step in many ways over the same networks: as the trainer runs it, and without its elementwise work.

`Ours` calls the trainer's own code: reflow.training.solves.Solver, Loop.micro_step, reflow.training.ema.Ema. Only
DeepSpeed is replaced, by a plain optimizer step over fp32 masters, so that one process can hold every variant.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import reflow_kernels
from bench.published import PublishedLoop, Settings, average
from bench.scenes import Scene
from reflow.data import sampler
from reflow.flow import network_time
from reflow.models.conditioning import Conditioning, denoise
from reflow.recipes.sections import Train
from reflow.recipes.settings import Recipe
from reflow.training import optimizers, stages
from reflow.training.ema import Ema, decay
from reflow.training.loop import Loop
from reflow.training.solves import Solved, Solver
from reflow.training.telemetry import Clock, Meter

RATE = 1e-6  # the weights hardly move, so that late rounds measure the same numbers as early ones
FUSED, UNFUSED = "auto", "torch"


@contextmanager
def ops(backend: str) -> Iterator[None]:
    """The fused ops ("auto") or their reference in plain PyTorch ("torch")."""
    reflow_kernels.configure(backend=backend)
    try:
        yield
    finally:
        reflow_kernels.configure(backend="auto")


def compiled(network: nn.Module, backend: str = "inductor") -> nn.Module:
    """A copy whose repeated blocks are compiled and whose weights are the given network's own tensors."""
    torch._dynamo.config.recompile_limit = 64
    tensors = itertools.chain(network.parameters(), network.buffers())
    twin = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    twin.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
    return twin


class Tail:
    """Clip, AdamW and EMA without DeepSpeed, as its ZeRO stage 0 does them: fp32 masters of a bf16 network."""

    def __init__(self, network: nn.Module, train: Train) -> None:
        self.weights = [p for p in network.parameters() if p.requires_grad]
        self.clip, self.half_life, self.warmup = train.clip, train.ema_half_life, train.ema_warmup
        self.apart = self.weights[0].dtype is not torch.float32
        self.masters = [p.detach().float() for p in self.weights] if self.apart else self.weights
        self.optimizer = optimizers.build(self.masters, train)
        self.ema = Ema(self.masters)

    def step(self, rate: float) -> None:
        if self.apart:
            for master, weight in zip(self.masters, self.weights, strict=True):
                master.grad = weight.grad.float()
                weight.grad = None
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.masters, self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.apart:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)
        self.optimizer.zero_grad(set_to_none=True)

    def average(self, batch: int, step: int) -> None:
        self.ema.update(decay(self.half_life, self.warmup, batch * step, batch))


class LoopTail(Tail):
    """The same with the EMA as a Python loop over parameters."""

    def average(self, batch: int, step: int) -> None:
        average(self.ema.average, self.masters, decay(self.half_life, self.warmup, batch * step, batch))


class Engine:
    """What Loop.micro_step asks of an engine. tail: None leaves the gradients where they are."""

    def __init__(self, forward: nn.Module, tail: Tail | None) -> None:
        self.forward, self.tail = forward, tail

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, rate: float) -> None:
        if self.tail is not None:
            self.tail.step(rate)


class Ours:
    """A training step as the trainer runs it; a call runs one, `window` and `student` are its halves on fixed input.

    teacher and student: the scene's networks or compiled copies. source: what gives solved windows, by default a solve
    for every sample; a PairStore gives stored ones. engine: replaces the plain one (DeepSpeed's has its own optimizer).
    """

    def __init__(
        self,
        scene: Scene,
        recipe: Recipe,
        tail: Tail,
        *,
        backend: str = FUSED,
        teacher: nn.Module | None = None,
        student: nn.Module | None = None,
        source: Callable[[list[int]], Solved] | None = None,
        engine: Any = None,
    ) -> None:
        stage = len(recipe.stages) - 1
        self.scene, self.recipe, self.tail, self.backend = scene, recipe, tail, backend
        self.flow = self.made(stages.build(recipe, stage, scene.schedule, scene.base.prediction_type, scene.device))
        self.solver = Solver(recipe, self.flow, scene.data, teacher or scene.teacher, scene.device)
        self.source = source or self.solver
        self.forward = student or scene.student
        self.engine = engine or Engine(self.forward, tail)
        self.batch, self.chords = recipe.train.batch_size, recipe.stages[stage].chords_per_solve
        # Only what micro_step reads: the rest of a Loop belongs to a run directory.
        self.loop = Loop.__new__(Loop)
        self.loop.recipe, self.loop.device, self.loop.dtype = recipe, scene.device, scene.dtype
        self.meter, self.clock = Meter(len(self.flow.parts), scene.device), Clock(scene.device)
        self.samples, self.count = list(range(self.batch)), 0
        self._solved: Solved | None = None

    def made(self, flow: stages.StageFlow) -> stages.StageFlow:
        return flow

    def solves(self, samples: list[int]) -> list[int]:
        return list(dict.fromkeys(sample // self.chords for sample in samples))

    def fixed(self) -> Solved:
        """The first batch's solved windows; `teacher_inputs` are what the solve was given: z_start, window, rows."""
        if self._solved is None:
            solve = self.solver.solve

            def noted(*inputs: Any) -> Tensor:
                self.teacher_inputs = inputs
                return solve(*inputs)

            self.solver.solve = noted
            with ops(self.backend):
                self._solved = self.solver(self.solves(self.samples))
            self.solver.solve = solve
        return self._solved

    def window(self) -> Tensor:
        """The teacher's solve of the first batch, from z_start on the device."""
        self.fixed()
        with ops(self.backend), torch.no_grad():
            return self.solver.solve(*self.teacher_inputs)

    def student(self) -> None:
        """Points, forward, loss and backward on the first batch; gradients stay."""
        solved = self.fixed()
        for parameter in self.forward.parameters():
            parameter.grad = None
        with ops(self.backend):
            self.micro_step(Engine(self.forward, None), solved, self.samples)

    def __call__(self) -> None:
        first = self.count * self.batch
        samples = list(range(first, first + self.batch))
        with ops(self.backend):
            self.micro_step(self.engine, self.source(self.solves(samples)), samples)
            self.tail.average(self.batch, self.count)
        self.count += 1

    def micro_step(self, engine: Any, solved: Solved, samples: list[int]) -> None:
        self.clock.read() if not self.clock.cuda else self.clock.events.clear()
        self.loop.micro_step(engine, self.flow, solved, samples, RATE, self.meter, self.clock, self.count)


class NoSteps:
    """A window solver that calls the network and computes nothing else: the input stays as it is."""

    def __init__(self, solver: Any) -> None:
        self.guidance_scale, self.steps, self.solver = solver.guidance_scale, solver.steps, solver

    @torch.no_grad()
    def solve(self, model: Any, z_start: Tensor, window: Tensor, *, input_dtype: torch.dtype | None = None) -> Tensor:
        rows = 1 if self.guidance_scale is None else 2
        sample = z_start.to(input_dtype or z_start.dtype).repeat(rows, *[1] * (z_start.dim() - 1))
        time = self.solver.steps_table()[2][0][window].repeat(rows)
        for _ in range(self.steps):
            model(sample, time)
        return z_start


class NoOp(Ours):
    """The no-op ablation: networks, data and optimizer alone, which is the most that any fusion could reach."""

    def made(self, flow: stages.StageFlow) -> stages.StageFlow:
        return dataclasses.replace(flow, solver=NoSteps(flow.solver))

    def micro_step(self, engine: Any, solved: Solved, samples: list[int]) -> None:
        device = self.scene.device
        sampler.chord_draws(self.recipe.train.seed, self.flow.index, samples).to(device)
        copies = torch.arange(len(solved.window), device=device).repeat(self.chords)
        rows = solved.conditioning.select(copies).to(device, self.scene.dtype)
        sample, time, gradient = self.still()
        denoise(engine, sample, time, rows).backward(gradient)
        engine.step(RATE)

    def still(self) -> tuple[Tensor, Tensor, Tensor]:
        """A network input, its time and an output gradient that never change."""
        if not hasattr(self, "_still"):
            sample = self.scene.noise(self.batch).to(self.scene.dtype)
            time = network_time(
                self.flow.table.t_start[self.flow.window_of(torch.arange(self.batch, device=sample.device))]
            )
            self._still = sample, time, sample * (1.0 / sample.numel())
        return self._still


def published(scene: Scene, recipe: Recipe, *, cached: bool = False, always_guided: bool = False) -> PublishedLoop:
    """The published-style loop with the settings of a recipe's last stage."""
    stage = recipe.stages[-1]
    flow = stages.build(recipe, len(recipe.stages) - 1, scene.schedule, scene.base.prediction_type, scene.device)
    weight: Any = recipe.objective.direction_weight
    if recipe.objective.direction_norm == "window_speed":
        weight = weight * flow.table.speed.cpu() ** 2
    settings = Settings(
        len(flow.windows),
        stage.solver_steps,
        recipe.teacher.guidance_scale,
        always_guided,
        recipe.data.caption_drop,
        weight,
        recipe.train.clip,
        decay(recipe.train.ema_half_life, 0.0, 0, recipe.train.batch_size),
    )
    data, encoded = scene.data, None
    if cached:
        captions: Conditioning = data.captions.select(data.caption_of)
        encoded = data.latents, captions, data.null
    return PublishedLoop(
        scene.teacher,
        scene.student,
        scene.base,
        settings,
        batch=recipe.train.batch_size,
        device=scene.device,
        dtype=scene.dtype,
        abar=scene.schedule.alphas_cumprod,
        pixels=scene.pixels,
        sentences=scene.captions,
        optimizer=optimizer_of(scene, recipe),
        encoded=encoded,
    )


def optimizer_of(scene: Scene, recipe: Recipe) -> torch.optim.Optimizer:
    """The published loops' AdamW over the student's own weights, one for the scene, as its states are large."""
    if not hasattr(scene.student, "_published_optimizer"):
        train = recipe.train.model_copy(update={"learning_rate": RATE})
        scene.student._published_optimizer = [optimizers.build(scene.student.parameters(), train)]
    return scene.student._published_optimizer[0]
