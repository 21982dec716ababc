"""PeRFlow's published weights, in their layouts: a delta's folder, and whole pipelines that carry their base's scheduler
or PeRFlow's own. Their networks are called at 1000 t."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, PNDMScheduler
from PIL import Image

import tiny_pipelines
from reflow.errors import UserError
from reflow.models import family
from reflow.sampling import PiecewiseFlowScheduler, sample
from reflow.sampling.pictures import to_pil

TOLD = {
    "sd15": ("--windows", 4, "--prediction-type", "diff_eps"),
    "sdxl": ("--windows", 4, "--prediction-type", "ddim_eps"),
}
PERFLOW = {
    "_class_name": "PeRFlowScheduler",
    "_diffusers_version": "0.21.4",
    "num_time_windows": 4,
    "t_noise": 1,
    "t_clean": 0,
    **tiny_pipelines.BETAS,
}


def moved(pipe, scale=0.02):
    g = torch.Generator().manual_seed(1)
    return {key: t + scale * torch.randn(t.shape, generator=g) for key, t in pipe.unet.state_dict().items()}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with whole pipelines sd15 (a PNDM base's scheduler) and sdxl (every part of the variant v0-fix), bases of
    the same names with "-base", and the delta of SD1.5 as a UNet's folder of the variant v0-1."""
    place = tmp_path_factory.mktemp("published")
    for name in ("sd15", "sdxl"):
        pipe = getattr(tiny_pipelines, name)()
        pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
        pipe.save_pretrained(place / f"{name}-base")
        base = {key: tensor.clone() for key, tensor in pipe.unet.state_dict().items()}
        pipe.unet.load_state_dict(moved(pipe))
        pipe.save_pretrained(place / name, variant="v0-fix" if name == "sdxl" else None)
        if name == "sd15":
            pipe.unet.load_state_dict({key: tensor - base[key] for key, tensor in pipe.unet.state_dict().items()})
            pipe.unet.half().save_pretrained(place / "delta", variant="v0-1")
    names = {file.name for file in (place / "delta").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.v0-1.safetensors"}
    return place


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def called(monkeypatch):
    """The timesteps of every sampling, in turn."""
    seen, real = [], PiecewiseFlowScheduler.set_timesteps
    monkeypatch.setattr(
        PiecewiseFlowScheduler,
        "set_timesteps",
        lambda self, *args, **kwargs: (real(self, *args, **kwargs), seen.append(self.timesteps.tolist()))[0],
    )
    return seen


def drawn(base, kind):
    scheduler = PiecewiseFlowScheduler(num_time_windows=4, prediction_type=kind, network_time="perflow")
    return np.asarray(to_pil(sample(base, base.unet, ["abc"], 4, [0], scheduler=scheduler).images[0])).astype(int)


def same(path, picture):
    return np.abs(np.asarray(Image.open(path)).astype(int) - picture).max() <= 1


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_whole_pipeline_is_sampled_as_it_was_trained(reflow, published, here, called, capsys, name):
    base = family(name).load(published / name)
    call = ("sample", "--model", published / name, "--prompt", "abc", "--dtype", "fp32")
    assert reflow(*call, *TOLD[name], "--out", "told") == 0
    assert set(map(tuple, called)) == {(1000.0, 750.0, 500.0, 250.0)}
    assert "taken as perflow (1000 t), that of PeRFlow's published weights" in capsys.readouterr().err
    kind = TOLD[name][-1]
    want = drawn(base, kind)
    assert same("told/00000.png", want)
    # With PeRFlow's scheduler in the folder nothing needs to be told.
    other = shutil.copytree(published / name, here / "other")
    own = PERFLOW | {"prediction_type": "epsilon" if kind == "diff_eps" else kind}
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(own))
    called.clear()
    assert reflow("sample", "--model", "other", "--prompt", "abc", "--dtype", "fp32", "--out", "own") == 0
    assert set(map(tuple, called)) == {(1000.0, 750.0, 500.0, 250.0)} and same("own/00000.png", want)
    with pytest.raises(UserError, match="other says itself how its student is sampled, so --windows would not be read"):
        reflow("sample", "--model", "other", "--prompt", "abc", *TOLD[name])
    # Another network time is taken where it is asked for.
    called.clear()
    assert reflow(*call, *TOLD[name], "--network-time", "index", "--out", "index") == 0
    assert set(map(tuple, called)) == {(999, 749, 499, 249)} and "taken as perflow" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, words",
    [
        (("--windows", 4), "sd15 does not say which windows .* add --windows and --prediction-type"),
        (("--network-time", "perflow"), "sd15 does not say which windows"),
        (("--windows", 4, "--prediction-type", "ddim_v"), "asked to be 'ddim_v', but the config says 'epsilon'"),
        ((*TOLD["sd15"], "--steps", 2), "--steps 2 is fewer than the student's 4 windows"),
    ],
)
def test_what_is_told_must_be_whole_and_fit(reflow, published, here, options, words):
    with pytest.raises(UserError, match=words):
        reflow("sample", "--model", published / "sd15", "--prompt", "abc", *options)
    assert not list(here.iterdir())


def test_an_exported_student_is_not_told_how_it_is_sampled(reflow, published, here):
    merge = ("merge", "--base", published / "sd15-base", "--delta", published / "delta", *TOLD["sd15"])
    assert reflow(*merge, "--out", "fast") == 0
    with pytest.raises(UserError, match="fast says itself how its student is sampled, so --prediction-type would"):
        reflow("sample", "--model", "fast", "--prompt", "abc", "--prediction-type", "ddim_eps")


@pytest.mark.parametrize("file", [False, True])
def test_a_delta_becomes_the_published_model(reflow, published, here, capsys, file):
    """Merged into the base that it was taken from, the delta's folder or file gives the whole pipeline's pictures."""
    delta = published / "delta"
    if file:
        delta = here / "delta_weights.safetensors"
        shutil.copy(published / "delta" / "diffusion_pytorch_model.v0-1.safetensors", delta)
    merge = ("merge", "--base", published / "sd15-base", "--delta", delta, "--dtype", "fp32", *TOLD["sd15"])
    assert reflow(*merge, "--out", "fast") == 0
    assert "taken as perflow (1000 t)" in capsys.readouterr().err
    config = PiecewiseFlowScheduler.from_pretrained("fast/scheduler").config
    assert (config.network_time, config.prediction_type, config.num_time_windows) == ("perflow", "diff_eps", 4)
    assert reflow("sample", "--model", "fast", "--prompt", "abc", "--dtype", "fp32") == 0
    assert same("samples/00000.png", drawn(family("sd15").load(published / "sd15"), "diff_eps"))
    pipe = DiffusionPipeline.from_pretrained("fast")
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == [1000, 750, 500, 250]
    assert reflow(*merge, "--network-time", "index", "--out", "index") == 0
    assert PiecewiseFlowScheduler.from_pretrained("index/scheduler").config.network_time == "index"


def test_diff_eps_is_perflows_unless_it_is_said_otherwise(tmp_path):
    """As its README has it: from_config(pipe.scheduler.config, prediction_type="diff_eps", num_time_windows=4)."""
    for config in (tiny_pipelines.ddim().config, PNDMScheduler(**tiny_pipelines.BETAS).config, DDIMScheduler().config):
        scheduler = PiecewiseFlowScheduler.from_config(config, prediction_type="diff_eps", num_time_windows=4)
        assert scheduler.config.network_time == "perflow"
        again = PiecewiseFlowScheduler.from_config(scheduler.config, num_time_windows=8)
        assert again.config.network_time == "perflow" and len(again.windows) == 8
        other = PiecewiseFlowScheduler.from_config(config, num_time_windows=4)
        assert (other.config.prediction_type, other.config.network_time) == ("ddim_eps", "index")
    # A student of this project with diff_eps at the base's own indices says so, and is read so.
    ours = PiecewiseFlowScheduler.for_student(config, 4, prediction_type="diff_eps", network_time="index")
    ours.save_pretrained(tmp_path)
    for read in (PiecewiseFlowScheduler.from_pretrained(tmp_path), PiecewiseFlowScheduler.from_config(ours.config)):
        assert (read.config.prediction_type, read.config.network_time) == ("diff_eps", "index")
    assert PiecewiseFlowScheduler.for_student(config, 4, prediction_type="diff_eps").config.network_time == "perflow"
