"""A LoRA run through the loop: one copy of the base, two stages, resumption, and what its weights become in every export."""

import argparse
import importlib
import json
import pathlib
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file

import tiny

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "helpers"))

from reflow.cli import COMMANDS
from reflow.errors import UserError
from reflow.evaluation.runs import open_run
from reflow.models.conditioning import denoise
from reflow.training import engine, loop, run

LORA = ("model.lora_rank=2", "model.lora_alpha=3.0", "teacher.precision=bf16", "validate.every=16", "validate.teacher_steps=2",
        "validate.steps=[2]", "validate.pairs=1", "train.batch_size=8", "stages.0.samples=16", "stages.1.samples=16", "log.every=8",
        "train.learning_rate=0.03", "train.warmup=0", "train.schedule=constant", "train.ema_half_life=4")


def reflow(name, *argv):
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser()
    module.arguments(parser)
    return module.run(parser.parse_args([str(word) for word in argv]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run directory, the base it trained in, names of what the engines trained)."""
    folder, seen, names = tmp_path_factory.mktemp("lora"), [], []
    load, start = run.load_base, engine.Engine.__init__

    def kept(*args, **kwargs):
        seen.append(load(*args, **kwargs))
        return seen[-1]

    def watched(self, *args, **kwargs):
        start(self, *args, **kwargs)
        names.append(set(self.params))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_base", kept)
        patch.setattr(engine.Engine, "__init__", watched)
        assert run.train(tiny.recipe(folder, *LORA, "checkpoint.every=8"), folder / "run") == 0
    return folder / "run", seen[0], names


def test_only_adapters_are_trained_and_kept_and_the_one_base_stays_as_it_was(trained, digits_base):
    folder, base, names = trained
    assert len(names) == 2 and all(".lora_" in name for stage in names for name in stage)
    whole = digits_base.unet.state_dict()
    for name, tensor in base.unet.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(tensor.cpu(), whole[name.replace(".base_layer", "")].bfloat16()), name
    first, second = (load_file(folder / f"stage-{i + 1}" / "lora_ema.safetensors") for i in (0, 1))
    assert {f"unet.{name}" for name in names[0]} == first.keys() == second.keys()
    for state in (first, second):
        assert all(state[key].any() for key in state) and all(tensor.dtype == torch.float32 for tensor in state.values())
    # The second stage starts from the first, by its teacher too, and goes on.
    apart = [sum((a[k] - b[k]).square().sum() for k in a) ** 0.5 for a, b in ((first, second), (first, {k: 0 * v for k, v in first.items()}))]
    assert 0 < apart[0] < apart[1]
    checkpoint = sum(path.stat().st_size for path in next((folder / "checkpoints").glob("stage-2-*")).rglob("*") if path.is_file())
    adapter, base_size = sum(t.nbytes for t in first.values()), sum(t.nbytes for t in whole.values())
    assert checkpoint < 10 * adapter < 0.5 * base_size


def test_both_stages_start_at_their_own_ddim_and_are_validated(trained):
    records = [json.loads(line) for line in (trained[0] / "log.jsonl").read_text().splitlines()]
    assert all(r["distance_to_own_ddim"] < 1e-3 for r in records if r["event"] == "start")
    assert [r["stage"] for r in records if r["event"] == "validate"] == [1, 2] and len(list((trained[0] / "validation").glob("*.png"))) == 4


def test_previous_is_the_student_of_the_stage_before(trained, digits_base):
    folder, base, _ = trained
    recipe = tiny.recipe(folder.parent, *LORA, "teacher.precision=fp32")
    networks = loop.networks.Lora(recipe, folder, run.load_base(recipe, torch.device("cpu")), torch.device("cpu"), lambda: None)
    data = run.load_data(recipe, digits_base)
    where = data.latent(torch.arange(3)).float(), torch.tensor([900.0, 500.0, 10.0]), data.conditioning(torch.arange(3))
    merged = open_run(folder).students[0].network(digits_base, torch.device("cpu"))
    with torch.no_grad():
        want, root = denoise(merged, *where), denoise(digits_base.unet, *where)
        for network in (networks.teacher(1), networks.student(1)):
            torch.testing.assert_close(denoise(network, *where), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(denoise(networks.teacher(0), *where), root, rtol=1e-4, atol=1e-5)
    assert (want - root).norm() > 0.005 * root.norm()


def test_an_interrupted_run_ends_bit_equal(trained, tmp_path, monkeypatch):
    recipe, agree, count = tiny.recipe(tmp_path, *LORA), loop.Signals.agree, [0]

    def leave_now(self):
        count[0] += 1
        return (True, False) if count[0] == 3 else agree(self)

    monkeypatch.setattr(loop.Signals, "agree", leave_now)
    assert run.train(recipe, tmp_path / "cut") == loop.LEFT_EARLY
    assert run.train(recipe, tmp_path / "cut") == 0
    for i in (0, 1):
        a, b = (load_file(folder / f"stage-{i + 1}" / "lora_ema.safetensors") for folder in (trained[0], tmp_path / "cut"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_whole_student_is_no_start_for_a_lora(tmp_path, digits_base):
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in digits_base.unet.state_dict().items()}, str(tmp_path / "whole.safetensors"))
    with pytest.raises(UserError, match="holds no LoRA weights.*lora_rank = 0"):
        run.train(tiny.recipe(tmp_path, *LORA, f"model.student_weights={tmp_path / 'whole.safetensors'}"), tmp_path / "run")


def images(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe("a handwritten seven", num_inference_steps=2, guidance_scale=1.0, output_type="np",
                generator=torch.Generator().manual_seed(0)).images


def test_the_lora_file_makes_a_stock_pipeline_draw_what_the_merged_folder_draws(trained, tmp_path, monkeypatch, capsys, digits_base):
    from diffusers import DDIMScheduler

    monkeypatch.chdir(tmp_path)
    run_dir = trained[0]
    assert reflow("export", "--run-dir", run_dir, "--out", "merged", "--dtype", "fp32") == 0
    for name in ("lora", "lora-kohya"):
        assert reflow("export", "--run-dir", run_dir, "--out", f"{name}.safetensors", "--format", name) == 0
    assert "DDIMScheduler.from_config(pipe.scheduler.config" in capsys.readouterr().out
    want = images(StableDiffusionXLPipeline.from_pretrained("merged"))
    for name in ("lora", "lora-kohya"):
        pipe = StableDiffusionXLPipeline.from_pretrained(digits_base.path)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1,
                                                   timestep_spacing="trailing")
        before = images(pipe)
        pipe.load_lora_weights(f"{name}.safetensors")
        np.testing.assert_allclose(images(pipe), want, atol=1e-4)
        assert np.abs(before - want).max() > 0.005
    with safe_open("lora-kohya.safetensors", "pt") as file:
        keys = list(file.keys())
        assert all(key.startswith("lora_unet_") and key.endswith((".lora_down.weight", ".lora_up.weight", ".alpha")) for key in keys)
        assert json.loads(file.metadata()["windows"]) == [1.0, 0.5, 0.0]
    # The other readers: sample, delta.
    assert reflow("sample", "--run-dir", run_dir, "--prompt", "a handwritten seven", "--out", "drawn", "--dtype", "fp32") == 0
    assert reflow("export", "--run-dir", run_dir, "--out", "delta.safetensors", "--format", "delta") == 0
    assert reflow("sample", "--model", "merged", "--prompt", "a handwritten seven", "--out", "drawn-merged", "--dtype", "fp32") == 0
    from PIL import Image

    drawn = [np.asarray(Image.open(f"{name}/00000.png")).astype(int) for name in ("drawn", "drawn-merged")]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    delta, merged = load_file("delta.safetensors"), load_file("merged/unet/diffusion_pytorch_model.safetensors")
    base = digits_base.unet.state_dict()
    assert all(torch.equal(base[k] + delta[k], merged[k]) or torch.allclose(base[k] + delta[k], merged[k], atol=1e-7) for k in merged)
    assert {k for k in delta if delta[k].any()} == {k for k in delta if ".to_" in k and k.endswith("weight")}


def test_a_whole_student_has_no_lora_file(tmp_path, digits_base):
    from reflow.weights.files import write_state
    from reflow.weights.lora import export_lora

    path = write_state(digits_base.unet.state_dict(), tmp_path / "whole.safetensors")
    with pytest.raises(UserError, match="is a whole student.*--format delta"):
        export_lora(path, tmp_path / "out.safetensors")
