"""Qwen-Image and Z-Image: text, images and samples as their own pipelines have them, and what training needs of them."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import tiny_flows
from reflow.export.card import model_card
from reflow.export.trial import choose
from reflow.flow import Windows
from reflow.models.conditioning import denoise
from reflow.models.flows.base import packed, unpacked
from reflow.models.flows.qwen_image import rescaled
from reflow.models.lora import STUDENT, Adapters, Student, View
from reflow.models.registry import family_of
from reflow.models.switches import compile_blocks
from reflow.sampling import sample, sample_teacher, scheduler_for
from reflow.training.solves import Solver

PROMPTS = ("a cat", "a dog that is told of at length")  # of two lengths; a tuple, since a pipeline writes into its list
SIDE = 32
NAMES = {"qwen_image": "qwen-image", "z_image": "z-image"}


@pytest.fixture(scope="module", params=list(NAMES))
def saved(request, tmp_path_factory):
    """A tiny pipeline of the real classes, saved, and read as a base."""
    folder = tmp_path_factory.mktemp(request.param)
    pipe = getattr(tiny_flows, request.param)()
    pipe.save_pretrained(folder)
    family, found = family_of(folder)
    return SimpleNamespace(pipe=pipe, base=family.load(found), family=family, name=request.param)


def test_a_saved_folder_is_read_as_its_family(saved):
    base = saved.base
    assert saved.family.name == NAMES[saved.name]
    assert (base.resolution, base.latent_shape(SIDE), base.cell) == (256, (4, 16, 16), 4)
    # Of 1024 pixels: e^mu of Qwen-Image's line through 256 and 8192 tokens, Z-Image's static one.
    assert base.shift(4 * 64) == pytest.approx(2.0008 if saved.name == "qwen_image" else 3.0, abs=1e-4)


def test_rows_are_the_pipelines_own_text_padded(saved):
    rows, null = saved.base.encode_prompts(PROMPTS), saved.base.null_conditioning(2)
    if saved.name == "qwen_image":
        states, mask = saved.pipe.encode_prompt(list(PROMPTS))
        captions = [state[keep.bool()] for state, keep in zip(states, mask, strict=True)]
        nothing = saved.pipe.encode_prompt(" ")[0][0]
    else:
        captions, (nothing, _) = saved.pipe.encode_prompt(list(PROMPTS), negative_prompt=["", ""])
    (text, mask), (empty, there) = rows.tensors, null.tensors
    assert len(captions[0]) < len(captions[1])
    for row, keep, want in [*zip(text, mask, captions, strict=True), (empty[0], there[0], nothing), (empty[1], there[1], nothing)]:
        assert keep.sum() == len(want) and set(keep.tolist()) == {0.0, 1.0}
        torch.testing.assert_close(row[: len(want)], want)
        assert not row[len(want) :].any()


def test_example_rows_are_those_of_real_ones(saved):
    real = saved.base.encode_prompts(["a"])
    assert {name: tuple(rows.shape[1:]) for name, rows in real.rows.items()} == saved.base.example_rows()
    example = saved.base.example(torch.bfloat16)
    assert example.call == real.call and list(example.rows) == list(real.rows) and example.tensors[0].dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["unguided", "guided"])
def test_samples_are_the_pipelines(saved, scale):
    ours = sample(saved.base, saved.base.unet, PROMPTS, 4, [1, 2], windows=4, resolution=SIDE, guidance_scale=scale)
    last = {}

    def keep(pipe, i, t, given):
        last.update(given)
        return {}

    asked = saved.base.pipeline_call(scale)
    if "negative_prompt" in asked:
        asked["negative_prompt"] = [asked["negative_prompt"]] * 2
    saved.pipe.scheduler = scheduler_for(saved.base, 4)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    images = saved.pipe(list(PROMPTS), num_inference_steps=4, height=SIDE, width=SIDE, generator=generators, callback_on_step_end=keep,
                        output_type="pt", **asked)[0]  # fmt: skip
    latents = unpacked(last["latents"], 16, 16) if saved.name == "qwen_image" else last["latents"]
    torch.testing.assert_close(ours.latents, latents, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours.images / 2 + 0.5, images, atol=2e-5, rtol=1e-4)


def test_guidance_counts_and_the_teacher_has_it_too(saved):
    """One step of the guided teacher from noise is the pipeline's guided step: the solver and the sampler guide alike."""
    teacher = sample_teacher(saved.base, saved.base.unet, PROMPTS, 2, [1, 2], guidance_scale=3.0, resolution=SIDE, decode=False)
    shift = saved.base.shift(SIDE)
    student = sample(saved.base, saved.base.unet, PROMPTS, 2, [1, 2], windows=Windows.shifted(2, shift), resolution=SIDE, guidance_scale=3.0,
                     decode=False)  # fmt: skip
    plain = sample_teacher(saved.base, saved.base.unet, PROMPTS, 2, [1, 2], resolution=SIDE, decode=False)
    torch.testing.assert_close(teacher.latents, student.latents, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(teacher.latents, plain.latents, atol=1e-3)


def test_what_is_padded_is_not_seen(saved):
    base, g = saved.base, torch.Generator().manual_seed(0)
    rows = base.encode_prompts(PROMPTS)
    z, t = torch.randn(2, *base.latent_shape(SIDE), generator=g), torch.tensor([700.0, 300.0])
    text, mask = rows.rows
    changed = rows.with_rows(**{text: torch.where(rows.rows[mask][..., None].bool(), rows.rows[text], 7.0)})
    with torch.no_grad():
        torch.testing.assert_close(denoise(base.unet, z, t, changed), denoise(base.unet, z, t, rows), atol=1e-5, rtol=1e-4)
        alone = denoise(base.unet, z[:1], t[:1], rows.select(slice(0, 1)))
        torch.testing.assert_close(alone, denoise(base.unet, z, t, rows)[:1], atol=1e-5, rtol=1e-4)


def test_images_are_encoded_and_decoded_as_the_pipelines_vae_has_it(saved):
    vae, g = saved.pipe.vae, torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, SIDE, 16, generator=g) * 2 - 1
    latents = saved.base.encode_images(pixels)
    with torch.no_grad():
        if saved.name == "qwen_image":
            mean, std = (torch.tensor(vae.config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
            want = (vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std
            images = vae.decode((want * std + mean)[:, :, None]).sample[:, :, 0]
        else:
            scale, shift = vae.config.scaling_factor, vae.config.shift_factor
            want = (vae.encode(pixels).latent_dist.mode() - shift) * scale
            images = vae.decode(want / scale + shift).sample
    torch.testing.assert_close(latents, want)
    torch.testing.assert_close(saved.base.decode(latents), images.clamp(-1, 1), atol=1e-5, rtol=1e-4)
    drawn = saved.base.encode_images(pixels, torch.Generator().manual_seed(3))
    assert drawn.shape == latents.shape and not torch.equal(drawn, latents)


def losses_and_gradients(saved, network, parameters, call):
    rows, g = saved.base.encode_prompts(PROMPTS), torch.Generator().manual_seed(0)
    z, target = (torch.randn(2, *saved.base.latent_shape(SIDE), generator=g) for _ in "ab")
    output = call(network, z, torch.tensor([900.0, 400.0]), rows)
    loss = torch.nn.functional.mse_loss(output, target)
    loss.backward()
    return loss, {name for name, p in parameters if p.grad is not None and bool(p.grad.abs().sum() > 0)}


def plain_call(saved):
    """The network asked as its pipeline asks it, without any of ours."""

    def call(network, z, t, rows):
        (text, mask), count = rows.tensors, rows.tensors[1].sum(1).long()
        if saved.name == "z_image":
            output = network([one[:, None] for one in z], 1 - t / 1000, [one[:n] for one, n in zip(text, count, strict=True)], return_dict=False)[0]
            return -torch.stack(output)[:, :, 0]
        longest = int(count.max())
        output = network(packed(z), text[:, :longest], mask[:, :longest], t / 1000, [[(1, 8, 8)]] * 2, return_dict=False)[0]
        return unpacked(output, 16, 16)

    return call


def test_a_step_trains_what_a_plain_pass_trains(saved):
    network = saved.base.unet
    found = []
    for call in (denoise, plain_call(saved)):
        network.requires_grad_(True).zero_grad()
        found.append(losses_and_gradients(saved, network, list(network.named_parameters()), call))
    network.requires_grad_(False).zero_grad()
    (loss, trained), (want, there) = found
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-4)
    assert torch.isfinite(loss) and trained == there and len(trained) > 40


def test_an_adapter_trains_and_switched_off_is_the_base(saved):
    family, folder = family_of(saved.base.path)
    network = family.load(folder, parts=("unet",)).unet
    adapters = Adapters(network, 2, ["to_q", "to_k", "to_v", "to_out.0"])
    student = Student(adapters)
    loss, trained = losses_and_gradients(saved, student, list(student.named_parameters()), denoise)
    assert torch.isfinite(loss) and trained == {name for name, _ in student.named_parameters() if "lora_B" in name}
    z, rows = torch.randn(2, *saved.base.latent_shape(SIDE)), saved.base.encode_prompts(PROMPTS)
    with torch.no_grad():
        base = denoise(saved.base.unet, z, torch.tensor([500.0, 10.0]), rows)
        assert torch.equal(denoise(View(adapters), z, torch.tensor([500.0, 10.0]), rows), base)
        assert torch.equal(denoise(View(adapters, STUDENT), z, torch.tensor([500.0, 10.0]), rows), base)


def test_every_token_keeps_its_norm():
    g = torch.Generator().manual_seed(0)
    null, prompt = torch.randn(2, 2, 5, 16, generator=g)
    first, second = rescaled(torch.cat([null, prompt]), torch.tensor([4.0, 1.0, 4.0, 1.0])[:, None]).chunk(2)
    assert torch.equal(first, second)
    torch.testing.assert_close(first.norm(dim=-1), prompt.norm(dim=-1))
    torch.testing.assert_close(first[1], prompt[1])
    assert torch.nn.functional.cosine_similarity(first[0], null[0] + 4 * (prompt[0] - null[0]), dim=-1).min() > 0.9999


def test_who_guides_for_itself_is_told_the_scale(saved):
    """In training too: the teacher's rows of a batch."""
    rows, null = saved.base.encode_prompts(PROMPTS), saved.base.null_conditioning(2)
    given = SimpleNamespace(flow=SimpleNamespace(solver=SimpleNamespace(guidance_scale=4.0)), data=SimpleNamespace(null_rows=lambda items: null),
                            device=torch.device("cpu"), dtype=torch.bfloat16)  # fmt: skip
    told = Solver.teacher_rows(given, rows, torch.arange(2))
    assert told.tensors[0].dtype == torch.bfloat16 and len(told) == 4
    if saved.name == "qwen_image":
        assert told.guided_by.tolist() == [[4.0]] * 4
        assert null.cat(rows).guiding(torch.tensor([2.0, 3.0])).guided_by.flatten().tolist() == [2.0, 3.0, 2.0, 3.0]
    else:
        assert told.guided_by is None and list(told.rows) == list(rows.rows)


def test_a_card_calls_the_pipeline_by_the_name_of_its_own_guidance(saved):
    scheduler = scheduler_for(saved.base, 4)
    for scale, own in ((1.0, {"qwen_image": "true_cfg_scale=1", "z_image": "guidance_scale=0"}),
                       (4.0, {"qwen_image": "true_cfg_scale=4, negative_prompt=' '", "z_image": "guidance_scale=3"})):  # fmt: skip
        card = {"call": saved.base.pipeline_call(scale), "guidance": {"guidance_scale": scale}}
        text = model_card(card, name="out", scheduler=scheduler, steps=None, stock=False, reason="it is")
        assert f'pipe("a prompt", num_inference_steps=4, {own[saved.name]}).images[0]' in text and "## Call" not in text


def test_diffusers_own_scheduler_serves_a_student_of_even_windows(saved):
    """Both pipelines call their scheduler with even sigmas, so a folder needs nothing of ours."""
    from_ours = scheduler_for(saved.base, 4)
    choice = choose(saved.base, from_ours)
    stock = choice.scheduler
    assert type(stock).__name__ == "FlowMatchEulerDiscreteScheduler", choice.reason
    seen = []
    for scheduler in (from_ours, stock):
        saved.pipe.scheduler = scheduler
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        seen.append(saved.pipe(list(PROMPTS), num_inference_steps=4, height=SIDE, width=SIDE, generator=generators, output_type="pt",
                               **saved.base.pipeline_call(1.0))[0])  # fmt: skip
    torch.testing.assert_close(seen[0], seen[1], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_blocks_compile_whole(saved):
    family, folder = family_of(saved.base.path)
    network, rows = family.load(folder, parts=("unet",)).unet, saved.base.encode_prompts(PROMPTS)
    z, t = torch.randn(2, *saved.base.latent_shape(SIDE)), torch.tensor([700.0, 300.0])
    with torch.no_grad():
        plain = denoise(network, z, t, rows)
        compile_blocks(network, "aot_eager")
        torch.testing.assert_close(denoise(network, z, t, rows), plain, atol=1e-5, rtol=1e-4)


def test_other_shapes_than_squares_are_the_pipelines_too(saved):
    height, width = 32, 48
    saved.pipe.scheduler = scheduler_for(saved.base, 4)
    ours = sample(saved.base, saved.base.unet, PROMPTS[:1], 4, [1], windows=4, resolution=(height, width))
    images = saved.pipe(PROMPTS[0], num_inference_steps=4, height=height, width=width, generator=torch.Generator().manual_seed(1), output_type="pt",
                        **saved.base.pipeline_call(1.0))[0]  # fmt: skip
    torch.testing.assert_close(ours.images / 2 + 0.5, images, atol=2e-5, rtol=1e-4)


def test_a_null_prompt_of_zeros_is_no_text_at_all(saved):
    base = replace(saved.family, null_prompt="zeros").load(saved.base.path)
    null = base.null_conditioning(2)
    assert not any(rows.any() for rows in null.tensors)
    z, t = torch.randn(2, *base.latent_shape(SIDE), generator=torch.Generator().manual_seed(0)), torch.tensor([700.0, 300.0])
    with torch.no_grad():
        assert torch.isfinite(denoise(base.unet, z, t, null)).all()
