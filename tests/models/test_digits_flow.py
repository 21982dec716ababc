"""The committed digits flow model: stock diffusers loads it as Stable Diffusion 3, it draws what is asked, it stays small."""

import json
import subprocess
import sys

import pytest
import torch

from reflow.data import digits as data
from reflow.evaluation.classifier import accuracy, load_classifier
from reflow.evaluation.metrics import paired_error
from reflow.experiments.digits_flow_quality import euler, grid, load
from reflow.experiments.digits_flow_teacher import standardised
from reflow.experiments.digits_training import all_token_ids
from reflow.models import digits_flow


@pytest.fixture(scope="module")
def parts(device):
    return load(digits_flow.BUILTIN, device)


@pytest.fixture(scope="module")
def pipeline(device):
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(digits_flow.BUILTIN, text_encoder_3=None, tokenizer_3=None).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_files_are_small_fp16_and_complete():
    from safetensors import safe_open

    files = [path for path in digits_flow.BUILTIN.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert {path.parent.name for path in weights} == set(digits_flow.NETWORKS)
    for path in weights:
        with safe_open(path, "pt") as opened:
            assert {opened.get_tensor(key).dtype for key in opened.keys()} == {torch.float16}, path
    assert not any("_name_or_path" in path.read_text() for path in files if path.name == "config.json")
    for name in ("tokenizer", "tokenizer_2"):
        assert {"tokenizer.json", "vocab.json", "merges.txt"} <= {path.name for path in (digits_flow.BUILTIN / name).iterdir()}


def test_committed_parts_are_those_that_the_script_builds(parts):
    """Classes, configs, names and shapes; of the VAE's config all but what is measured."""
    built = digits_flow.new_parts()
    assert {name for name, part in parts.items() if part is not None} == {name for name, part in built.items() if part is not None}
    for name in digits_flow.NETWORKS:
        assert type(parts[name]) is type(built[name])
        assert {k: v.shape for k, v in parts[name].state_dict().items()} == {k: v.shape for k, v in built[name].state_dict().items()}
    for name in ("transformer", "vae", "scheduler"):
        ours, theirs = (
            {k: list(v) if isinstance(v, tuple) else v for k, v in part.config.items() if not k.startswith("_") and k not in ("shift_factor", "scaling_factor")}
            for part in (built[name], parts[name])
        )
        assert ours == theirs
    for name in ("text_encoder", "text_encoder_2"):
        for key in ("hidden_size", "projection_dim", "num_hidden_layers", "hidden_act", "eos_token_id", "pad_token_id", "vocab_size"):
            assert getattr(parts[name].config, key) == getattr(built[name].config, key), (name, key)
    assert parts["scheduler"].config.shift > 1 and parts["vae"].quant_conv is None and parts["vae"].post_quant_conv is None


def test_stock_diffusers_samples_it_without_reflow():
    code = (
        "import sys, torch, numpy; from diffusers import StableDiffusion3Pipeline as P; torch.set_num_threads(1);"
        f"pipe = P.from_pretrained({str(digits_flow.BUILTIN)!r}, text_encoder_3=None, tokenizer_3=None); pipe.set_progress_bar_config(disable=True);"
        "a = pipe('a handwritten seven', num_inference_steps=4, guidance_scale=1.0, output_type='np').images;"
        "b = pipe('a handwritten seven', num_inference_steps=4, guidance_scale=3.0).images[0];"
        "assert a.shape == (1, 16, 16, 1) and numpy.isfinite(a).all() and b.size == (16, 16), (a.shape, b.size);"
        "assert 'reflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_measured_samples_are_those_of_the_pipeline(pipeline, parts, device, guidance):
    """What the quality report measures is what a user of diffusers gets from the same noise and times, 256 zeros for T5 included."""
    labels = torch.tensor([3, 8, 1])
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)).to(device)
    theirs = pipeline(
        data.prompts(labels), sigmas=[1, 0.75, 0.5, 0.25], num_inference_steps=4, guidance_scale=guidance, latents=noise, output_type="pt"
    ).images
    ours = euler(parts, labels, 4, seed=2, guidance=guidance) / 2 + 0.5
    torch.testing.assert_close(ours, theirs.float().cpu(), atol=2e-4, rtol=0)


def test_one_token_stands_for_many_equal_ones(parts, device):
    transformer = parts["transformer"]
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator).to(device)
    ids = [tokens[[5, 40]] for tokens in all_token_ids(parts, device)]
    time = torch.tensor([900.0, 300.0], device=device)
    plain = transformer.attn_processors
    with torch.no_grad():
        states, pooled = digits_flow.encode_text(parts, ids, missing=7)
        assert states.shape == (2, 23, 128) and not states[:, 16:].any() and not states[:, :, 64:].any()
        many = transformer(sample, states, pooled, time, return_dict=False)[0]
        try:
            transformer.set_attn_processor(digits_flow.OneForMany(7))
            one = transformer(sample, digits_flow.encode_text(parts, ids)[0], pooled, time, return_dict=False)[0]
            transformer.set_attn_processor(digits_flow.OneForMany(1))
            unweighted = transformer(sample, digits_flow.encode_text(parts, ids)[0], pooled, time, return_dict=False)[0]
        finally:
            transformer.set_attn_processor(plain)
    torch.testing.assert_close(one, many, atol=1e-5, rtol=1e-5)
    assert (unweighted - many).abs().max() > 1e-4


def test_text_and_pooled_are_those_of_the_pipeline(pipeline, parts, device):
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(data.caption(4), None, None, do_classifier_free_guidance=False, max_sequence_length=9)
        ours, ours_pooled = digits_flow.encode_text(parts, [ids[4 * len(data.TEMPLATES)][None] for ids in all_token_ids(parts, device)], missing=9)
    torch.testing.assert_close(ours, states.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours_pooled, pooled.float(), atol=1e-5, rtol=1e-5)


def test_images_survive_the_vae_and_the_shift_counts(parts, device):
    images, labels = data.images()
    vae = parts["vae"]
    latents = standardised(vae, images.to(device))
    assert latents.shape == (1797, 4, 8, 8)
    assert abs(latents.mean().item()) < 0.02 and abs(latents.std().item() - 1) < 0.02
    assert abs(vae.config.shift_factor * vae.config.scaling_factor) > 0.1  # whoever forgets it is off by more than a tenth of a deviation
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample.cpu().clamp(-1, 1)
    assert (decoded - images).square().mean() < 3e-3
    assert accuracy(load_classifier(), decoded, labels) > 0.99


def test_times_of_the_grid():
    assert grid(2, 1.0) == [1, 0.5, 0]
    assert grid(4, 3.0) == pytest.approx([1, 0.9, 0.75, 0.5, 0])


def test_it_draws_the_digit_asked_for_and_few_steps_are_not_enough(parts):
    labels = data.balanced_labels(100)
    images = {steps: euler(parts, labels, steps) for steps in (16, 4, 2)}
    assert accuracy(load_classifier(), images[16], labels) > 0.9
    errors = [paired_error(images[steps], images[16]).mean().item() for steps in (4, 2)]
    assert 0.04 < errors[0] < errors[1]


def test_the_number_of_zeros_in_place_of_t5_matters_little(parts):
    labels = data.balanced_labels(100)
    few, many = (euler(parts, labels, 8, missing=count) for count in (16, 256))
    assert accuracy(load_classifier(), few, labels) > 0.9
    assert paired_error(few, many).mean() < 0.03


def test_the_report_is_of_this_script():
    report = json.loads((digits_flow.BUILTIN / "training.json").read_text())
    assert report["command"] == "python -m reflow.experiments.digits_flow_teacher" and "out" not in report["settings"]
    built = digits_flow.new_parts()
    assert report["parameters"] == {name: sum(p.numel() for p in built[name].parameters()) for name in digits_flow.NETWORKS}
