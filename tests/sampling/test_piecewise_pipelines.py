"""PiecewiseFlowScheduler inside unmodified diffusers pipelines: saving, guidance, image to image, inpainting."""

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)

import tiny_pipelines
from reflow.errors import UserError
from reflow.sampling import PiecewiseFlowScheduler, guidance_callback, guidance_scales

SIZE = dict(height=64, width=64, output_type="np")


def seeded():
    return torch.Generator().manual_seed(5)


def students(name, request):
    pipe = copy.copy(request.getfixturevalue(name))  # other tests draw with the one that is shared
    pipe.scheduler = PiecewiseFlowScheduler.from_config(tiny_pipelines.ddim().config, num_time_windows=4)
    return pipe


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_saved_pipeline_loads_and_samples_the_same(name, request, tmp_path):
    pipe = students(name, request)
    before = pipe("abc", num_inference_steps=4, guidance_scale=3.0, generator=seeded(), **SIZE).images
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == [
        "reflow.sampling",
        "PiecewiseFlowScheduler",
    ]
    again = tiny_pipelines.quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(again.scheduler) is PiecewiseFlowScheduler and again.scheduler.config.prediction_type == "ddim_eps"
    # Weights read from a file lie at other addresses than those in memory, and some processors then round otherwise.
    after = again("abc", num_inference_steps=4, guidance_scale=3.0, generator=seeded(), **SIZE).images
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_four_steps_equal_stock_ddim_in_the_pipeline(name, request):
    pipe = students(name, request)
    call = dict(prompt="abc", num_inference_steps=4, guidance_scale=3.0, output_type="latent", height=64, width=64)
    ours = pipe(generator=seeded(), **call).images
    pipe.scheduler = tiny_pipelines.ddim(timestep_spacing="trailing")
    stock = pipe(generator=seeded(), **call).images
    assert (ours - stock).abs().max() <= 1e-5 * stock.abs().max()


def test_from_config_of_other_schedulers():
    for scheduler in (
        PNDMScheduler(**tiny_pipelines.BETAS, skip_prk_steps=True),
        LCMScheduler(**tiny_pipelines.BETAS),
        tiny_pipelines.ddim("v_prediction", rescale_betas_zero_snr=True),
    ):
        ours = PiecewiseFlowScheduler.from_config(scheduler.config, num_time_windows=2)
        assert ours.config.num_time_windows == 2 and ours.config.network_time == "index"
        assert ours.config.rescale_betas_zero_snr == scheduler.config.get("rescale_betas_zero_snr", False)
        assert (
            ours.config.prediction_type
            == {"epsilon": "ddim_eps", "v_prediction": "ddim_v"}[scheduler.config.prediction_type]
        )
        torch.testing.assert_close(ours.alphas_cumprod, scheduler.alphas_cumprod, rtol=0, atol=1e-7)


def test_published_perflow_configs_load(tmp_path):
    published = {
        "_class_name": "PeRFlowScheduler",
        "_diffusers_version": "0.21.4",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_time_windows": 4,
        "num_train_timesteps": 1000,
        "prediction_type": "ddim_eps",
        "set_alpha_to_one": False,
        "t_clean": 0,
        "t_noise": 1,
        "trained_betas": None,
    }
    (tmp_path / "scheduler_config.json").write_text(json.dumps(published))
    scheduler = PiecewiseFlowScheduler.from_pretrained(tmp_path)
    assert scheduler.config.network_time == "perflow" and scheduler.config.prediction_type == "ddim_eps"
    # The scheduler's first versions knew one eps mode, which later versions call diff_eps.
    assert (
        PiecewiseFlowScheduler.from_config({**published, "prediction_type": "epsilon"}).config.prediction_type
        == "diff_eps"
    )
    assert PiecewiseFlowScheduler.from_config(published, network_time="index").config.network_time == "index"
    scheduler.save_pretrained(tmp_path / "again")
    assert PiecewiseFlowScheduler.from_pretrained(tmp_path / "again").config.network_time == "perflow"
    assert PiecewiseFlowScheduler.from_config(scheduler.config).config.network_time == "perflow"


def test_perflow_time_reaches_the_network(sd15, monkeypatch):
    sd15 = copy.copy(sd15)
    sd15.scheduler = PiecewiseFlowScheduler(network_time="perflow")
    seen = []
    forward = sd15.unet.forward
    monkeypatch.setattr(
        sd15.unet,
        "forward",
        lambda sample, timestep, *a, **k: seen.append(float(timestep)) or forward(sample, timestep, *a, **k),
    )
    sd15("abc", num_inference_steps=5, guidance_scale=1.0, output_type="latent", height=64, width=64)
    assert seen == [1000, 875, 750, 500, 250]


@pytest.mark.parametrize(
    "name,kind", [("sd15", StableDiffusionImg2ImgPipeline), ("sdxl", StableDiffusionXLImg2ImgPipeline)]
)
def test_image_to_image(name, kind, request, monkeypatch):
    pipe = tiny_pipelines.quiet(kind.from_pipe(students(name, request)))
    image = torch.rand(1, 3, 64, 64, generator=seeded())
    seen = []
    step = PiecewiseFlowScheduler.step
    monkeypatch.setattr(
        PiecewiseFlowScheduler, "step", lambda s, o, t, *a, **k: seen.append(int(t)) or step(s, o, t, *a, **k)
    )
    call = dict(prompt="abc", image=image, guidance_scale=2.0, output_type="np", generator=seeded())
    for steps, strength, timesteps in [
        (4, 0.5, [499, 249]),
        (8, 0.4, [374, 249, 124]),
        (8, 0.2, [124]),
        (4, 1.0, [999, 749, 499, 249]),
    ]:
        seen.clear()
        assert np.isfinite(pipe(num_inference_steps=steps, strength=strength, **call).images).all()
        assert seen == timesteps
    with pytest.raises(UserError, match="at least 0.25"):
        pipe(num_inference_steps=4, strength=0.2, **call)


def test_inpainting_keeps_what_is_not_masked(sd15, request):
    pipe = tiny_pipelines.quiet(
        StableDiffusionInpaintPipeline(**students("sd15", request).components, requires_safety_checker=False)
    )
    image = torch.rand(1, 3, 64, 64, generator=seeded()) * 2 - 1
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    call = dict(
        prompt="abc",
        image=image,
        mask_image=mask,
        height=64,
        width=64,
        num_inference_steps=8,
        guidance_scale=2.0,
        output_type="latent",
    )
    latents = pipe(strength=0.5, generator=seeded(), **call).images
    clean = pipe.vae.encode(image).latent_dist.mean * pipe.vae.config.scaling_factor
    # Right half: the image's own latents (a sample of the posterior); left half: painted.
    right, left = (latents - clean)[..., 4:].abs().mean(), (latents - clean)[..., :4].abs().mean()
    spread = pipe.vae.encode(image).latent_dist.std.mean() * pipe.vae.config.scaling_factor
    assert right <= 2 * spread and left > 2 * right


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_guidance_changes_from_step_to_step(name, request, monkeypatch):
    pipe = students(name, request)
    inputs = ["latents", "prompt_embeds"] + (["add_text_embeds", "add_time_ids"] if name == "sdxl" else [])
    call = dict(prompt="abc", num_inference_steps=4, output_type="latent", height=64, width=64)

    def run(guidance, **more):
        return pipe(
            guidance_scale=guidance_scales(guidance, 4)[0],
            callback_on_step_end=guidance_callback(guidance, 4),
            generator=seeded(),
            **call,
            **more,
        ).images

    rows = []
    forward = pipe.unet.forward
    monkeypatch.setattr(
        pipe.unet, "forward", lambda sample, *a, **k: rows.append(len(sample)) or forward(sample, *a, **k)
    )
    constant = pipe(guidance_scale=3.0, generator=seeded(), **call).images
    torch.testing.assert_close(run([3.0]), constant, rtol=0, atol=1e-4)
    rows.clear()
    assert not torch.allclose(run("3,1.5"), constant)
    assert rows == [2, 2, 2, 2]
    rows.clear()
    mixed = run("3,1.5,1,1", callback_on_step_end_tensor_inputs=inputs)
    assert rows == [2, 2, 1, 1]  # no unconditional half once the scale is 1
    assert torch.isfinite(mixed).all()
    with pytest.raises(UserError, match="callback_on_step_end_tensor_inputs"):
        run("3,1")
