"""The SD1.5 and SDXL recipes that ship, as they are but for size, on small models of the real classes and prepared images."""

import argparse
import importlib
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from reflow.commands import prepare
from reflow.errors import UserError
from reflow.recipes import reading
from reflow.training import run

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "helpers"))
RECIPES = [name for name in reading.available() if name.startswith(("sd15", "sdxl"))]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folder of a small base and the cache of twelve images that it prepared, by family."""
    tiny = importlib.import_module("tiny_pipelines")
    root = tmp_path_factory.mktemp("bases")
    images = root / "images"
    images.mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 255, (70 + i, 64, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text("a b c"[: i % 6])
    for family in ("sd15", "sdxl"):
        getattr(tiny, family)().save_pretrained(root / family)
        parser = argparse.ArgumentParser()
        prepare.arguments(parser)
        out = ["--out", str(root / f"{family}-cache")]
        given = ["--family", family, "--base", str(root / family), "--data", str(images), "--resolution", "64", *out]
        assert prepare.run(parser.parse_args(given)) == 0
    return root


def small(name, bases, *overrides):
    family = name.partition("-")[0]
    recipe = reading.load(name)
    sizes = [f"stages.{i}.samples=8" for i in range(len(recipe.stages))]
    sizes += [f"stages.{i}.solver_steps=3" for i, s in enumerate(recipe.stages) if s.solver_steps > 10]
    sizes += [f"stages.{i}.{key}=6" for i, s in enumerate(recipe.stages) for key in ("pairs",) if s.pairs]
    micro = 2 if recipe.train.micro_batch % 5 else 5
    return reading.load(name, [
        f"model.base={bases / family}", f"data.path={bases / f'{family}-cache'}", "model.compile=false",
        f"train.micro_batch={micro}", f"train.batch_size={2 * micro}", "train.warmup=0", "checkpoint.minutes=0", "log.every=1",
        "validate.every=8", "validate.images=1", "validate.pairs=2", "validate.teacher_steps=2", "validate.prompts=['a']", "validate.steps=[8]",
        *(["model.lora_rank=2"] if recipe.model.lora_rank else []), *(s.replace("=8", f"={2 * micro}") for s in sizes), *overrides])  # fmt: skip


def test_every_model_and_method_that_is_promised_has_a_recipe():
    assert set(RECIPES) == {"sd15-proreflow", "sdxl-proreflow", "sd15-perflow", "sdxl-perflow", "sdxl-proreflow-lora", "sdxl-phased", "sd15-rectified-hybrid", "sd15-instaflow",
                            "sdxl-proreflow-guided"}


# What they set others set too: long tests.
LIKE_OTHERS = ("sdxl-proreflow", "sdxl-perflow", "sdxl-phased", "sd15-instaflow")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_OTHERS)) for name in RECIPES])
def test_a_recipe_trains_all_its_stages(name, bases, tmp_path):
    recipe = small(name, bases)
    assert run.train(recipe, tmp_path / "run") == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if r["event"] == "train"]
    assert len(losses) == len(recipe.stages) and all(0 < loss < 1e3 for loss in losses)
    assert {r["stage"] for r in records if r["event"] == "validate"} == set(range(1, len(recipe.stages) + 1))
    assert all(list((tmp_path / "run" / f"stage-{i + 1}").glob("*_ema.safetensors")) for i in range(len(recipe.stages)))


def test_weights_that_are_not_finite_are_refused_before_training(bases, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(bases / "sd15", broken)
    for part, file in (("UNet", "unet/diffusion_pytorch_model.safetensors"), ("VAE", "vae/diffusion_pytorch_model.safetensors"),
                       ("text encoder", "text_encoder/model.safetensors")):  # fmt: skip
        state = load_file(broken / file)
        name = sorted(k for k, v in state.items() if v.is_floating_point())[0]
        kept = state[name].clone()
        state[name].view(-1)[0] = float("inf") if part == "VAE" else float("nan")
        save_file(state, broken / file, {"format": "pt"})
        with pytest.raises(UserError, match=f"1 tensors of the {part} of .*broken are not finite, the first is"):
            run.load_base(small("sd15-perflow", bases, f"model.base={broken}"), torch.device("cpu"))
        save_file(state | {name: kept}, broken / file, {"format": "pt"})
    state = load_file(broken / "unet/diffusion_pytorch_model.safetensors")
    state["conv_in.bias"][0] = float("nan")
    save_file(state, tmp_path / "student.safetensors")
    recipe = small("sd15-perflow", bases, f"model.student_weights={tmp_path / 'student.safetensors'}")
    with pytest.raises(UserError, match="student.safetensors are not finite, the first is conv_in.bias"):
        run.train(recipe, tmp_path / "run")
