"""Exporting a student of the committed digits model, and its delta."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

from reflow.errors import UserError
from reflow.export import export_folder, export_single_file
from reflow.flow import Windows
from reflow.models import family
from reflow.models.digits import BUILTIN
from reflow.sampling import initial_noise, sample
from reflow.weights.delta import merge, student_metadata, student_settings, write_delta
from reflow.weights.files import read_state


@pytest.fixture(scope="module")
def student():
    state = {key: tensor.float() for key, tensor in read_state(BUILTIN).items()}
    g = torch.Generator().manual_seed(0)
    return {key: tensor + 1e-3 * torch.randn(tensor.shape, generator=g) for key, tensor in state.items()}


def test_the_exported_folder_is_a_base_again(student, tmp_path):
    export = export_folder(BUILTIN, student, tmp_path / "out", windows=4, dtype="fp32", card={"data": "1,797 scans"})
    assert export.stock
    base = family("digits").load(tmp_path / "out")
    assert all(torch.equal(tensor, student[key]) for key, tensor in base.unet.state_dict().items())
    ours = sample(base, base.unet, ["a seven"] * 3, 4, [0, 1, 2], windows=4)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    noise = initial_noise([0, 1, 2], base.latent_shape())
    stock = pipe(["a seven"] * 3, num_inference_steps=4, guidance_scale=1.0, latents=noise, output_type="pt").images
    assert (ours.images / 2 + 0.5 - stock).abs().max() <= 2e-3


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_the_pipeline_loads_without_a_dtype_and_samples_the_student(student, tmp_path, dtype):
    export_folder(BUILTIN, student, tmp_path / "out", windows=2, dtype=dtype)
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    parts = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert {part.dtype for part in parts} == {torch.float32}
    base = family("digits").load()
    stored = torch.float16 if dtype == "fp16" else torch.float32
    base.unet.load_state_dict({key: tensor.to(stored) for key, tensor in student.items()})
    want = sample(base, base.unet, ["a handwritten seven"] * 2, 2, [0, 1], windows=2).images / 2 + 0.5
    noise = initial_noise([0, 1], base.latent_shape())
    got = pipe(
        ["a handwritten seven"] * 2, num_inference_steps=2, guidance_scale=1.0, latents=noise, output_type="pt"
    ).images
    assert (got - want).abs().max() <= 1e-4


def test_the_exported_weights_say_how_they_are_sampled(student, tmp_path):
    export_folder(BUILTIN, student, tmp_path / "out", windows=2)
    file = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"
    assert student_settings(file) == {
        "windows": Windows.uniform(2),
        "prediction_type": "ddim_eps",
        "network_time": "index",
    }


def test_the_delta_rebuilds_the_student_and_says_how_to_export_it(student, tmp_path):
    metadata = student_metadata(Windows.uniform(2), "ddim_eps")
    path = write_delta(BUILTIN, student, tmp_path / "delta.safetensors", metadata=metadata)
    merged, report = merge(BUILTIN, path)
    # The committed base is fp16, and merged weights keep its dtype.
    assert all(torch.equal(merged[key], student[key].half()) for key in student) and len(report.matched) == len(student)
    assert export_folder(BUILTIN, merged, tmp_path / "out", **student_settings(path)).stock


def test_digits_have_no_single_file(student, tmp_path):
    with pytest.raises(UserError, match="two text encoders of one width"):
        export_single_file(BUILTIN, student, tmp_path / "digits.safetensors")


@pytest.mark.parametrize("name", ["digits", "digits-flow"])
def test_the_card_loads_and_samples_as_it_stands(name, tmp_path, monkeypatch):
    """The flow's base has no third text encoder, which from_pretrained must be told."""
    base = family(name).load(parts=("unet",))
    flow = name == "digits-flow"
    monkeypatch.chdir(tmp_path)
    export_folder(base, base.unet.state_dict(), "out", windows=2, network_time="flow" if flow else None, card={"guidance": 2.0})
    code = re.search(r"```python\n(.*?)```", Path("out/README.md").read_text(), re.S)[1]
    assert ('from_pretrained("out", text_encoder_3=None, tokenizer_3=None)' in code) == flow
    assert ('from_pretrained("out")' in code) != flow
    said: dict = {}
    exec(code, said)
    assert said["image"].size == (16, 16)
    if flow:
        with pytest.raises(ValueError, match="only .* were passed"):
            DiffusionPipeline.from_pretrained("out")
