"""The plain sampling loop against diffusers' own pipelines, and what evaluation relies on: seeds, batches, guidance."""

import pytest
import torch

import tiny_pipelines
from reflow.errors import UserError
from reflow.flow import Windows, index
from reflow.models import denoise, family
from reflow.sampling import PiecewiseFlowScheduler, initial_noise, sample, sample_teacher

PROMPTS = ["abc", "a dog", "abc"]
SEEDS = [3, 4, 5]


@pytest.fixture(scope="module", autouse=True)
def full_precision():
    """TF32 convolutions round differently in different batches."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def both(request, tmp_path_factory, device):
    """(pipeline, Base) of the same folder, on the device under test."""
    folder = tmp_path_factory.mktemp(request.param)
    pipe = tiny_pipelines.quiet(getattr(tiny_pipelines, request.param)())
    pipe.save_pretrained(folder)
    return pipe.to(device), family(request.param).load(folder, device=device)


def close(got, want, tolerance=1e-5):
    assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_student_equals_the_pipeline(both, guidance):
    pipe, base = both
    pipe.scheduler = PiecewiseFlowScheduler.for_student(base.scheduler_config, 2)
    noise = initial_noise(SEEDS, base.latent_shape()).to(pipe.device)
    got = sample(base, base.unet, PROMPTS, 5, SEEDS, windows=2, guidance_scale=guidance)
    call = dict(prompt=PROMPTS, num_inference_steps=5, guidance_scale=guidance, latents=noise, height=64, width=64)
    close(got.latents, pipe(output_type="latent", **call).images)
    images = pipe(output_type="pt", **call).images
    torch.testing.assert_close(got.images / 2 + 0.5, images, rtol=0, atol=1e-4)
    assert got.evaluations == (5 if guidance == 1 else 10)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_teacher_equals_stock_ddim_where_steps_divide_1000(both, guidance):
    pipe, base = both
    pipe.scheduler = tiny_pipelines.ddim(timestep_spacing="trailing")
    got = sample_teacher(base, base.unet, PROMPTS, 10, SEEDS, guidance_scale=guidance, decode=False)
    want = pipe(
        PROMPTS,
        num_inference_steps=10,
        guidance_scale=guidance,
        latents=initial_noise(SEEDS, base.latent_shape()).to(pipe.device),
        height=64,
        width=64,
        output_type="latent",
    ).images
    close(got.latents, want)
    assert got.images is None and got.evaluations == (10 if guidance == 1 else 20)


def test_teacher_steps_that_do_not_divide_1000(both):
    _, base = both
    seen = []
    handle = base.unet.register_forward_pre_hook(lambda module, args: seen.append(int(args[1][0])))
    try:
        got = sample_teacher(base, base.unet, ["abc"], 32, [0], decode=False)
        assert seen == [index(1 - i / 32) for i in range(32)] and got.evaluations == 32
        seen.clear()
        heun = sample_teacher(base, base.unet, ["abc"], 3, [0], method="heun", decode=False)
        assert len(seen) == heun.evaluations == 6
    finally:
        handle.remove()
    assert torch.isfinite(got.latents).all() and torch.isfinite(heun.latents).all()


def test_a_sample_does_not_depend_on_its_batch(both):
    _, base = both
    whole = sample(base, base.unet, PROMPTS, 2, SEEDS, windows=2, guidance_scale=2.0)
    parts = sample(base, base.unet, PROMPTS, 2, SEEDS, windows=2, guidance_scale=2.0, batch_size=2)
    alone = sample(base, base.unet, PROMPTS[1:2], 2, SEEDS[1:2], windows=2, guidance_scale=2.0)
    close(parts.latents, whole.latents)
    close(alone.latents[0], whole.latents[1])
    close(parts.images, whole.images, 1e-4)
    assert not torch.allclose(whole.latents[0], whole.latents[2], atol=1e-3)  # same prompt, other seed


def test_guidance_schedule_and_rows(both):
    _, base = both
    rows = []
    handle = base.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        got = sample(base, base.unet, PROMPTS[:1], 4, SEEDS[:1], windows=4, guidance_scale="3,1.5,1", decode=False)
        assert rows == [2, 2, 1, 1] and got.evaluations == 6
        rows.clear()
        sample_teacher(base, base.unet, PROMPTS[:1], 4, SEEDS[:1], decode=False)
        assert rows == [1, 1, 1, 1]
    finally:
        handle.remove()


def test_ready_conditioning_noise_and_scheduler(both):
    _, base = both
    noise = initial_noise(SEEDS, base.latent_shape())
    text = sample(
        base, base.unet, PROMPTS, 4, SEEDS, windows=Windows((1.0, 0.5, 0.25, 0.0)), guidance_scale=2.0, decode=False
    )
    ready = sample(
        base,
        base.unet,
        base.encode_prompts(PROMPTS),
        4,
        [0, 0, 0],
        noise=noise,
        null=base.null_conditioning(1),
        guidance_scale=2.0,
        scheduler=PiecewiseFlowScheduler.for_student(base.scheduler_config, Windows((1.0, 0.5, 0.25, 0.0))),
        decode=False,
    )
    close(ready.latents, text.latents)


def test_prediction_type_and_network_time_reach_the_network(both):
    _, base = both
    seen = []
    handle = base.unet.register_forward_pre_hook(lambda module, args: seen.append(args[1].tolist()))
    try:
        a = sample(base, base.unet, ["abc"], 2, [0], windows=2, network_time="perflow", decode=False)
    finally:
        handle.remove()
    assert seen == [[1000.0], [500.0]]
    b = sample(
        base, base.unet, ["abc"], 2, [0], windows=2, network_time="perflow", prediction_type="velocity", decode=False
    )
    z = initial_noise([0], base.latent_shape()).to(b.latents.device)
    with torch.no_grad():
        for t in (1000.0, 500.0):
            z = z - 0.5 * denoise(base.unet, z, torch.tensor([t], device=z.device), base.encode_prompts(["abc"]))
    close(b.latents, z)
    assert not torch.allclose(a.latents, b.latents, atol=1e-2)


def test_half_precision_network_keeps_an_fp32_state(both, tmp_path):
    pipe, base = both
    pipe.save_pretrained(tmp_path)
    half = base.family.load(tmp_path, device=pipe.device, dtype=torch.bfloat16)
    got = sample(half, half.unet, PROMPTS, 4, SEEDS, windows=4, decode=False)
    assert got.latents.dtype == torch.float32
    close(got.latents, sample(base, base.unet, PROMPTS, 4, SEEDS, windows=4, decode=False).latents, 0.1)


@pytest.mark.parametrize(
    "call,word",
    [
        (dict(steps=1, windows=2), "fewer than the 2 windows"),
        (dict(steps=2, windows=2, seeds=[1]), "3 prompts and 1 seeds"),
        (dict(steps=2, windows=2, seeds=[], prompts=[]), "Nothing to sample"),
        (dict(steps=2, windows=2, guidance_scale="7,7,7"), "3 values for 2 steps"),
        (dict(steps=2, windows=2, resolution=60), "multiple of"),
    ],
)
def test_mistakes(both, call, word):
    _, base = both
    arguments = {"prompts": PROMPTS, "seeds": SEEDS, **call}
    with pytest.raises(UserError, match=word):
        sample(base, base.unet, **arguments)


def test_too_many_teacher_steps(both):
    _, base = both
    with pytest.raises(UserError, match="fewer steps"):
        sample_teacher(base, base.unet, PROMPTS, 1500, SEEDS)
