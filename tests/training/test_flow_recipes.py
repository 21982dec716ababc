"""The recipes of flows that ship, as they are but for size, on small pipelines of the real classes and images that `prepare` encoded."""

import argparse
import json
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

from reflow.commands import prepare
from reflow.recipes import reading
from reflow.training import run

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "helpers"))
import tiny_flows

BASES = {"sd35-medium-reflow": "sd3", "flux-dev-reflow-lora": "flux", "qwen-image-reflow-lora": "qwen_image", "sana-reflow": "sana"}
SIDE = 32


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (SIDE + i, SIDE, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a b c"[: i % 6])
    return folder


def test_every_recipe_of_a_flow_is_run_here():
    flows = {name: reading.load(name) for name in reading.available()}
    assert BASES.keys() == {name for name, recipe in flows.items() if recipe.student.network_time == "flow" and recipe.data.source != "digits"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "sd35-medium-reflow")) for name in BASES])
def test_a_recipe_of_a_flow_trains_all_its_stages(name, images, tmp_path):
    recipe = reading.load(name)
    base, cache = tmp_path / "base", tmp_path / "cache"
    getattr(tiny_flows, BASES[name])().save_pretrained(base)
    parser = argparse.ArgumentParser()
    prepare.arguments(parser)
    given = ["--family", recipe.model.family, "--base", str(base), "--data", str(images), "--resolution", str(SIDE), "--out", str(cache)]
    assert prepare.run(parser.parse_args(given)) == 0
    micro = recipe.stages[0].windows
    small = reading.load(name, [
        f"model.base={base}", f"data.path={cache}", "model.compile=false", f"train.micro_batch={micro}", f"train.batch_size={2 * micro}",
        "train.warmup=0", "checkpoint.minutes=0", "log.every=1", f"validate.every={2 * micro}", "validate.images=1", "validate.pairs=2",
        "validate.teacher_steps=2", "validate.prompts=['a']", "validate.steps=[8]", "train.optimizer=adamw",
        *(["model.lora_rank=2"] if recipe.model.lora_rank else []),
        *(f"stages.{i}.{key}={value}" for i in range(len(recipe.stages)) for key, value in (("samples", 2 * micro), ("solver_steps", 2)))])  # fmt: skip
    assert run.train(small, tmp_path / "run") == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["event"] == "train"]
    assert len(losses) == len(recipe.stages) and all(0 < loss < 1e3 for loss in losses)
    assert {record["stage"] for record in records if record["event"] == "validate"} == set(range(1, len(recipe.stages) + 1))
    assert all(list((tmp_path / "run" / f"stage-{i + 1}").glob("*_ema.safetensors")) for i in range(len(recipe.stages)))
