"""What a training step of a model family needs, on one device: networks, schedule, data and a recipe.

The digits model is the committed one with its real data. SD1.5 and SDXL have random weights, made on the device: a
network's speed does not depend on them. Their output layer is not zero, so no work can be left out.
"""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from reflow.data.latents import LatentDataset
from reflow.flow import DiscreteVP
from reflow.models import registry
from reflow.models.conditioning import Conditioning
from reflow.models.family import Base
from reflow.recipes import reading
from reflow.recipes.settings import Recipe

FAMILIES = ("sdxl", "sd15", "digits")
CONFIGS = Path(registry.__file__).parent / "configs"
ITEMS = 64  # latents and captions of a random data set
SCANS = 256  # of the digits
TOKENS = 77
VOCABULARY = 40_000  # ids of random captions are below it


@dataclass
class Scene:
    """A family on a device. `dtype` is that of teacher and student; latents and captions are fp32 on the CPU."""

    family: str
    device: torch.device
    dtype: torch.dtype
    base: Base
    data: LatentDataset
    teacher: nn.Module
    student: nn.Module
    pixels: torch.Tensor
    captions: list[str]

    @property
    def schedule(self) -> DiscreteVP:
        return DiscreteVP.from_config(self.base.scheduler_config)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.student.parameters())

    def noise(self, batch: int, seed: int = 0) -> torch.Tensor:
        """[batch, C, h, w] fp32 on the device."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, *self.base.latent_shape(), generator=generator).to(self.device)


def recipe(
    *,
    windows: int = 8,
    solver_steps: int = 4,
    batch: int = 4,
    guidance_scale: float = 1.0,
    chords: int = 1,
    pairs: int = 0,
    before: int = 0,
    dtype: torch.dtype = torch.float32,
    graph: bool = False,
    seed: int = 0,
) -> Recipe:
    """The recipe `digits` with one stage of these settings. before: windows of the student that teaches (teacher =
    "previous"); the stage is then number 1."""
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    shipped = copy.deepcopy(_shipped())
    stage = {"windows": windows, "solver_steps": solver_steps, "samples": 100_000_000, "pairs": pairs}
    stage["chords_per_solve"] = chords
    raw = {
        **shipped,
        "train": {**shipped["train"], "batch_size": batch, "micro_batch": batch, "precision": name, "seed": seed},
        "teacher": {
            **shipped["teacher"],
            "guidance_scale": guidance_scale,
            "precision": name,
            "cuda_graph": graph,
            # PeRFlow: an unguided teacher sees the dropped caption, a guided one the whole caption.
            "drops_captions": guidance_scale == 1.0,
        },
        "stages": [stage],
    }
    if before:
        raw["stages"] = [{**stage, "windows": before, "chords_per_solve": 1}, {**stage, "teacher": "previous"}]
    return reading.parse(raw, "the benchmark's recipe")


@functools.cache
def _shipped() -> dict[str, Any]:
    return reading.load("digits").resolved()


def build(family: str, device: torch.device | str, *, student: bool = True, encoders: bool = True) -> Scene:
    """The scene of a family: fp32 for digits, bf16 for sd15 and sdxl. student: False where nothing is trained. Raises
    what the device raises, memory included."""
    device = torch.device(device)
    if family == "digits":
        base, dtype = registry.family(family).load(device=device), torch.float32
        data, pixels, captions = digits_data(base)
    else:
        dtype = torch.bfloat16
        base = random_base(family, device, dtype, encoders=encoders)
        data = random_data(base)
        pixels = torch.rand(4, 3, base.resolution, base.resolution) * 2 - 1
        captions = [f"caption {number}" for number in range(ITEMS)]
    teacher = base.unet.requires_grad_(False).eval()
    trained = copy.deepcopy(teacher).requires_grad_(True).train() if student else teacher
    return Scene(family, device, dtype, base, data, teacher, trained, pixels, captions)


def digits_data(base: Base) -> tuple[LatentDataset, torch.Tensor, list[str]]:
    """The first scans, each with its digit's caption: encoded, and as pixels and sentences."""
    from reflow.data import digits

    pixels, labels = (values[:SCANS] for values in digits.images())
    sentences = digits.prompts(torch.arange(10))
    latents, captions = base.encode_images(pixels.to(base.vae.device)).cpu().contiguous(), base.encode_prompts(sentences)
    null = base.null_conditioning(1)
    data = LatentDataset(latents, labels, captions.to("cpu", torch.float32), null.to("cpu", torch.float32))
    return data, pixels, digits.prompts(labels)


def configs_of(family: str) -> dict[str, Any]:
    """The configs of a family's parts by name, and the pipeline's."""
    folder = CONFIGS / family
    parts = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))}
    return {**parts, "pipeline": json.loads((folder / "model_index.json").read_text())}


def random_base(family: str, device: torch.device, dtype: torch.dtype, *, encoders: bool = True) -> Base:
    """A base of the family's architecture with random weights. Its tokenizers give random ids of the right length."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    configs = configs_of(family)
    base = Base(registry.family(family), CONFIGS / family, configs)
    with made_on(device, dtype):
        torch.manual_seed(0)
        base.unet = UNet2DConditionModel.from_config(configs["unet"])
        if encoders:
            texts = []
            for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
                if name in configs:
                    texts.append(kind(CLIPTextConfig.from_dict(configs[name])).requires_grad_(False).eval())
            base.text_encoders = tuple(texts)
            base.tokenizers = tuple(random_ids for _ in texts)
    if encoders:
        upcast = configs["vae"].get("force_upcast", True) and base.family.pooled
        with made_on(device, torch.float32 if upcast else dtype):
            base.vae = AutoencoderKL.from_config(configs["vae"]).requires_grad_(False).eval()
    return base


class made_on:
    """New modules get their parameters on this device and in this dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = torch.device(device), dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        self.device.__enter__()

    def __exit__(self, *problem: Any) -> None:
        self.device.__exit__(*problem)
        torch.set_default_dtype(self.before)


def random_ids(prompts: list[str], **_: Any) -> SimpleNamespace:
    """Token ids [B, 77]: a benchmark's stand-in for a tokenizer, whose vocabulary files are not at hand."""
    generator = torch.Generator().manual_seed(len(prompts))
    return SimpleNamespace(input_ids=torch.randint(3, VOCABULARY, (len(prompts), TOKENS), generator=generator))


random_ids.model_max_length = TOKENS


def random_data(base: Base) -> LatentDataset:
    """ITEMS latents and captions, unit normal."""
    width = base.configs["unet"]["cross_attention_dim"]
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    pooled = times = None
    if base.family.pooled:
        pooled = normal(ITEMS, base.configs["text_encoder_2"]["projection_dim"])
        side = float(base.resolution)
        times = torch.tensor([[side, side, 0.0, 0.0, side, side]]).repeat(ITEMS, 1)
    captions = Conditioning(normal(ITEMS, TOKENS, width), pooled, times)
    empty = captions.select(slice(0, 1))
    if base.family.pooled:
        zero = torch.zeros_like
        empty = Conditioning(zero(empty.encoder_hidden_states), zero(empty.text_embeds), empty.time_ids)
    return LatentDataset(normal(ITEMS, *base.latent_shape()), torch.arange(ITEMS), captions, empty)
