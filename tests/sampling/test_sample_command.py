"""`reflow sample` beyond the first picture: negative prompts, long prompts, sizes, starting images, exported models."""

import json
import shutil
import types

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_pipelines
from reflow.commands.sample import open_image
from reflow.data.pictures import fit, upright
from reflow.errors import UserError
from reflow.export import export_folder
from reflow.flow import Windows
from reflow.models import family
from reflow.sampling import PiecewiseFlowScheduler, sample, sample_teacher
from reflow.sampling.pictures import from_pil, read_note, to_pil
from reflow.weights.delta import student_metadata
from reflow.weights.files import write_state


def export(name, place):
    """(folder of an exported 4-window student, the same model as a Base)."""
    pipe = tiny_pipelines.quiet(getattr(tiny_pipelines, name)())
    pipe.save_pretrained(place / "base")
    export_folder(place / "base", pipe.unet.state_dict(), place / "student", windows=4, dtype="fp32")
    return place / "student", family(name).load(place / "student")


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def exported(request, tmp_path_factory):
    return export(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """For what does not depend on the family."""
    return export("sd15", tmp_path_factory.mktemp("one"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def same(path, image):
    return np.abs(pixels(path) - np.asarray(to_pil(image)).astype(int)).max() <= 1


FP32 = ("--dtype", "fp32")


def test_a_negative_prompt_is_what_guidance_moves_away_from(reflow, exported, here):
    folder, base = exported
    say = ("sample", "--base", folder, "--prompt", "abc", "--negative-prompt", "dog", "--guidance", "3,2", *FP32)
    assert reflow(*say) == 0
    null = base.encode_prompts(["dog"])
    call = dict(windows=4, guidance_scale="3,2")
    assert same("samples/00000.png", sample(base, base.unet, ["abc"], 4, [0], null=null, **call).images[0])
    assert not same("samples/00000.png", sample(base, base.unet, ["abc"], 4, [0], **call).images[0])
    note = read_note("samples/00000.png")
    assert note["negative_prompt"] == "dog" and note["model"] == folder.name
    with pytest.raises(UserError, match="--negative-prompt does nothing without guidance"):
        reflow("sample", "--base", folder, "--prompt", "abc", "--negative-prompt", "dog")


def test_a_long_prompt_is_cut_and_said_once(reflow, exported, here, capsys):
    folder, base = exported
    limit = base.tokenizers[0].model_max_length  # 12, of which two are the start and the end
    fits, long = "a" * (limit - 2), "b " * (limit - 2) + "x yz"
    (here / "prompts.txt").write_text(f"{fits}\n{long}\n{'c ' * 10_000}\n")
    assert reflow("sample", "--base", folder, "--prompts", "prompts.txt", "--count", 2, *FP32) == 0
    said = capsys.readouterr().err
    assert said.count("is not read") == 1
    assert f"beyond {limit} tokens is not read: prompt 2 loses its last 3 tokens, from 'x yz' on; prompt 3" in said
    notes = [read_note(f"samples/{i:05d}.png") for i in (0, 2, 3, 4)]
    assert [note.get("tokens_not_read") for note in notes] == [None, 3, 3, 10_000 - (limit - 2)]
    cut = base.encode_prompts(["b " * (limit - 2)]).encoder_hidden_states
    torch.testing.assert_close(base.encode_prompts([long]).encoder_hidden_states, cut)


def test_width_and_height(reflow, one, here):
    folder, base = one
    cell = 64
    options = ("--width", cell, "--height", 2 * cell)
    assert reflow("sample", "--base", folder, "--prompt", "abc", *options, *FP32) == 0
    assert pixels("samples/00000.png").shape == (2 * cell, cell, 3)
    note = read_note("samples/00000.png")
    assert (note["width"], note["height"]) == (cell, 2 * cell)
    wanted = sample(base, base.unet, ["abc"], 4, [0], windows=4, resolution=(2 * cell, cell)).images[0]
    assert same("samples/00000.png", wanted)
    with pytest.raises(UserError, match=f"Resolution 50 does not fit .* write a multiple of {cell}"):
        reflow("sample", "--base", folder, "--prompt", "abc", "--width", 50)


def test_starting_from_an_image_equals_diffusers(reflow, exported, here):
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline

    folder, base = exported
    shape = (70, 90, 4)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)).save("start.png")
    options = ("--init-image", "start.png", "--strength", 0.5, "--width", 64, "--height", 64, "--guidance", 2)
    assert reflow("sample", "--base", folder, "--prompt", "abc", "--seed", 3, *options, *FP32) == 0
    image = from_pil(Image.open("start.png"), base, (64, 64))
    assert image.shape == (1, 3, 64, 64) and image.abs().max() <= 1
    kind = StableDiffusionXLImg2ImgPipeline if base.family.pooled else StableDiffusionImg2ImgPipeline
    pipe = tiny_pipelines.quiet(kind.from_pretrained(folder))
    pipe.scheduler = PiecewiseFlowScheduler.from_config(pipe.scheduler.config, num_time_windows=4)
    latents = base.encode_images(image)
    drawn = pipe(
        "abc",
        image=latents,
        strength=0.5,
        num_inference_steps=4,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    ours = sample(base, base.unet, ["abc"], 4, [3], windows=4, guidance_scale=2.0, init=latents, strength=0.5)
    assert ours.evaluations == 4  # two of four steps, each with its unconditional half
    torch.testing.assert_close(ours.latents, drawn, rtol=1e-4, atol=1e-4)
    assert same("samples/00000.png", ours.images[0])
    assert read_note("samples/00000.png")["strength"] == 0.5


def test_a_start_image_is_read_as_training_reads_it(here):
    """16-bit grey keeps its levels and its transparent one, and a turned picture is upright."""
    deep = np.full((8, 12), 40000, np.uint16)
    deep[:, :4], deep[0] = 1000, 65535
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(deep).save("deep.png", exif=exif)
    Image.fromarray(deep).save("deep.tif", tiffinfo={0x0112: 6})
    base = types.SimpleNamespace(configs={"vae": {"in_channels": 3}})
    for name in ("deep.png", "deep.tif"):
        picture = open_image(name, 3)
        assert picture.size == (8, 12) and sorted({c for _, c in picture.getcolors()})[0] == (4, 4, 4)
        with Image.open(name) as stored:
            pixels, _ = fit(upright(stored), (8, 8), 3)
        want = torch.from_numpy(pixels.astype(np.float32)) / 127.5 - 1
        torch.testing.assert_close(from_pil(picture, base, (8, 8))[0], want)


@pytest.mark.parametrize(
    "options, words",
    [
        (("--strength", "0.5"), "--strength belongs to --init-image"),
        (("--init-image", "none.png"), "--init-image none.png cannot be read .No such file"),
        (("--init-image", "text.png"), "--init-image text.png cannot be read .it is no image"),
        (("--init-image", "float.tif"), "--init-image float.tif cannot be read .mode F"),
        (("--init-image", "dot.png", "--strength", "0.2"), "Use a strength of at least 0.25"),
        (("--init-image", "dot.png", "--strength", "1.5"), "strength is 1.5; write a number above 0"),
        (("--init-image", "dot.png", "--guidance", "3,2,1"), "names 3 values for 2 steps"),
        (("--steps", "2"), "--steps 2 is fewer than the student's 4 windows"),
    ],
)
def test_mistakes_leave_nothing_behind(reflow, one, here, options, words):
    folder, _ = one
    Image.new("P", (1, 1)).save("dot.png")
    Image.new("F", (8, 8)).save("float.tif")
    (here / "text.png").write_text("no picture")
    before = sorted(here.rglob("*"))
    with pytest.raises(UserError, match=words):
        reflow("sample", "--base", folder, "--prompt", "abc", *options)
    assert sorted(here.rglob("*")) == before


def test_a_base_takes_a_negative_prompt_and_no_image(reflow, one, here):
    folder, base = one
    plain = folder.parent / "base"
    say = ("sample", "--base", plain, "--prompt", "abc", "--steps", 2, "--guidance", 2)
    assert reflow(*say, "--negative-prompt", "", *FP32) == 0
    wanted = sample_teacher(base, base.unet, ["abc"], 2, [0], guidance_scale=2.0, null=base.encode_prompts([""]))
    assert same("samples/00000.png", wanted.images[0])
    Image.new("RGB", (64, 64)).save("dot.png")
    with pytest.raises(UserError, match="--init-image is for few-step students"):
        reflow(*say, "--init-image", "dot.png")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prediction_type": "v_prediction"}, "says prediction_type 'v_prediction', and its UNet .* 'ddim_eps'"),
        ({"_class_name": "PiecewiseFlowScheduler", "prediction_type": "velocity"}, "prediction_type 'velocity'"),
        ({"_class_name": "PiecewiseFlowScheduler", "prediction_type": "diff_eps"}, "prediction_type 'diff_eps'"),
        (
            {"_class_name": "PiecewiseFlowScheduler", "prediction_type": "ddim_eps", "num_time_windows": 2},
            r"windows \[1.0, 0.5, 0.0\]",
        ),
        (
            {"_class_name": "PeRFlowScheduler", "prediction_type": "ddim_eps", "num_time_windows": 4},
            "network_time 'perflow'",
        ),
    ],
)
def test_a_scheduler_that_contradicts_the_weights_is_refused(reflow, one, here, change, words):
    folder, _ = one
    other = shutil.copytree(folder, here / "other")
    file = other / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=f"other contradicts itself: .*{words}"):
        reflow("sample", "--base", "other", "--prompt", "abc")
    assert not (here / "samples").exists()


def test_exporting_weights_with_another_reading_than_their_own_is_refused(one, tmp_path):
    folder, base = one
    state = base.unet.state_dict()
    says = student_metadata(Windows.uniform(4), "ddim_v")
    file = write_state(state, tmp_path / "student.safetensors", metadata=says)
    with pytest.raises(UserError, match="was trained with prediction_type 'ddim_v', and is exported as 'ddim_eps'"):
        export_folder(folder.parent / "base", file, tmp_path / "out", windows=4)
    says = student_metadata(Windows.uniform(2), "ddim_eps")
    file = write_state(state, tmp_path / "two.safetensors", metadata=says)
    with pytest.raises(UserError, match=r"was trained with windows \(1.0, 0.5, 0.0\)"):
        export_folder(folder.parent / "base", file, tmp_path / "out", windows=4)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="asked to be 'ddim_v', but the config says 'epsilon'"):
        export_folder(folder.parent / "base", state, tmp_path / "out", windows=4, prediction_type="ddim_v")
