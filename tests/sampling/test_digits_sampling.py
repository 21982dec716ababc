"""The committed digits model through the sampling room: a trained network, so pictures can be judged."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from reflow.data import digits
from reflow.evaluation.classifier import accuracy, load_classifier
from reflow.models import family
from reflow.sampling import PiecewiseFlowScheduler, initial_noise, sample, sample_teacher


@pytest.fixture(scope="module")
def base():
    return family("digits").load("builtin")


@pytest.fixture(scope="module")
def judge():
    return load_classifier()


LABELS = torch.arange(10).repeat(5)


def test_the_teacher_draws_what_is_asked(base, judge):
    samples = sample_teacher(base, base.unet, digits.prompts(LABELS), 12, range(len(LABELS)), batch_size=25)
    assert samples.images.shape == (50, 1, 16, 16) and samples.images.abs().max() <= 1
    assert accuracy(judge, samples.images, LABELS) >= 0.9


def test_an_untrained_student_is_few_step_ddim_of_its_base(base):
    """Eight windows and eight steps before any training: DDIM of the base, in our loop and in the stock pipeline."""
    prompts, seeds = digits.prompts(LABELS[:10]), range(10)
    ours = sample(base, base.unet, prompts, 8, seeds, windows=8)
    teacher = sample_teacher(base, base.unet, prompts, 8, seeds)
    torch.testing.assert_close(ours.latents, teacher.latents, rtol=1e-4, atol=1e-4)
    pipe = StableDiffusionXLPipeline.from_pretrained(base.path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler) is DDIMScheduler
    call = dict(num_inference_steps=8, guidance_scale=1.0, latents=initial_noise(seeds, base.latent_shape()))
    stock = pipe(prompts, output_type="pt", **call).images
    assert (ours.images / 2 + 0.5 - stock).abs().max() <= 2e-3
    pipe.scheduler = PiecewiseFlowScheduler.from_config(pipe.scheduler.config, num_time_windows=8)
    flow = pipe(prompts, output_type="pt", **call).images
    assert (flow - stock).abs().max() <= 2e-3


def test_guidance_of_the_digits_model(base, judge):
    prompts = digits.prompts(LABELS)
    guided = sample(base, base.unet, prompts, 8, range(50), windows=8, guidance_scale="3,3,2,1")
    assert guided.evaluations == 11
    assert accuracy(judge, guided.images, LABELS) >= 0.9
