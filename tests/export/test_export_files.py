"""`reflow export` of a run of SD1.5 and SDXL as files: what they say of themselves, their cards, and sampling them."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors import safe_open

import tiny_pipelines
from reflow.errors import UserError
from reflow.flow import Windows
from reflow.models import family, family_of
from reflow.sampling import PiecewiseFlowScheduler, sample
from reflow.sampling.pictures import to_pil
from reflow.weights.delta import student_metadata, student_settings
from reflow.weights.files import write_state

RECIPE = """
name = "tiny"
[model]
family = "{family}"
base = "{base}"
[student]
prediction_type = "{kind}"
[data]
source = "cache"
path = "photos"
[teacher]
guidance_scale = 7.5
[validate]
guidance_scale = 2.5
[[stages]]
windows = 4
solver_steps = 4
samples = 1024
"""


def finished_run(place, name, prediction_type="epsilon", kind="ddim_eps", windows=4, **scheduler):
    """(run directory, base folder, the student's state) of a run that trained one stage."""
    pipe = getattr(tiny_pipelines, name)(prediction_type)
    pipe.scheduler = tiny_pipelines.ddim(prediction_type, **scheduler)
    pipe.save_pretrained(place / "base")
    g = torch.Generator().manual_seed(1)
    state = {key: t + 0.02 * torch.randn(t.shape, generator=g) for key, t in pipe.unet.state_dict().items()}
    run = place / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(RECIPE.format(family=name, base=place / "base", kind=kind))
    says = student_metadata(Windows.uniform(windows), kind)
    write_state(state, run / "stage-1" / "unet_ema.safetensors", metadata=says)
    return run, place / "base", state


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path


KINDS = {"fp16": "F16", "fp32": "F32"}


def kinds(file):
    with safe_open(file, "pt") as opened:
        return {key: opened.get_slice(key).get_dtype() for key in opened.keys()}


def metadata(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata(), set(opened.keys())


def same_scheduler(card, kind, ours):
    """Whether the code in a card makes a scheduler of this kind that steps as ours does."""
    code = re.search(r"^pipe.scheduler = (.*)$", card, re.M)[1]
    scheduler = eval(code, {"DDIMScheduler": DDIMScheduler, "PiecewiseFlowScheduler": PiecewiseFlowScheduler})
    results = []
    for each in (scheduler, ours):
        each.set_timesteps(len(ours.windows))
        g = torch.Generator().manual_seed(0)
        z = torch.randn(1, 4, 8, 8, generator=g)
        for timestep in each.timesteps:
            z = each.step(torch.randn(z.shape, generator=g), timestep, z).prev_sample
        results.append(z)
    return type(scheduler) is kind and (results[0] - results[1]).abs().max() <= 1e-5 * results[1].abs().max()


@pytest.mark.parametrize("name, dtype", [("sdxl", "fp16"), ("sd15", "fp32")])
def test_a_single_file_says_how_it_is_used_and_samples_the_student(reflow, here, capsys, name, dtype):
    run, base, state = finished_run(here, name)
    options = ("--run-dir", run, "--format", "single-file", "--dtype", dtype)
    assert reflow("export", *options, "--out", "fast.safetensors") == 0
    said = capsys.readouterr().out
    assert "ComfyUI: KSampler: sampler_name euler, scheduler simple, steps 4, cfg 2.5, denoise 1" in said
    assert "AUTOMATIC1111, Forge: sampling method Euler, schedule type Simple, 4 steps, CFG scale 2.5" in said
    says, keys = metadata("fast.safetensors")
    architecture = {"sd15": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}[name]
    wanted = dict(sai_model_spec="1.0.0", architecture=architecture, implementation="sgm", title="fast")
    wanted |= dict(resolution="64x64", prediction_type="epsilon", predict_key="epsilon")
    assert {f"modelspec.{key}": value for key, value in wanted.items()}.items() <= says.items()
    assert "scheduler simple, steps 4, cfg 2.5" in says["modelspec.usage_hint"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", says["modelspec.date"])
    assert student_settings("fast.safetensors")["windows"] == Windows.uniform(4)
    assert "v_pred" not in keys and "ztsnr" not in keys
    assert {kind for key, kind in kinds("fast.safetensors").items() if "position_ids" not in key} == {KINDS[dtype]}
    card = (here / "fast.md").read_text(encoding="utf-8")
    ours = PiecewiseFlowScheduler.from_config(tiny_pipelines.ddim().config, num_time_windows=4)
    assert same_scheduler(card, DDIMScheduler, ours)
    for piece in (
        'Pipeline.from_single_file("fast.safetensors")',
        "num_inference_steps=4, guidance_scale=2.5",
        "KSampler: sampler_name euler",
        "## Recipe",
        "guidance_scale = 7.5",
        "cache: photos",
        f"A 4-step student of {base.name}, ",
        f'base = "{base.name}"',
    ):
        assert piece in card, piece
    # What is passed on says nothing of where things lie on this machine.
    assert says["base"] == base.name and not re.search(r"(?<![\w./:<])/\w", card + json.dumps(says))
    if dtype == "fp16":
        return
    # The file alone, with the base's tokenizer and configs, is the student.
    single = ("--tokenizer", base, "--config", base)
    assert reflow("sample", "--base", "fast.safetensors", *single, "--prompt", "abc", "--dtype", "fp32") == 0
    model = family(name).load(base)
    model.unet.load_state_dict(state)
    want = np.asarray(to_pil(sample(model, model.unet, ["abc"], 4, [0], windows=4).images[0])).astype(int)
    assert np.abs(np.asarray(Image.open("samples/00000.png")).astype(int) - want).max() <= 1
    with pytest.raises(UserError, match="fewer than the student's 4 windows"):
        reflow("sample", "--base", "fast.safetensors", *single, "--prompt", "abc", "--steps", "2")


def test_v_prediction_and_zero_terminal_snr_are_marked(reflow, here):
    """In the way ComfyUI knows them; diffusers and reflow read the file as before."""
    zero = dict(rescale_betas_zero_snr=True)
    run, base, state = finished_run(here, "sdxl", "v_prediction", "ddim_v", **zero)
    options = ("--run-dir", run, "--format", "single-file", "--dtype", "fp32")
    assert reflow("export", *options, "--out", "v.safetensors") == 0
    says, keys = metadata("v.safetensors")
    assert {"v_pred", "ztsnr"} <= keys and says["modelspec.prediction_type"] == "v"
    pipe = tiny_pipelines.sdxl()
    back = type(pipe).from_single_file("v.safetensors", config=str(base), local_files_only=True)
    got = back.unet.state_dict()
    assert got.keys() == state.keys() and all(torch.equal(got[key], state[key]) for key in state)
    found, folder = family_of("v.safetensors", tokenizer=str(base), config=str(base))
    config = found.load(folder, parts=()).scheduler_config
    assert config["prediction_type"] == "v_prediction" and config["rescale_betas_zero_snr"]
    assert student_settings(folder / "unet" / "diffusion_pytorch_model.safetensors")["prediction_type"] == "ddim_v"


def test_a_single_file_that_no_other_program_can_sample_says_so(reflow, here, capsys):
    run, *_ = finished_run(here, "sd15", kind="velocity", windows=3)
    assert reflow("export", "--run-dir", run, "--format", "single-file", "--out", "fast.safetensors") == 0
    assert "no sampler of theirs steps as this student was trained; use diffusers" in capsys.readouterr().out
    assert "KSampler" not in metadata("fast.safetensors")[0]["modelspec.usage_hint"]
    card = (here / "fast.md").read_text(encoding="utf-8")
    ours = PiecewiseFlowScheduler.for_student(tiny_pipelines.ddim().config, 3, prediction_type="velocity")
    assert same_scheduler(card, PiecewiseFlowScheduler, ours) and "KSampler" not in card


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_only_the_lora_that_other_programs_read_gives_settings_for_them(reflow, here, capsys, name):
    run, *_ = finished_run(here, name)
    (run / "stage-1" / "unet_ema.safetensors").unlink()
    lora = tiny_pipelines.lora(getattr(tiny_pipelines, f"{name}_unet")())
    write_state(lora, run / "stage-1" / "lora_ema.safetensors", metadata=student_metadata(Windows.uniform(4), "ddim_eps"))
    ours = PiecewiseFlowScheduler.from_config(tiny_pipelines.ddim().config, num_time_windows=4)
    cards, said = {}, {}
    for kind in ("lora", "lora-kohya"):
        assert reflow("export", "--run-dir", run, "--format", kind, "--out", f"{kind}.safetensors") == 0
        cards[kind], said[kind] = (here / f"{kind}.md").read_text(encoding="utf-8"), capsys.readouterr().out
        assert same_scheduler(cards[kind], DDIMScheduler, ours)
        assert f'pipe.load_lora_weights("{kind}.safetensors")' in cards[kind]
    for text in (cards["lora"], said["lora"]):
        assert "reflow export --format lora-kohya" in text and "KSampler" not in text
    for text in (cards["lora-kohya"], said["lora-kohya"]):
        assert "KSampler: sampler_name euler" in text and "--format" not in text
    block = {"sd15": "down_blocks_1_attentions_0", "sdxl": "input_blocks_4_1"}[name]
    assert f"lora_unet_{block}_transformer_blocks_0_attn1_to_q.lora_up.weight" in metadata("lora-kohya.safetensors")[1]


def test_a_delta_has_a_card_and_no_card_is_overwritten(reflow, here):
    run, *_ = finished_run(here, "sd15")
    assert reflow("export", "--run-dir", run, "--format", "delta", "--out", "fast.safetensors") == 0
    card = (here / "fast.md").read_text(encoding="utf-8")
    assert "reflow merge --base MY-FINE-TUNE --delta fast.safetensors" in card and "## Data" in card
    assert metadata("fast.safetensors")[0]["base_prediction_type"] == "epsilon"
    (here / "mine.md").write_text("my notes")
    with pytest.raises(UserError, match="mine.md already exists"):
        reflow("export", "--run-dir", run, "--format", "delta", "--out", "mine.safetensors")
    assert (here / "mine.md").read_text() == "my notes" and not (here / "mine.safetensors").exists()

    # A report of these very weights is the card's evaluation.
    digest = hashlib.sha256((run / "stage-1" / "unet_ema.safetensors").read_bytes()).hexdigest()
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6, "count": 3}
    row = {"frechet": interval, "diversity": interval, "prompt_accuracy": interval, "milliseconds_per_image": 1.25}
    method = {"method": "student, 4 windows", "stage": 1, "windows": 4, "steps": 4, "paired_images": interval, **row}
    settings = {"samples": 100, "seeds": 3, "teacher_steps": 32}
    report = {"methods": [method], "differences": [], "settings": settings, "real_scans": 100}
    (run / "report").mkdir()
    (run / "report" / "report.json").write_text(json.dumps(report | {"weights": {"stage-1": digest}}))
    assert "## Evaluation" not in card
    assert reflow("export", "--run-dir", run, "--format", "delta", "--out", "again.safetensors") == 0
    assert "| student, 4 windows | 4 | 0.5000 ± 0.1000 |" in (here / "again.md").read_text(encoding="utf-8")
