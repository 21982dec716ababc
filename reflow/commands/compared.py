"""Which models `reflow evaluate` compares, from its arguments: the options that stand behind a --pipeline are that model's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from reflow.commands.common import positive
from reflow.errors import UserError

OWN = ("lora", "lora_scale", "scheduler", "known", "name", "tokenizer", "config", "negative_prompt")  # of the model named last
SHARED = ("steps", "guidance")  # of all models named since they were last given


@dataclass
class Named:
    """A model as the arguments name it; teacher: what the others are compared with."""

    path: str
    teacher: bool = False
    own: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass
class Models:
    """All models of a call in their order, and what was given before the first of them."""

    named: list[Named] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, namespace: argparse.Namespace) -> Models:
        if getattr(namespace, "models", None) is None:
            namespace.models = cls()
        return namespace.models


class Model(argparse.Action):
    """An option that names a model."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        Models.of(namespace).named.append(Named(values, teacher=self.dest == "teacher"))
        setattr(namespace, self.dest, values)


class OfModel(argparse.Action):
    """An option of the model, or of the models, named before it."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        models = Models.of(namespace)
        setattr(namespace, self.dest, values)
        if self.dest in SHARED:
            last = models.named[-1:] if models.named and models.named[-1].teacher else [m for m in models.named if not m.teacher]
            open_ones = [model for model in last if self.dest not in model.shared]
            for model in open_ones:
                model.shared[self.dest] = values
            if not models.named:
                models.before[self.dest] = values
        elif not models.named:
            parser.error(f"{option_string} belongs to a model; write it behind the --pipeline that it is for")
        else:
            models.named[-1].own[self.dest] = values


def scale(text: str) -> float:
    """An argparse type: a guidance scale."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 100:
        raise argparse.ArgumentTypeError(f"'{text}' is no guidance scale from 0 (none) to 100")
    return number


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of comparisons of models; --run-dir and --pipeline are the command's."""
    group = parser.add_argument_group(
        "models of any make", "Options behind a --pipeline or --teacher are that model's; --steps and --guidance are of all models named since "
        "they were last given.",
    )  # fmt: skip
    group.add_argument("--teacher", action=Model, metavar="PATH", help="what the models were made from: paired measures compare with it")
    group.add_argument("--lora", action=OfModel, metavar="FILE", help="a LoRA file put on the model")
    group.add_argument("--lora-scale", action=OfModel, type=float, metavar="X", help="default: what a known model asks for, else 1")
    group.add_argument("--scheduler", action=OfModel, metavar="CLASS", help="a scheduler of diffusers (default: a known model's, else the folder's)")
    group.add_argument("--known", action=OfModel, metavar="NAME", help="which few-step model it is, where its name does not tell")
    group.add_argument("--negative-prompt", action=OfModel, metavar="TEXT", help="what its guidance moves away from (default: no text)")
    group.add_argument("--tokenizer", action=OfModel, metavar="DIR", help="of a single file: a folder with its tokenizer, such as its base's")
    group.add_argument("--config", action=OfModel, metavar="DIR", help="of a single file: a folder with its configs, such as its base's")
    group.add_argument("--name", action=OfModel, metavar="TEXT", help="what tables call it")
    group.add_argument(
        "--steps", action=OfModel, type=positive, nargs="+", metavar="N", help="default: those that a known model or a student is made for"
    )
    group.add_argument("--anyway", action="store_true", help="measure settings that a known model is not made for; the result says so")
    group.add_argument(
        "--protocol", metavar="NAME", help="captions, images and measures; a name or a .toml file (default: prompts, or paired with a teacher)"
    )
    group.add_argument("--data", metavar="PATH", help="COCO's folder, or a text file with one prompt a line, as the protocol needs")
    group.add_argument(
        "--features", action="append", default=[], metavar="NAME=PATH", help="weights of a metric's network on your disk; nothing is ever fetched"
    )
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N prompts, for a first answer, which is marked as such")
    group.add_argument("--per-prompt", type=positive, metavar="N", help="images a prompt (default: the protocol's)")
    group.add_argument("--teacher-steps", type=positive, default=32, metavar="N", help="of the teacher as reference (default: 32)")
    group.add_argument(
        "--teacher-guidance", type=scale, metavar="SCALE", help="of the teacher as reference (default: that of the model compared with it)"
    )
    group.add_argument("--size", type=positive, metavar="PIXELS", help="side of the images (default: each model's own)")
    group.add_argument("--batch-size", type=positive, default=8, metavar="N", help="images drawn at once on a device (default: 8)")
    group.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], help="default: fp32 on a CPU, fp16 on a GPU; one for all models")
    group.add_argument("--devices", nargs="+", metavar="NAME", help="cuda:0 cuda:1, or cpu (default: all GPUs, else cpu)")
    group.add_argument("--bootstrap", type=int, default=20, metavar="N", help="resamplings for set measures' intervals; 0: none (default: 20)")
    group.add_argument("--keep-samples", action="store_true", help="keep all images and latents beside the report")


def filled(models: Models) -> list[Named]:
    """All models with their shared options: their own, else those given before the first model. Raises UserError for several teachers."""
    if sum(model.teacher for model in models.named) > 1:
        raise UserError("Several --teacher are given, and all models of a comparison have one reference; write one of them, the rest as --pipeline.")
    for model in models.named:
        if not model.teacher:
            model.shared = {**models.before, **model.shared}
    return models.named


def chosen_devices(given: Sequence[str] | None) -> list[str]:
    """The devices to draw on. Raises UserError for one that is not there."""
    import torch

    if given is None:
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    for name in given:
        kind, _, number = name.partition(":")
        if kind == "cuda" and int(number or 0) >= torch.cuda.device_count() or kind not in ("cpu", "cuda") or not (number or "0").isdigit():
            count = torch.cuda.device_count()
            raise UserError(f"--devices {name}: there are {count} GPUs that PyTorch can use; write cpu, or cuda:N of one of them.")
    return list(given)
