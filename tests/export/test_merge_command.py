"""`reflow merge` of SD1.5 and SDXL: what fits, what is reported, and what is refused before anything is written."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from safetensors.torch import load_file, save_file

import tiny_pipelines
from reflow.errors import UserError
from reflow.flow import Windows
from reflow.sampling import PiecewiseFlowScheduler
from reflow.weights.delta import make_delta, student_metadata
from reflow.weights.files import write_state

UNET = "unet/diffusion_pytorch_model.safetensors"


def moved(state, seed):
    g = torch.Generator().manual_seed(seed)
    return {key: tensor + 0.02 * torch.randn(tensor.shape, generator=g) for key, tensor in state.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(folder with fine-tunes sd15, sdxl and v, the delta of an SD1.5 student)."""
    place = tmp_path_factory.mktemp("merge")
    tiny_pipelines.sdxl().save_pretrained(place / "sdxl")
    pipe = tiny_pipelines.sd15()
    base = {key: tensor.clone() for key, tensor in pipe.unet.state_dict().items()}
    pipe.unet.load_state_dict(moved(base, 1))
    pipe.save_pretrained(place / "sd15")
    pipe.scheduler = tiny_pipelines.ddim("v_prediction")
    pipe.save_pretrained(place / "v")
    delta = make_delta(base, moved(base, 2))
    told = dict(base_prediction_type="epsilon", guidance_scale=2.5, teacher_guidance_scale=7.5)
    says = student_metadata(Windows.uniform(4), "ddim_eps", **told)
    write_state(delta, place / "delta.safetensors", metadata=says)
    return place, delta


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


PERFLOW = ("--windows", 4, "--network-time", "perflow", "--prediction-type", "diff_eps")


@pytest.mark.parametrize("name", ["delta_weights.safetensors", "diffusion_pytorch_model.v0-1.safetensors"])
def test_published_perflow_deltas(reflow, models, here, capsys, name):
    """Half precision, no metadata, a file or its folder: as delta_weights, or as a UNet's weights of some variant."""
    place, delta = models
    published = here / "published"
    published.mkdir()
    half = {key: tensor.half() for key, tensor in delta.items()}
    save_file(half, published / name, metadata={"format": "pt"})
    merge = ("merge", "--base", place / "sd15", "--dtype", "fp32", *PERFLOW)
    assert reflow(*merge, "--delta", published, "--out", "a") == 0
    said = capsys.readouterr().out
    assert f"{len(delta)} tensors merged, 0 of another shape kept, 0 in one model only." in said
    assert "The weights changed by " in said and "PiecewiseFlowScheduler" in said
    custom, got = load_file(place / "sd15" / UNET), load_file(here / "a" / UNET)
    assert all(torch.equal(got[key], custom[key] + half[key].float()) for key in custom)
    scheduler = PiecewiseFlowScheduler.from_pretrained(here / "a" / "scheduler")
    assert (len(scheduler.windows), scheduler.config.network_time) == (4, "perflow")
    if name.startswith("delta"):
        return
    (published / "diffusion_pytorch_model.v0-0.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="holds 2 variants .*v0-0.safetensors, .*give one of these files"):
        reflow(*merge, "--delta", published, "--out", "b")


def test_a_whole_pipeline_of_one_variant_merges_and_samples(reflow, models, here):
    """As PeRFlow's SDXL pipelines are published: every part has weights of the variant "v0-fix" alone."""
    place, delta = models
    shutil.copytree(place / "sd15", here / "plain")
    custom = load_file(place / "sd15" / UNET)
    tiny_pipelines.sd15().from_pretrained("plain").save_pretrained("fine-tune", variant="v0-fix")
    assert not list((here / "fine-tune").rglob("*_model.safetensors"))
    assert reflow("sample", "--model", "fine-tune", "--prompt", "abc", "--steps", 2, "--out", "drawn") == 0
    merge = ("merge", "--base", "fine-tune", "--delta", place / "delta.safetensors", "--dtype", "fp32")
    assert reflow(*merge, "--out", "fast") == 0
    again = tiny_pipelines.sd15().from_pretrained("fast")
    assert all(torch.equal(again.unet.state_dict()[key], custom[key] + delta[key]) for key in delta)
    names = {file.name for file in (here / "fast").rglob("*.safetensors")}
    assert names == {"diffusion_pytorch_model.safetensors", "model.safetensors"}


def test_an_inpainting_model_takes_the_delta_but_for_its_first_convolution(reflow, models, here, capsys):
    place, delta = models
    parts = tiny_pipelines.sd15().components
    parts["unet"] = tiny_pipelines.sd15_unet(in_channels=9)
    StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False).save_pretrained("inpaint")
    merge = ("merge", "--base", "inpaint", "--delta", place / "delta.safetensors", "--dtype", "fp32", "--out", "fast")
    with pytest.raises(UserError, match="1 of .* weights do not fit the delta in name or shape: conv_in.weight"):
        reflow(*merge)
    assert not (here / "fast").exists()
    with pytest.raises(UserError, match="allow names conv_out"):
        reflow(*merge, "--allow", "conv_in.weight", "--allow", "conv_out.*")
    assert reflow(*merge, "--allow", "conv_in.weight") == 0
    assert "1 of another shape kept" in capsys.readouterr().out
    got, want = load_file(here / "fast" / UNET), parts["unet"].state_dict()
    assert torch.equal(got["conv_in.weight"], want["conv_in.weight"])
    assert torch.equal(got["conv_out.weight"], want["conv_out.weight"] + delta["conv_out.weight"])
    assert type(StableDiffusionInpaintPipeline.from_pretrained("fast").unet.config.in_channels) is int
    assert json.loads((here / "fast/model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"


@pytest.mark.parametrize(
    "base, options, words",
    [
        ("sdxl", (), "weights do not fit the delta in name or shape"),
        ("v", (), "is a model with prediction_type 'v_prediction', and .* was made for one with 'epsilon'"),
        ("v", PERFLOW, "is a model with prediction_type 'v_prediction', and .* was made for one with 'epsilon'"),
        ("sd15", ("--prediction-type", "ddim_v"), "'epsilon', and .* made for one with 'ddim_v'"),
        ("sd15", ("--scale", "nan"), "merge scale is nan"),
        ("sd15", ("--scale", "100"), "would change the weights by .* %"),
        ("sd15", ("--steps", "2"), "num_inference_steps=2 is fewer than the 4 windows"),
        ("nowhere", (), "There is no folder or file"),
    ],
)
def test_what_does_not_fit_is_refused(reflow, models, here, base, options, words):
    place, _ = models
    with pytest.raises(UserError, match=words):
        reflow("merge", "--base", place / base, "--delta", place / "delta.safetensors", "--out", "out", *options)
    assert not list(here.iterdir())


def test_the_card_keeps_the_guidance_and_no_path(reflow, models, here):
    place, _ = models
    assert reflow("merge", "--base", place / "sd15", "--delta", place / "delta.safetensors", "--out", "fast") == 0
    card = (here / "fast" / "README.md").read_text()
    assert "guidance_scale=2.5" in card and "| guidance_scale of the teacher in training | 7.5 |" in card
    assert "The weights of sd15 plus 1 times the delta weights delta.safetensors." in card and str(place) not in card


def test_a_delta_that_is_not_here_or_no_safetensors(reflow, models, here):
    place, delta = models
    merge = ("merge", "--base", place / "sd15", *PERFLOW, "--out", "out", "--delta")
    with pytest.raises(UserError, match="There is no file or folder some/delta.* hf download some/delta --local-dir"):
        reflow(*merge, "some/delta")
    with pytest.raises(UserError, match="There is no file gone/delta.safetensors"):
        reflow(*merge, "gone/delta.safetensors")
    unet = tiny_pipelines.sd15_unet()
    unet.save_pretrained("pickled", safe_serialization=False)
    with pytest.raises(UserError, match="pickled holds diffusion_pytorch_model.bin and no .safetensors .* convert"):
        reflow(*merge, "pickled")
    with pytest.raises(UserError, match="model.bin is not a .safetensors file; .* convert"):
        reflow(*merge, "pickled/diffusion_pytorch_model.bin")
    (here / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no delta weights: expected delta_weights.safetensors or"):
        reflow(*merge, "empty")
    # Shards are one delta, and its first speaks for it.
    unet.load_state_dict(delta)
    unet.save_pretrained("shards", max_shard_size="400KB")
    assert len(list((here / "shards").glob("*.safetensors"))) > 1
    assert reflow(*merge, "shards") == 0


def test_a_place_that_cannot_be_made_is_one_sentence(reflow, models, here):
    place, _ = models
    (here / "file").write_text("")
    merge = ("merge", "--base", place / "sd15", "--delta", place / "delta.safetensors", "--out")
    with pytest.raises(UserError, match="file/in/out cannot be made: .*file is a file, not a folder"):
        reflow(*merge, "file/in/out")
    with pytest.raises(UserError, match="file/out.safetensors cannot be made: .*file is a file, not a folder"):
        write_state({}, "file/out.safetensors")
    with pytest.raises(UserError, match=r"(file/out\S* cannot be made|The folder file/out cannot be made)"):
        reflow("sample", "--model", place / "sd15", "--prompt", "abc", "--steps", 1, "--out", "file/out")


def test_a_whole_model_is_no_delta(reflow, models, here):
    place, _ = models
    merge = ("merge", "--base", place / "sd15", "--windows", 4, "--prediction-type", "ddim_eps", "--out", "out")
    with pytest.raises(UserError, match="it looks like the weights of a whole model"):
        reflow(*merge, "--delta", place / "v" / "unet")
    published = shutil.copytree(place / "v" / "unet", here / "unet")
    (published / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="damaged or cut short"):
        reflow(*merge, "--delta", published)
    assert [file.name for file in here.iterdir()] == ["unet"]
