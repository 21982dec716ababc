"""The networks of a run: who teaches a stage, who learns, and how a student's average is sampled and kept.

`Whole` keeps a network for each of them. `Lora` has one copy of the base's weights, in the teacher's precision, and
switches adapters.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from reflow.errors import UserError
from reflow.models.family import Base
from reflow.models.lora import AVERAGE, STUDENT, TEACHER, Adapters, Student, View
from reflow.models.switches import prepare
from reflow.recipes.settings import Recipe
from reflow.weights.lora import LORA_FILE, WHOLE_FILE, adapter_state, is_lora, lora_state, read_lora, student_state
from reflow.weights.runs import stage_folder


def solver_dtype(recipe: Recipe) -> torch.dtype:
    """Of the frozen teacher's input and of what is not in 8 bits."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}[recipe.teacher.precision]


def trained_dtype(recipe: Recipe) -> torch.dtype:
    """What the engine computes in."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.train.precision]


class Whole:
    """Full fine-tuning. `root` is the base's own network; all others are copies of its architecture."""

    file = WHOLE_FILE

    def __init__(self, recipe: Recipe, run_dir: pathlib.Path, base: Base, device: torch.device,
                 make_unet: Callable[[], torch.nn.Module]) -> None:
        self.recipe, self.run_dir, self.base, self.device, self.make_unet = recipe, run_dir, base, device, make_unet

    @contextlib.contextmanager
    def root(self) -> Iterator[Any]:
        """The base's own network on the device, for as long as it is looked at: its fp32 weights live in the CPU's memory."""
        try:
            yield self.base.unet.to(self.device)
        finally:
            self.base.unet.to("cpu")

    def weights_of(self, stage: int) -> pathlib.Path:
        """What a finished stage leaves: the EMA of its student, fp32."""
        return stage_folder(self.run_dir, stage) / self.file

    def start_of(self, stage: int) -> pathlib.Path | None:
        """The file that a stage's student starts from; None: the base."""
        if stage:
            return self.weights_of(stage - 1)
        return pathlib.Path(self.recipe.model.student_weights) if self.recipe.model.student_weights else None

    def network(self, weights: pathlib.Path | None) -> torch.nn.Module:
        """A network of the base's architecture, fp32, with the base's weights or those of a file."""
        unet = self.make_unet()
        state = self.base.unet.state_dict()
        if weights is not None:
            state = student_state(state, weights)
        unet.load_state_dict(state)
        return unet.to(self.device, torch.float32)

    def teacher(self, stage: int) -> Any:
        """The frozen network that solves this stage's windows."""
        previous = self.recipe.stages[stage].teacher == "previous"
        unet = self.network(self.weights_of(stage - 1) if previous else None).requires_grad_(False).eval().to(solver_dtype(self.recipe))
        return prepare(unet, self.recipe.model, trains=False)

    def student(self, stage: int) -> torch.nn.Module:
        """The network that the engine trains; its parameters that require gradients are all that is trained and saved."""
        return prepare(self.network(self.start_of(stage)), self.recipe.model, trains=True, dtype=trained_dtype(self.recipe))

    def averaged(self, averages: dict[str, torch.Tensor]) -> Any:
        """A network to sample with trained parameters of these values."""
        unet = self.network(None).eval()
        unet.load_state_dict(averages, strict=False)
        return unet if self.recipe.train.precision == "fp32" else unet.to(torch.bfloat16)

    def follower(self) -> Any:
        """A frozen network of what the engine computes in, whose trained parameters `follow` sets anew at every step."""
        unet = self.network(None).requires_grad_(False).eval().to(trained_dtype(self.recipe))
        return prepare(unet, self.recipe.model, trains=False)

    @torch.no_grad()
    def follow(self, follower: Any, averages: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Give a follower these values of the trained parameters."""
        held = dict(follower.named_parameters())
        for name, value in averages:
            held[name].copy_(value)

    def to_save(self, averages: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The state that a stage leaves."""
        return {**self.base.unet.state_dict(), **averages}


class Lora(Whole):
    """A LoRA student in the base's own network. The root teacher is that network with no adapter, "previous" a second,
    frozen one."""

    file = LORA_FILE

    def __init__(self, recipe: Recipe, run_dir: pathlib.Path, base: Base, device: torch.device,
                 make_unet: Callable[[], torch.nn.Module]) -> None:
        super().__init__(recipe, run_dir, base, device, make_unet)
        previous = any(stage.teacher == "previous" for stage in recipe.stages)
        names = [STUDENT] + [TEACHER] * previous + [AVERAGE] * bool(recipe.validate_.every or any(stage.merges for stage in recipe.stages))
        model = recipe.model
        if base.unet.dtype != solver_dtype(recipe):
            base.unet.to(solver_dtype(recipe))
        self.adapters = Adapters(base.unet.to(device), model.lora_rank, model.lora_targets, alpha=model.lora_alpha,
                                 names=names)
        prepare(base.unet, model, trains=True)

    @contextlib.contextmanager
    def root(self) -> Iterator[View]:
        yield View(self.adapters)

    def read(self, path: pathlib.Path) -> dict[str, torch.Tensor]:
        if not is_lora(path):
            raise UserError(f"{path} holds no LoRA weights, and with model.lora_rank = {self.adapters.rank} the student is a "
                            f"LoRA on the base; give the lora_ema.safetensors of a run, or write lora_rank = 0.")
        return adapter_state(read_lora(path), self.adapters.scale)

    def teacher(self, stage: int) -> View:
        if self.recipe.stages[stage].teacher == "root":
            return View(self.adapters)
        self.adapters.put(TEACHER, self.read(self.weights_of(stage - 1)), solver_dtype(self.recipe))
        return View(self.adapters, TEACHER)

    def student(self, stage: int) -> Student:
        start = self.start_of(stage)
        self.adapters.put(STUDENT, None if start is None else self.read(start), seed=self.recipe.train.seed)
        return Student(self.adapters)

    def averaged(self, averages: dict[str, torch.Tensor]) -> View:
        self.adapters.put(AVERAGE, averages)
        return View(self.adapters, AVERAGE)

    def follower(self) -> View:
        return View(self.adapters, AVERAGE)

    @torch.no_grad()
    def follow(self, follower: View, averages: Iterable[tuple[str, torch.Tensor]]) -> None:
        held = self.adapters.get(AVERAGE)  # looked up each time: validation puts new ones there
        for name, value in averages:
            held[name].copy_(value)

    def to_save(self, averages: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return lora_state(averages, self.adapters.scale, self.base.family.network[0])


def build(recipe: Recipe, *args: Any) -> Whole:
    """The networks that a recipe asks for; arguments are those of `Whole`."""
    return (Lora if recipe.model.lora_rank else Whole)(recipe, *args)
