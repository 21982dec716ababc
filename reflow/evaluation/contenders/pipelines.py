"""Any text-to-image pipeline of diffusers as a contender, with the settings of the few-step model that it is known as.

Time runs from t=1 (noise) to t=0 (data). Guidance 1 or below computes no unconditional half, as in diffusers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reflow.errors import UserError
from reflow.evaluation.contenders import known as table
from reflow.evaluation.contenders.calls import Watch, as_saved, denoisers
from reflow.evaluation.contenders.contender import Contender, Drawn
from reflow.evaluation.contenders.digests import digest, folder_digests
from reflow.evaluation.contenders.known import Known
from reflow.evaluation.contenders.loras import need_lora, put_in
from reflow.evaluation.contenders.opening import kind_of, load, place, scheduler_class, swap_scheduler
from reflow.weights.files import dtype_of, public_name
from reflow.weights.guard import reason_of

NONE = "none"


@dataclass(frozen=True)
class PipelineSpec:
    """What a user asks for: `path` a folder, a file or "builtin"; `lora` a file, at `lora_scale` (None: the known model's, else 1);
    `scheduler` a class by name ("": the known model's, else the pipeline's own); `known` an entry of known.toml by name ("": found by
    itself, "none": none); `name` its label; sizes in pixels (None: the pipeline's own); `anyway` draws what it is not made for;
    `tokenizer` and `config` are folders that a single file needs."""

    path: str
    lora: str = ""
    lora_scale: float | None = None
    scheduler: str = ""
    known: str = ""
    name: str = ""
    height: int | None = None
    width: int | None = None
    negative_prompt: str = ""
    anyway: bool = False
    tokenizer: str = ""
    config: str = ""

    @property
    def label(self) -> str:
        """The name given, else the names of its files, and the scheduler where one is asked for."""
        if self.name:
            return self.name
        parts = [Path(self.path).expanduser().absolute().name if self.path != "builtin" else "builtin"]
        if self.lora:
            parts.append(Path(self.lora).name if self.lora_scale is None else f"{Path(self.lora).name} x {self.lora_scale:g}")
        return " + ".join(parts) + (f", {self.scheduler}" if self.scheduler else "")

    def files(self) -> list[Path]:
        """Files and folders that decide its images."""
        return [Path(place).expanduser() for place in (self.path, self.lora) if place and place != "builtin"]

    def recognised(self) -> Known | None:
        """What it is known as, by what its names and small files tell. Raises UserError for a --known that is no name."""
        return None if self.known == NONE else table.by_name(self.known) if self.known else table.recognise(self.path, self.lora)

    def made_for(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """(steps, guidance) that a known model is made for, or a student has windows for; () where nothing says."""
        known = self.recognised()
        return ((), ()) if known is None else (known.steps or ((known.least,) if known.least > 1 else ()), (known.guidance,))

    def check(self, steps: int, guidance: float) -> None:
        """Raises UserError for settings that a known model is not made for, before anything is read."""
        known = self.recognised()
        if known is not None and not self.anyway:
            table.refuse(known, steps, guidance, self.scheduler, (), Path(self.lora or self.path).name)

    def open(self, device: str, dtype: str) -> Contender:
        return open_pipeline(self, torch.device(device), dtype_of(dtype))


def open_pipeline(spec: PipelineSpec, device: torch.device, dtype: torch.dtype) -> Contender:
    """The pipeline that a spec names, on this device, ready to draw; nothing is downloaded.

    Raises UserError for a path that is no pipeline, one that takes no prompt, a LoRA or a scheduler that does not fit, and a known model
    over a base that it is not made for.
    """
    known = spec.recognised()
    found = place(spec.path, tokenizer=spec.tokenizer, config=spec.config)
    if known is None and spec.known != NONE and str(found) != spec.path:
        known = table.recognise(found)  # what a single file says of itself is in the folder that it was unpacked into
    # All that can be told without the weights is told before they are read.
    bases = table.bases_of(*kind_of(found if found.is_dir() else Path(spec.config).expanduser()))
    if spec.scheduler:
        scheduler_class(spec.scheduler)
    if spec.lora:
        need_lora(Path(spec.lora).expanduser())
    if known and not spec.anyway:
        table.refuse(known, known.steps[0] if known.steps else known.least, known.guidance, spec.scheduler, bases, subject(spec))
    return Pipeline(spec, load(found, dtype, config=spec.config), found, known, bases, device)


def subject(spec: PipelineSpec) -> str:
    """What a refusal is about: the file or folder that carries the few-step model."""
    return Path(spec.lora or spec.path).name or spec.label


class Pipeline:
    """A contender: see `contender.Contender`. Made by `open_pipeline`."""

    def __init__(self, spec: PipelineSpec, pipe: Any, found: Path, known: Known | None, bases: tuple[str, ...], device: torch.device) -> None:
        self.spec, self.known, self.bases = spec, known, bases
        self._found, self._device = found, device
        self._takes = inspect.signature(type(pipe).__call__).parameters
        self._need_calls(pipe)
        scale = spec.lora_scale if spec.lora_scale is not None else known.lora_scale if known else 1.0
        self._lora = None
        if spec.lora:
            if not math.isfinite(scale):
                raise UserError(f"The scale of {spec.lora} is {scale}; write a finite number, 1 for the whole LoRA.")
            file = Path(spec.lora).expanduser()
            kind = put_in(pipe, file, scale, self.label if spec.name else type(pipe).__name__)
            self._lora = {"file": file.name, "sha256": digest(file), "kind": kind, **({"scale": scale} if kind == "lora" else {})}
        if spec.scheduler:
            own = known.config if known and known.scheduler == spec.scheduler else {}
            swap_scheduler(pipe, spec.scheduler, own, self.label, spec.anyway)
        elif known and known.scheduler:
            swap_scheduler(pipe, known.scheduler, known.config, self.label, spec.anyway)
        self._pipe: Any = pipe.to(device)
        if (spec.height or spec.width) and not (self._side("height") and self._side("width")):
            raise UserError(f"{self.label}: its {type(pipe).__name__} does not say its own size, so give height and width both.")

    @property
    def label(self) -> str:
        return self.spec.label

    def _need_calls(self, pipe: Any) -> None:
        kind, spec = type(pipe).__name__, self.spec
        for key in ("prompt", "num_inference_steps", "generator", "output_type"):
            if key not in self._takes:
                raise UserError(f"{self.label} is a {kind}, which takes no {key}, so it makes no images of prompts. Give a text-to-image pipeline.")
        required = [
            name for name, one in self._takes.items()
            if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) and name not in ("self", "prompt")
        ]  # fmt: skip
        if required or {"image", "strength"} <= self._takes.keys():
            raise UserError(f"{self.label} is a {kind}, which takes {(required or ['image'])[0]} besides a prompt. Give a text-to-image pipeline.")
        if not denoisers(pipe) or not {"callback_on_step_end", "callback"} & self._takes.keys():
            raise UserError(f"{self.label} is a {kind}, whose steps cannot be watched (no unet or transformer, or no callback). Give another.")
        for key in ("height", "width", "negative_prompt"):
            if getattr(spec, key) and key not in self._takes:
                raise UserError(f"{self.label} is a {kind}, which takes no {key}; leave it out.")

    def guidance_means(self) -> str:
        """What the scale does to this pipeline, in words."""
        config = next(iter(denoisers(self._pipe).values())).config
        if "guidance_scale" not in self._takes:
            return "not taken"
        if getattr(config, "time_cond_proj_dim", None) is not None:
            return "guidance - 1 is fed to the network as an embedding; no unconditional half at any scale"
        if getattr(config, "guidance_embeds", None) is not None:
            if config.guidance_embeds:
                return "fed to the network as an embedding; no unconditional half at any scale"
            return "not read: the network has no guidance embedding"
        return "classifier-free guidance above 1; no unconditional half at 1 and below"

    def describe(self) -> dict[str, Any]:
        import diffusers

        pipe = self._pipe
        weights = folder_digests(self._found, pipe.components) if self._found.is_dir() else {self._found.name: digest(self._found)}
        single = Path(self.spec.path).expanduser()
        return {
            "label": self.label,
            "kind": "pipeline",
            "path": public_name(self.spec.path),
            "file": {"sha256": digest(single)} if single.is_file() else None,
            "pipeline": type(pipe).__name__,
            "bases": list(self.bases),
            "weights": weights,
            "lora": self._lora,
            "scheduler": {"class": type(pipe.scheduler).__name__, "config": _plain(dict(pipe.scheduler.config))},
            "known": table.told(self.known),
            "anyway": self.spec.anyway,
            "guidance": self.guidance_means(),
            "negative_prompt": self.spec.negative_prompt,
            "dtype": {name: str(part.dtype).removeprefix("torch.") for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)},
            "height": self._side("height"),
            "width": self._side("width"),
            "diffusers": diffusers.__version__,
        }

    def _side(self, name: str) -> int | None:
        """Pixels as asked for, else as the pipeline's call has it, else as its network's config does; None where none of them says."""
        given = getattr(self.spec, name) or (self._takes[name].default if name in self._takes else None)
        side = getattr(self._pipe, "default_sample_size", None) or getattr(next(iter(denoisers(self._pipe).values())).config, "sample_size", None)
        scale = getattr(self._pipe, "vae_scale_factor", None)
        return given or (side * scale if isinstance(side, int) and isinstance(scale, int) else None)

    def check(self, steps: int, guidance: float) -> None:
        if steps < 1 or not math.isfinite(guidance):
            raise UserError(f"{self.label} cannot be drawn at {steps} steps and guidance {guidance:g}; write at least one step, and a finite scale.")
        if guidance > 1 and "guidance_scale" not in self._takes:
            raise UserError(f"{self.label} is a {type(self._pipe).__name__}, which takes no guidance; write --guidance 1.")
        if self.known and not self.spec.anyway:
            table.refuse(self.known, steps, guidance, self.spec.scheduler, self.bases, subject(self.spec))
        windows = len(getattr(self._pipe.scheduler, "windows", ()))
        if steps < windows:
            raise UserError(f"{self.label} has {windows} windows, and each of them needs a step; asked {steps}: write --steps {windows} or more.")

    def _call(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float) -> dict[str, Any]:
        call: dict[str, Any] = {
            "prompt": list(prompts),
            "num_inference_steps": steps,
            # A generator of its own makes all noise of a sample, so that it does not depend on its batch or device.
            "generator": [torch.Generator().manual_seed(int(seed)) for seed in seeds],
            "output_type": "np",
        }
        if "guidance_scale" in self._takes:
            call["guidance_scale"] = float(guidance)
        if self.spec.negative_prompt:
            call["negative_prompt"] = [self.spec.negative_prompt] * len(prompts)
        if self.spec.height or self.spec.width:  # some pipelines drop one side that comes without the other
            call |= {"height": self._side("height"), "width": self._side("width")}
        known = self.known
        if known and (not self.spec.scheduler or self.spec.scheduler == known.scheduler):
            timesteps = known.timesteps.get(steps)
            more = {"eta": known.eta, "timesteps": list(timesteps) if timesteps else None, **known.call}
            call |= {key: value for key, value in more.items() if value is not None}
        for key in call:
            if key not in self._takes:
                raise UserError(f"{self.label} needs {key} = {call[key]}, which {type(self._pipe).__name__} does not take. Leave it out.")
        return call

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float) -> Drawn:
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(f"draw needs one seed a prompt; got {len(prompts)} prompts and {len(seeds)} seeds")
        watch = Watch(self._pipe, self._takes, self._device)
        call = self._call(prompts, seeds, steps, guidance)
        try:
            with torch.no_grad(), watch:
                made = self._pipe(**call, **watch.keywords).images
        except UserError:
            raise
        except (ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
            raise UserError(f"{self.label} cannot be drawn at {steps} steps and guidance {guidance:g} ({reason_of(error)}).") from error
        if watch.latents is None or not watch.rows:
            raise UserError(f"{self.label}: {type(self._pipe).__name__} told of none of its steps, so its latents are not known. Give another.")
        latents = watch.latents.detach().float().cpu()
        self._need_finite("latents", latents, steps)
        self._need_finite("images", torch.as_tensor(made), steps)
        try:
            images = as_saved(made)
        except ValueError as error:
            raise UserError(f"{self.label} is no text-to-image pipeline: {error}.") from error
        asked = [self.spec.height or images.shape[2], self.spec.width or images.shape[3]]
        if list(images.shape[2:]) != asked:
            raise UserError(f"{self.label} makes images of {list(images.shape[2:])} pixels where {asked} (height, width) are asked; ask for those.")
        return Drawn(images, latents, round(watch.rows / len(prompts)), watch.seconds())

    def _need_finite(self, what: str, tensor: torch.Tensor, steps: int) -> None:
        if not torch.isfinite(tensor).all():
            hint = "a VAE that overflows in fp16: --dtype bf16 or fp32" if what == "images" else "--dtype bf16 or fp32, or another scheduler"
            bad = (~torch.isfinite(tensor).flatten(1).all(1)).sum().item()
            raise UserError(f"{self.label} at {steps} steps makes {what} that are not finite, in {bad} of {len(tensor)} samples. Try {hint}.")

    def close(self) -> None:
        self._pipe = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _plain(value: Any) -> Any:
    """A scheduler's config with what JSON has."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
