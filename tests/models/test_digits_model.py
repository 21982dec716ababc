"""The committed digits model: stock diffusers loads it, it draws what is asked, and it stays small."""

import json
import subprocess
import sys

import pytest
import torch

from reflow.data import digits as data
from reflow.evaluation.classifier import accuracy, load_classifier
from reflow.experiments.digits_quality import ddim
from reflow.models import denoise, digits, family


@pytest.fixture(scope="module")
def base(device):
    return family("digits").load("builtin", device=device)


@pytest.fixture(scope="module")
def pipeline(device):
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(digits.BUILTIN).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_files_are_small_fp16_and_complete():
    from safetensors import safe_open

    files = [path for path in digits.BUILTIN.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 4_000_000
    assert sum(path.stat().st_size for path in files) < 8_000_000
    for path in digits.BUILTIN.rglob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            assert {weights.get_tensor(key).dtype for key in weights.keys()} == {torch.float16}, path
    for name in ("tokenizer", "tokenizer_2"):
        assert {"tokenizer.json", "vocab.json", "merges.txt"} <= {
            path.name for path in (digits.BUILTIN / name).iterdir()
        }


def test_every_part_of_sdxl_is_there(base):
    assert [type(encoder).__name__ for encoder in base.text_encoders] == [
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
    ]
    assert base.unet.config.addition_embed_type == "text_time"
    assert base.prediction_type == "epsilon"
    config = base.scheduler_config
    assert (config["beta_schedule"], config["beta_start"], config["beta_end"]) == ("scaled_linear", 0.00085, 0.012)
    assert config["num_train_timesteps"] == 1000
    assert base.latent_shape() == (4, 8, 8) and base.resolution == 16
    assert base.configs["pipeline"]["force_zeros_for_empty_prompt"] is False


def test_stock_diffusers_samples_it_without_reflow():
    code = (
        "import sys, torch; from diffusers import StableDiffusionXLPipeline as P; torch.set_num_threads(1);"
        f"pipe = P.from_pretrained({str(digits.BUILTIN)!r}); pipe.set_progress_bar_config(disable=True);"
        "a = pipe('a handwritten seven', num_inference_steps=4, guidance_scale=1.0, output_type='np').images;"
        "b = pipe('a handwritten seven', num_inference_steps=4, guidance_scale=3.0).images[0];"
        "assert a.shape == (1, 16, 16, 1) and b.size == (16, 16), (a.shape, b.size);"
        "assert 'reflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pipeline_and_family_agree(pipeline, base, device):
    """The family's text and UNet call, stepped by hand, give the pipeline's latents."""
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)
    prompts = ["a handwritten two", "the digit nine", "a handwritten 5"]
    pipe_latents = pipeline(
        prompts, num_inference_steps=4, guidance_scale=1.0, latents=noise.to(pipeline.dtype), output_type="latent"
    ).images
    text = base.encode_prompts(prompts)
    scheduler = type(pipeline.scheduler).from_config(base.scheduler_config)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    sample = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            sample = scheduler.step(denoise(base.unet, sample, t.expand(3).to(device), text), t, sample).prev_sample
    torch.testing.assert_close(sample, pipe_latents.float(), atol=1e-4, rtol=1e-4)


def test_measured_samples_are_those_of_the_pipeline(pipeline, base, device):
    """What the quality report measures is what a user of diffusers gets from the same noise."""
    labels = torch.tensor([3, 8, 1])
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)).to(device, pipeline.dtype)
    theirs = pipeline(
        data.prompts(labels), num_inference_steps=4, guidance_scale=1.0, latents=noise, output_type="pt"
    ).images
    ours = ddim(base, labels, 4, seed=2) / 2 + 0.5
    torch.testing.assert_close(ours, theirs.float().cpu(), atol=1e-4, rtol=0)


def test_tokens_of_captions_and_of_foreign_text(base):
    first, second = base.tokenizers
    for label in range(10):
        for sentence in data.captions(label):
            ids = first(sentence).input_ids
            assert len(ids) == len(sentence.split()) + 2, sentence  # one token a word
            assert first.decode(ids, skip_special_tokens=True).strip() == sentence
    # Text outside the captions must not contain an early end of text, where pooling would stop.
    foreign = "Zürich, 日本 & naïve?"
    for tokenizer in (first, second):
        ids = tokenizer(foreign).input_ids
        assert ids.index(tokenizer.eos_token_id) == len(ids) - 1
    for encoder, tokenizer in zip(base.text_encoders, base.tokenizers, strict=True):
        assert encoder.config.eos_token_id == tokenizer.eos_token_id != 2
        assert encoder.config.vocab_size == len(tokenizer)


def test_pooled_text_is_read_at_the_end_of_text(base):
    """Padding behind the end of text changes nothing; the words before it do."""
    ids = base.tokenizers[1](["a handwritten six"], padding="max_length", return_tensors="pt").input_ids.to(
        base.unet.device
    )
    other = ids.clone()
    other[:, 6:] = 17
    encoder = base.text_encoders[1]
    with torch.no_grad():
        torch.testing.assert_close(encoder(ids).text_embeds, encoder(other).text_embeds)
        ids[:, 3] = base.tokenizers[1].convert_tokens_to_ids("nine</w>")
        assert (encoder(ids).text_embeds - encoder(other).text_embeds).abs().max() > 1e-2


def test_null_prompt_is_the_encoded_empty_string(base):
    null, empty = base.null_conditioning(2), base.encode_prompts(["", ""])
    torch.testing.assert_close(null.encoder_hidden_states, empty.encoder_hidden_states)
    torch.testing.assert_close(null.text_embeds, empty.text_embeds)
    assert null.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    assert null.encoder_hidden_states.abs().max() > 0


def test_images_survive_the_vae_and_latents_have_unit_variance(base, device):
    images, labels = data.images()
    latents = base.encode_images(images.to(device))
    assert latents.shape == (1797, 4, 8, 8) and latents.dtype == torch.float32
    assert abs(latents.std().item() - 1) < 0.01 and abs(latents.mean().item()) < 0.01
    decoded = base.decode(latents).cpu()
    assert decoded.abs().max() <= 1
    assert (decoded - images).square().mean() < 2e-3
    assert accuracy(load_classifier(), decoded, labels) > 0.99


def check_accuracy(base, count, least):
    labels = data.balanced_labels(count)
    share = accuracy(load_classifier(), ddim(base, labels, 32, seed=5), labels)
    assert share >= least, f"the classifier reads the asked digit in {share:.1%} of {count} samples"


def test_it_draws_the_asked_digit(base):
    check_accuracy(base, 100, 0.93)


@pytest.mark.slow
def test_it_draws_the_asked_digit_in_95_of_100(base):
    check_accuracy(base, 2000, 0.95)


def test_it_says_how_it_was_trained():
    report = json.loads((digits.BUILTIN / "training.json").read_text())
    assert report["evaluation"]["accuracy"]["32"] >= 0.95
    assert {"settings", "machine", "seconds", "parameters"} <= set(report)
