"""What a few-step model is used for, in unmodified diffusers pipelines: images from text, from images, into holes, with
ControlNet, IP-Adapter and LoRA. The model is a customised base with a student's delta merged in."""

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image
from safetensors.torch import save_file

import tiny_pipelines
from reflow.models import family
from reflow.sampling import PiecewiseFlowScheduler, guidance_callback, guidance_scales, initial_noise, sample
from reflow.weights.delta import make_delta, merge

IMG2IMG = {"sd15": StableDiffusionImg2ImgPipeline, "sdxl": StableDiffusionXLImg2ImgPipeline}
INPAINT = {"sd15": StableDiffusionInpaintPipeline, "sdxl": StableDiffusionXLInpaintPipeline}
CONTROLNET = {"sd15": StableDiffusionControlNetPipeline, "sdxl": StableDiffusionXLControlNetPipeline}
PAINTED = 4  # latent columns under the mask
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def moved(state, seed, size=0.02):
    g = seeded(seed)
    return {key: tensor + size * torch.randn(tensor.shape, generator=g) for key, tensor in state.items()}


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def fast(request):
    """(family, pipeline): a customised base with the delta of a student of the plain base merged in."""
    pipe = tiny_pipelines.quiet(getattr(tiny_pipelines, request.param)())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet = type(pipe.unet).from_config({**pipe.unet.config, "layers_per_block": 1}).eval()
    base = {key: tensor.clone() for key, tensor in pipe.unet.state_dict().items()}
    student, custom = moved(base, 1), moved(base, 2)
    merged, report = merge(custom, make_delta(base, student))
    assert len(report.matched) == len(base)
    for key in base:  # what plug-and-play promises: the custom model's own change and the student's, both
        both = student[key] + custom[key] - 2 * base[key]
        torch.testing.assert_close(merged[key] - base[key], both, atol=1e-6, rtol=0)
    pipe.unet.load_state_dict(merged)
    return request.param, pipe


def draw(pipe, steps=2, **call):
    """Latents by our scheduler, one step for each of ``steps`` windows."""
    pipe.scheduler = PiecewiseFlowScheduler.from_config(tiny_pipelines.ddim().config, num_time_windows=steps)
    return _draw(pipe, steps, call)


def _draw(pipe, steps, call):
    default = {"prompt": "abc", "guidance_scale": 3.0, "output_type": "latent", "generator": seeded()}
    return pipe(num_inference_steps=steps, **default | call).images


def both_schedulers(pipe, steps=2, **call):
    """The same call with our scheduler and with stock DDIM, which must agree. Returns ours."""
    ours = draw(pipe, steps, **call)
    pipe.scheduler = tiny_pipelines.ddim(timestep_spacing="trailing")
    stock = _draw(pipe, steps, call)
    assert (ours - stock).abs().max() <= 1e-5 * stock.abs().max()
    return ours


def differ(a, b):
    return (a - b).abs().max() > 1e-3 * b.abs().max()


SIZE = dict(height=64, width=64)


@pytest.fixture(scope="module")
def plain(fast):
    """The few-step model without anything added."""
    return both_schedulers(fast[1], **SIZE)


def test_text_to_image_on_a_customised_base(fast, plain):
    assert differ(plain, draw(fast[1], prompt="dog", **SIZE))
    both_schedulers(fast[1], 4, **SIZE)


def test_image_to_image(fast):
    name, pipe = fast
    pipe = tiny_pipelines.quiet(IMG2IMG[name].from_pipe(pipe))
    calls = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, args: calls.append(int(args[1])))
    try:
        half = both_schedulers(pipe, 4, image=PICTURE, strength=0.5)
        assert calls == 2 * [499, 249]  # two steps of four, from the third window's start, by either scheduler
        calls.clear()
        most = draw(pipe, 4, image=PICTURE, strength=0.75)
        assert calls == [749, 499, 249]
    finally:
        handle.remove()
    pixels = pipe.image_processor.preprocess(PICTURE)
    clean = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    distance = [(x - clean).pow(2).mean().sqrt() for x in (half, most)]
    assert distance[0] < distance[1]  # more strength, further from the picture


def mask():
    hole = torch.zeros(1, 1, 64, 64)
    hole[..., : 8 * PAINTED] = 1
    return hole


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting_keeps_what_is_not_masked(fast, channels):
    """By blending, with any UNet; and by a UNet of 9 channels, which takes a delta but for its first convolution."""
    name, pipe = fast
    parts = dict(pipe.components)
    if channels == 9:
        unet = type(pipe.unet).from_config({**pipe.unet.config, "in_channels": 9})
        state = {k: v.clone() for k, v in unet.state_dict().items()}
        plain = pipe.unet.state_dict()
        custom = {key: plain[key] if key != "conv_in.weight" else state[key] for key in state}
        delta = make_delta(plain, moved(plain, 3))
        merged, report = merge(custom, delta, allow=["conv_in.weight"])
        assert report.mismatched == ["conv_in.weight"]
        assert torch.equal(merged["conv_in.weight"], state["conv_in.weight"])
        unet.load_state_dict(merged)
        parts["unet"] = unet
    extra = {"requires_safety_checker": False} if name == "sd15" else {}
    paint = tiny_pipelines.quiet(INPAINT[name](**parts, **extra))
    call = dict(image=PICTURE, mask_image=mask(), strength=1.0, **SIZE)
    ours = both_schedulers(paint, **call)
    other = draw(paint, prompt="dog", **call)
    assert differ(ours[..., :PAINTED], other[..., :PAINTED])
    if channels == 4:
        # Outside the hole the latents are the picture's own, whatever is painted.
        torch.testing.assert_close(ours[..., PAINTED:], other[..., PAINTED:], rtol=1e-4, atol=1e-4)
        posterior = paint.vae.encode(paint.image_processor.preprocess(PICTURE)).latent_dist
        scale = paint.vae.config.scaling_factor
        off = (ours - posterior.mode() * scale)[..., PAINTED:].abs() / (posterior.std * scale)[..., PAINTED:]
        assert off.max() < 5  # one draw from the VAE's posterior


def test_controlnet(fast, plain):
    name, pipe = fast
    control = tiny_pipelines.quiet(CONTROLNET[name](**pipe.components, controlnet=tiny_pipelines.controlnet(pipe)))
    steered = both_schedulers(control, image=PICTURE, controlnet_conditioning_scale=1.0)
    off = draw(control, image=PICTURE, controlnet_conditioning_scale=0.0)
    torch.testing.assert_close(off, plain, rtol=1e-4, atol=1e-4)
    assert differ(steered, plain)
    assert differ(steered, draw(control, image=Image.new("RGB", (64, 64)), controlnet_conditioning_scale=1.0))
    # Steered in the first window only.
    early = both_schedulers(control, image=PICTURE, control_guidance_end=0.5)
    assert differ(early, steered) and differ(early, plain)


def test_ip_adapter(fast, plain, tmp_path):
    _, pipe = fast
    save_file(tiny_pipelines.ip_adapter(pipe.unet), tmp_path / "ip-adapter.safetensors")
    encoder, processor = tiny_pipelines.image_encoder()
    before = pipe.unet.attn_processors
    pipe.register_modules(image_encoder=encoder, feature_extractor=processor)
    try:
        names = dict(subfolder="", weight_name="ip-adapter.safetensors", image_encoder_folder=None)
        pipe.load_ip_adapter(str(tmp_path), **names)
        pipe.set_ip_adapter_scale(0.0)
        torch.testing.assert_close(draw(pipe, ip_adapter_image=PICTURE, **SIZE), plain, rtol=1e-4, atol=1e-4)
        pipe.set_ip_adapter_scale(1.0)
        shown = both_schedulers(pipe, ip_adapter_image=PICTURE, **SIZE)
        assert differ(shown, plain)
        assert differ(shown, draw(pipe, ip_adapter_image=PICTURE.rotate(90), **SIZE))
    finally:
        pipe.unload_ip_adapter()
        pipe.unet.set_attn_processor(before)
    torch.testing.assert_close(draw(pipe, **SIZE), plain, rtol=1e-4, atol=1e-4)


def test_a_lora_on_top(fast, plain, tmp_path):
    """A style LoRA of the base works on the few-step model as an added B A, and comes off again."""
    _, pipe = fast
    state = tiny_pipelines.lora(pipe.unet)
    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    try:
        styled = both_schedulers(pipe, **SIZE)
    finally:
        pipe.unload_lora_weights()
    assert differ(styled, plain)
    before = {key: tensor.clone() for key, tensor in pipe.unet.state_dict().items()}
    added = dict(before)
    for key in [key for key in state if key.endswith("lora_A.weight")]:
        name = key.removeprefix("unet.").removesuffix(".lora_A.weight")
        added[f"{name}.weight"] = before[f"{name}.weight"] + state[key.replace("lora_A", "lora_B")] @ state[key]
    pipe.unet.load_state_dict(added)
    torch.testing.assert_close(draw(pipe, **SIZE), styled, rtol=1e-3, atol=1e-3)
    pipe.unet.load_state_dict(before)
    torch.testing.assert_close(draw(pipe, **SIZE), plain, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def loaded(fast, tmp_path_factory):
    """The same model as a Base, for the plain loop."""
    name, pipe = fast
    folder = tmp_path_factory.mktemp("loaded")
    pipe.scheduler = tiny_pipelines.ddim()
    pipe.save_pretrained(folder)
    return family(name).load(folder)


def test_negative_prompts(fast, loaded):
    _, pipe = fast
    noise = initial_noise([7], loaded.latent_shape())
    avoided = both_schedulers(pipe, negative_prompt="dog", latents=noise, **SIZE)
    assert differ(avoided, draw(pipe, latents=noise, **SIZE))
    null = loaded.encode_prompts(["dog"])
    ours = sample(loaded, loaded.unet, ["abc"], 2, [7], windows=2, guidance_scale=3.0, null=null, decode=False)
    torch.testing.assert_close(ours.latents, avoided, rtol=1e-4, atol=1e-4)


def test_guidance_per_step_is_the_composition_of_its_steps(fast, loaded):
    """PeRFlow's dynamic guidance: step by step u + w (c - u), by hand, in our loop and in the pipeline."""
    name, pipe = fast
    scales = guidance_scales("7.5,4,1.5,1", 4)
    scheduler = PiecewiseFlowScheduler.from_config(tiny_pipelines.ddim().config, num_time_windows=4)
    scheduler.set_timesteps(4)
    z = noise = initial_noise([7], loaded.latent_shape())
    prompt, null = loaded.encode_prompts(["abc"]), loaded.null_conditioning()
    with torch.no_grad():
        for timestep, scale in zip(scheduler.timesteps, scales):
            outputs = []
            for told in (null, prompt):
                added = {"text_embeds": told.text_embeds, "time_ids": told.time_ids} if name == "sdxl" else None
                outputs.append(loaded.unet(z, timestep, told.encoder_hidden_states, added_cond_kwargs=added).sample)
            z = scheduler.step(outputs[0] + scale * (outputs[1] - outputs[0]), timestep, z).prev_sample
    ours = sample(loaded, loaded.unet, ["abc"], 4, [7], windows=4, guidance_scale=scales, decode=False)
    assert ours.evaluations == 7
    torch.testing.assert_close(ours.latents, z, rtol=1e-4, atol=1e-4)
    inputs = ["latents", "prompt_embeds"] + (["add_text_embeds", "add_time_ids"] if name == "sdxl" else [])
    dynamic = both_schedulers(
        pipe,
        4,
        guidance_scale=scales[0],
        callback_on_step_end=guidance_callback(scales, 4),
        callback_on_step_end_tensor_inputs=inputs,
        latents=noise,
        **SIZE,
    )
    torch.testing.assert_close(dynamic, z, rtol=1e-4, atol=1e-4)
    assert differ(dynamic, draw(pipe, 4, guidance_scale=7.5, latents=noise, **SIZE))
