"""Bases that are rectified flows, small ones of the real classes: images prepared, all stages trained, resumed, exported, sampled by the stock
pipeline as we sample."""

import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "helpers"))

import tiny_flows
from reflow.errors import UserError
from reflow.flow import Windows
from reflow.models import family
from reflow.recipes import reading
from reflow.sampling import sample
from reflow.training import run
from reflow.weights.lora import student_state

FAMILIES = ("sd3", "flux", "sana", "qwen-image", "z-image")
SIDE = 32
RECIPE = """
name = "tiny-flow"
[data]
source = "cache"
[student]
prediction_type = "velocity"
network_time = "flow"
shift = {shift}
[teacher]
guidance_scale = {guidance}
drops_captions = false
[objective]
starts = "noise"
[train]
batch_size = 8
micro_batch = 4
learning_rate = 3e-3
warmup = 0
ema_half_life = 8
[validate]
every = 16
steps = [4]
teacher_steps = 4
images = 1
pairs = 4
prompts = ["a b"]
[log]
every = 8
[checkpoint]
every = 8
minutes = 0
keep = 9
[[stages]]
windows = 4
solver_steps = 2
samples = 16
[[stages]]
windows = 2
solver_steps = 2
samples = 16
teacher = "previous"
"""


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory, reflow):
    """(name, folder): a base, a cache of six images, and a run of two stages on them."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    pipe = getattr(tiny_flows, name.replace("-", "_"))()
    pipe.save_pretrained(folder / "base")
    (folder / "images").mkdir()
    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (SIDE, SIDE, 3), np.uint8)).save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text("a b c d e f"[: 2 * i + 1])
    given = ("--family", name, "--base", folder / "base", "--data", folder / "images", "--resolution", SIDE, "--out", folder / "cache")
    assert reflow("prepare", *given) == 0
    text = RECIPE.format(shift=1.0 if name == "flux" else 3.0, guidance=1.0 if name == "flux" else 3.0)
    (folder / "tiny.toml").write_text(text)
    recipe = reading.load(str(folder / "tiny.toml"), [f"model.family={name}", f"model.base={folder / 'base'}", f"data.path={folder / 'cache'}"])
    assert run.train(recipe, folder / "run") == 0
    return name, folder, recipe


def log(folder, event):
    return [r for line in (folder / "log.jsonl").read_text().splitlines() if (r := json.loads(line))["event"] == event]


def test_every_stage_starts_as_its_own_sampler_and_trains(made):
    name, folder, recipe = made
    assert [tuple(stage.edges) for stage in recipe.stages] == [Windows.shifted(k, recipe.student.shift).boundaries for k in (4, 2)]
    starts = log(folder / "run", "start")
    assert [s["stage"] for s in starts] == [1, 2] and all(s["distance_to_own_ddim"] < 1e-5 for s in starts)
    losses = [r["loss"] for r in log(folder / "run", "train")]
    assert len(losses) == 4 and all(0 < loss < 1e3 for loss in losses)
    before = load_file(folder / "base" / "transformer" / "diffusion_pytorch_model.safetensors")
    for stage in (1, 2):
        after = load_file(folder / "run" / f"stage-{stage}" / "unet_ema.safetensors")
        changed = [key for key in after if not torch.equal(after[key], before[key].float())]
        # All but what the output does not depend on: the last block's text side, scales of rows that are the same everywhere.
        assert after.keys() == before.keys() and len(changed) > 0.7 * len(after)
        before = after


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(made, tmp_path):
    name, folder, recipe = made
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "stage-2")
    points = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.is_dir())
    kept = next(p for p in points if p.startswith("stage-2"))
    for point in points:
        if point > kept:
            shutil.rmtree(tmp_path / "run" / "checkpoints" / point)
    (tmp_path / "run" / "checkpoints" / "latest").write_text(kept)
    assert run.train(recipe, tmp_path / "run") == 0
    whole, again = (load_file(place / "stage-2" / "unet_ema.safetensors") for place in (folder / "run", tmp_path / "run"))
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_export_is_sampled_by_the_stock_pipeline_as_by_us(made, stage, reflow, tmp_path):
    import diffusers

    name, folder, recipe = made
    assert reflow("export", "--run-dir", folder / "run", "--stage", stage, "--dtype", "fp32", "--out", tmp_path / "student") == 0
    # Pipelines that pass even sigmas of their own are exact with diffusers' scheduler.
    own = "FlowWindowScheduler" if name in ("sd3", "sana") else "FlowMatchEulerDiscreteScheduler"
    config = json.loads((tmp_path / "student" / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == own
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    pipe.set_progress_bar_config(disable=True)
    steps, seen = 4 if stage == 1 else 2, {}

    def end(pipe, step, timestep, kwargs):
        seen["z"] = kwargs["latents"]
        return {}

    base = family(name).load(folder / "base")
    more = base.pipeline_call(1.0) | ({"use_resolution_binning": False} if name == "sana" else {})
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    pipe(["a b", "c"], num_inference_steps=steps, height=SIDE, width=SIDE, generator=generators, callback_on_step_end=end, output_type="pt", **more)
    base.unet.load_state_dict(student_state(base.unet.state_dict(), folder / "run" / f"stage-{stage}" / "unet_ema.safetensors"))
    windows = Windows(tuple(recipe.stages[stage - 1].edges))
    ours = sample(base, base.unet, ["a b", "c"], steps, [3, 4], windows=windows, network_time="flow", resolution=SIDE).latents
    z = seen["z"]
    if z.ndim == 3:
        from reflow.models.flows.base import unpacked

        z = unpacked(z, *ours.shape[2:])
    torch.testing.assert_close(z, ours, atol=2e-5, rtol=1e-4)
    card = (tmp_path / "student" / "README.md").read_text()
    assert ("FlowWindowScheduler" in card) and ("needs no package" not in card)
    assert f"tried through {base.family.pipelines[0]} to " in card


def test_an_image_to_image_pipeline_starts_where_we_do(made, reflow, tmp_path):
    """The family's own img2img pipeline with the exported scheduler, from latents, against ours from the same latents."""
    import diffusers

    from reflow.models.flows.base import packed

    name, folder, recipe = made
    base = family(name).load(folder / "base")
    kind = getattr(diffusers, base.family.pipelines[0].replace("Pipeline", "Img2ImgPipeline"), None)
    if kind is None:
        assert name == "sana"
        return
    assert reflow("export", "--run-dir", folder / "run", "--stage", 1, "--dtype", "fp32", "--out", tmp_path / "student") == 0
    pipe = kind.from_pretrained(tmp_path / "student")
    pipe.set_progress_bar_config(disable=True)
    base.unet.load_state_dict(student_state(base.unet.state_dict(), folder / "run" / "stage-1" / "unet_ema.safetensors"))
    clean = torch.randn(1, *base.latent_shape(SIDE), generator=torch.Generator().manual_seed(9))
    for strength in (0.3, 0.5, 0.6, 1.0):  # of four steps: two, two, three and four, as flows' pipelines round
        # Four channels are latents to every one of these pipelines, and are not encoded.
        theirs = pipe("a b", image=clean, strength=strength, num_inference_steps=4, height=SIDE, width=SIDE,
                      generator=[torch.Generator().manual_seed(3)], output_type="latent", **base.pipeline_call(1.0)).images  # fmt: skip
        ours = sample(base, base.unet, ["a b"], 4, [3], windows=Windows(tuple(recipe.stages[0].edges)), network_time="flow", resolution=SIDE,
                      init=clean, strength=strength).latents  # fmt: skip
        torch.testing.assert_close(theirs, packed(ours) if theirs.ndim == 3 else ours, atol=2e-5, rtol=1e-4)


def test_a_sample_command_reads_runs_and_exports_of_flows(made, reflow, tmp_path):
    name, folder, recipe = made
    assert reflow("export", "--run-dir", folder / "run", "--dtype", "fp32", "--out", tmp_path / "student") == 0
    size = ("--height", SIDE, "--width", SIDE, "--prompt", "a b")
    assert reflow("sample", "--run-dir", folder / "run", *size, "--out", tmp_path / "a") == 0
    assert reflow("sample", "--model", tmp_path / "student", *size, "--out", tmp_path / "b") == 0
    a, b = (np.asarray(Image.open(tmp_path / place / "00000.png")).astype(int) for place in "ab")
    assert a.shape == (SIDE, SIDE, 3) and abs(a - b).max() <= 1
    with pytest.raises(UserError, match="fewer than the student's 2 windows"):
        reflow("sample", "--run-dir", folder / "run", *size, "--steps", 1, "--out", tmp_path / "c")


def test_a_lora_of_a_transformer_loads_in_diffusers(made, reflow, tmp_path):
    import diffusers

    name, folder, recipe = made
    short = recipe.model_copy(update={"stages": recipe.stages[:1], "model": recipe.model.model_copy(update={"lora_rank": 2})})
    assert run.train(short, tmp_path / "run") == 0
    assert reflow("export", "--run-dir", tmp_path / "run", "--format", "lora", "--out", tmp_path / "x.safetensors") == 0
    with safe_open(str(tmp_path / "x.safetensors"), "pt") as file:
        assert all(key.startswith("transformer.") for key in file.keys())
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder / "base")
    pipe.load_lora_weights(str(tmp_path / "x.safetensors"))
    merged = student_state(folder / "base" / "transformer", tmp_path / "x.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = pipe.transformer.state_dict()
    assert all(torch.allclose(fused[key], merged[key].float(), atol=1e-5) for key in merged)
    with pytest.raises(UserError, match="write lora"):
        reflow("export", "--run-dir", tmp_path / "run", "--format", "lora-kohya", "--out", tmp_path / "y.safetensors")


def test_settings_of_another_kind_of_base_are_refused(made, tmp_path):
    name, folder, recipe = made
    for changes, said in (({"prediction_type": "ddim_eps"}, "is a rectified flow; write student.prediction_type = 'velocity'"),
                          ({"network_time": "index"}, "student.network_time = 'index' does not fit")):  # fmt: skip
        wrong = recipe.model_copy(update={"student": recipe.student.model_copy(update=changes)})
        with pytest.raises(UserError, match=said):
            run.train(wrong, tmp_path / "run")
    with pytest.raises(UserError, match="this base is none"):
        run.train(reading.load("digits-quick", ["student.network_time=flow", "student.prediction_type=velocity"]), tmp_path / "digits")
