"""sample, export, merge and env as a newcomer types them, on the digits model."""

import argparse
import hashlib
import io
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny_pipelines
from reflow.commands import sample as sample_command
from reflow.errors import UserError
from reflow.models import family
from reflow.sampling import initial_noise, sample, sample_teacher
from reflow.sampling.pictures import GAP, LINE, read_note, to_pil

SEVEN = "a handwritten seven"


@pytest.fixture(scope="module")
def weights(run_dir):
    return load_file(run_dir / "stage-2" / "unet_ema.safetensors")


@pytest.fixture(scope="module")
def student(weights):
    """The digits base with the weights of the run's last stage, 2 windows."""
    base = family("digits").load()
    base.unet.load_state_dict(weights)
    return base


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def same(path, image, off=1):
    """Whether the file holds this image [c,H,W]; rounding to bytes may tip over by one."""
    return np.abs(pixels(path) - np.asarray(to_pil(image)).astype(int)).max() <= off


def in_fp32(*argv):
    # As the expected images are drawn; a GPU takes fp16 unless told.
    return (*argv, "--dtype", "fp32")


def test_sample_draws_the_last_student_of_a_run(reflow, run_dir, student, here, capsys):
    assert reflow("sample", *in_fp32("--run-dir", run_dir, "--prompt", SEVEN, "--seed", 3)) == 0
    assert capsys.readouterr().out == "1 image, 2 steps by tiny, stage 2: samples/00000.png\n"
    assert [file.name for file in (here / "samples").iterdir()] == ["00000.png"]
    assert same("samples/00000.png", sample(student, student.unet, [SEVEN], 2, [3], windows=2).images[0])
    assert read_note("samples/00000.png") == {
        "prompt": SEVEN,
        "seed": 3,
        "model": "tiny, stage 2",
        "steps": 2,
        "guidance": 1.0,
        "windows": [1.0, 0.5, 0.0],
        "dtype": "fp32",
    }


def test_sample_takes_prompts_from_everywhere_and_seeds_count_on(reflow, run_dir, student, here, monkeypatch, capsys):
    (here / "prompts.txt").write_text(f"\n  {SEVEN}  \n\na handwritten öne\n", encoding="utf-8")
    options = in_fp32("--run-dir", run_dir, "--prompt", "a three", "--count", 2, "--seed", 7, "--batch-size", 4)
    assert reflow("sample", *options, "--prompts", "prompts.txt", "--out", "file") == 0
    said = capsys.readouterr()
    assert said.out == "6 images, 2 steps by tiny, stage 2: file, together in file/grid.png\n" and "6/6" in said.err
    # A pipe whose locale is not UTF-8.
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((here / "prompts.txt").read_bytes()), encoding="ascii"))
    assert reflow("sample", *options, "--prompts", "-", "--out", "stdin") == 0
    prompts = [p for p in ("a three", SEVEN, "a handwritten öne") for _ in range(2)]
    wanted = sample(student, student.unet, prompts, 2, range(7, 13), windows=2).images
    for i, prompt in enumerate(prompts):
        note = read_note(f"file/{i:05d}.png")
        assert (note["prompt"], note["seed"]) == (prompt, 7 + i) and read_note(f"stdin/{i:05d}.png") == note
        assert same(f"file/{i:05d}.png", wanted[i])
        assert (pixels(f"stdin/{i:05d}.png") == pixels(f"file/{i:05d}.png")).all()
    # One row a prompt, enlarged eight times, a gap between them and two lines below each.
    top, left, side = GAP + 128 + 2 * LINE + GAP, GAP + 128 + GAP, slice(0, 128, 8)
    whole = pixels("file/grid.png")
    assert whole.shape[:2] == (GAP + 3 * (128 + 2 * LINE + GAP), GAP + 2 * (128 + GAP))
    assert (whole[top:, left:][side, side] == pixels("file/00003.png")).all()
    assert (whole[:, GAP + 128 : left] == 255).all() and (whole[top - GAP : top] == 255).all()
    for row, column in np.ndindex(3, 2):
        at = (GAP + row * (128 + 2 * LINE + GAP) + 128, GAP + column * (128 + GAP))
        for line in range(2):
            assert (whole[at[0] + line * LINE :, at[1] :][:LINE, :128] < 128).any()


@pytest.mark.parametrize("guidance, scales", [("7.5,4,4", (7.5, 4.0, 4.0, 4.0)), ("2", (2.0,) * 4)])
def test_guidance_is_one_scale_or_one_for_each_step(reflow, run_dir, student, here, guidance, scales):
    options = in_fp32("--run-dir", run_dir, "--prompt", SEVEN, "--steps", 4, "--guidance", guidance)
    assert reflow("sample", *options) == 0
    wanted = sample(student, student.unet, [SEVEN], 4, [0], windows=2, guidance_scale=scales).images[0]
    assert same("samples/00000.png", wanted)
    assert read_note("samples/00000.png")["guidance"] == (list(scales) if "," in guidance else 2.0)


def test_the_base_takes_32_steps_by_both_of_its_names(reflow, run_dir, here):
    base = family("digits").load()
    wanted = sample_teacher(base, base.unet, [SEVEN], 32, [0]).images[0]
    for place in (("--run-dir", run_dir, "--teacher"), ("--model", "builtin")):
        assert reflow("sample", *in_fp32(*place, "--prompt", SEVEN)) == 0
    for out in ("samples", "samples-2"):
        assert same(f"{out}/00000.png", wanted) and read_note(f"{out}/00000.png")["windows"] is None


def test_any_folder_of_stable_diffusion_and_published_perflow_ones(reflow, here, capsys):
    tiny_pipelines.sd15("v_prediction").save_pretrained("sd15")
    tiny_pipelines.sdxl().save_pretrained("perflow")
    config = json.loads((here / "perflow/scheduler/scheduler_config.json").read_text())
    config |= {"_class_name": "PeRFlowScheduler", "num_time_windows": 4, "prediction_type": "ddim_eps"}
    (here / "perflow/scheduler/scheduler_config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert reflow("sample", *in_fp32("--model", "sd15", "--prompt", "abc", "--steps", 3, "--guidance", 2)) == 0
    assert reflow("sample", *in_fp32("--model", "perflow", "--prompt", "abc", "--prompt", "b")) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("1 image, 3 steps by sd15") and said[1].startswith("2 images, 4 steps by perflow")
    base = family("sd15").load("sd15")
    wanted = sample_teacher(base, base.unet, ["abc"], 3, [0], guidance_scale=2.0).images[0]
    assert pixels("samples/00000.png").shape == (64, 64, 3) and same("samples/00000.png", wanted)
    base = family("sdxl").load("perflow")
    reading = dict(windows=4, prediction_type="ddim_eps", network_time="perflow")
    wanted = sample(base, base.unet, ["abc", "b"], 4, [0, 1], **reading).images
    assert all(same(f"samples-2/{i:05d}.png", wanted[i]) for i in (0, 1))
    with pytest.raises(UserError, match="fewer than the student's 4 windows"):
        reflow("sample", "--model", "perflow", "--prompt", "abc", "--steps", 2)


def test_an_earlier_stage_by_number(reflow, run_dir, here):
    assert reflow("sample", *in_fp32("--run-dir", run_dir, "--stage", 1, "--prompt", SEVEN)) == 0
    base = family("digits").load()
    base.unet.load_state_dict(load_file(run_dir / "stage-1" / "unet_ema.safetensors"))
    assert same("samples/00000.png", sample(base, base.unet, [SEVEN], 4, [0], windows=4).images[0])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision(reflow, run_dir, student, here, dtype):
    assert reflow("sample", "--run-dir", run_dir, "--prompt", SEVEN, "--dtype", dtype) == 0
    wanted = np.asarray(to_pil(sample(student, student.unet, [SEVEN], 2, [0], windows=2).images[0])).astype(int)
    assert np.abs(pixels("samples/00000.png") - wanted).mean() < 4


@pytest.mark.parametrize(
    "options, words",
    [
        (("--steps", "1"), "--steps 1 is fewer than the student's 2 windows.*write --steps 2 or more"),
        (("--stage", "3"), "--stage 3: .* has finished stages 1, 2 of 2"),
        (("--guidance", "7,4,4"), "3 values for 2 steps"),
        (("--guidance", "lots"), "'lots' cannot be read"),
        (("--guidance", "4,2", "--teacher"), "a base is guided by one scale"),
        (("--prompts", "nowhere.txt"), "--prompts nowhere.txt cannot be read \\(No such file"),
        (("--prompts", "latin.txt"), "it is no UTF-8"),
        (("--seed", "-1"), "--seed -1 is out of range"),
        (("--out", "full"), "full already exists; nothing was written"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_sample_refuses_before_anything_is_written(reflow, run_dir, here, options, words):
    (here / "full").mkdir()
    (here / "full" / "precious.png").write_text("kept")
    (here / "latin.txt").write_bytes("schön".encode("latin-1"))
    before = sorted(here.rglob("*"))
    with pytest.raises(UserError, match=words):
        reflow("sample", "--run-dir", run_dir, "--prompt", SEVEN, *options)
    assert sorted(here.rglob("*")) == before


def test_sources_that_cannot_be_sampled(reflow, run_dir, here):
    (here / "prompts.txt").write_text("\n\n")
    with pytest.raises(UserError, match="There is no prompt"):
        reflow("sample", "--run-dir", run_dir, "--prompts", "prompts.txt")
    with pytest.raises(UserError, match="There is no folder nowhere"):
        reflow("sample", "--run-dir", "nowhere", "--prompt", "x")
    with pytest.raises(UserError, match="holds no run of reflow"):
        reflow("sample", "--run-dir", here, "--prompt", "x")
    with pytest.raises(UserError, match="is a training run and no diffusers folder. Give it as --run-dir"):
        reflow("sample", "--model", run_dir, "--prompt", "x")
    with pytest.raises(UserError, match="choose within a training run"):
        reflow("sample", "--model", "builtin", "--teacher", "--prompt", "x")
    unfinished = here / "unfinished"
    unfinished.mkdir()
    shutil.copy(run_dir / "recipe.toml", unfinished)
    for command in (("sample", "--prompt", "x"), ("export", "--out", "out")):
        with pytest.raises(UserError, match="No stage of .*unfinished is finished yet"):
            reflow(command[0], "--run-dir", unfinished, *command[1:])
    (here / "other").mkdir()
    (here / "other" / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(UserError, match="holds a WanPipeline, .* it reads .*StableDiffusion"):
        reflow("sample", "--model", "other", "--prompt", "x")
    for options in (("--count", "0"), ("--steps", "none"), ("--stage", "1", "--teacher")):
        with pytest.raises(SystemExit, match="2"):
            reflow("sample", "--run-dir", run_dir, "--prompt", "x", *options)


def test_a_run_of_another_base_is_named(reflow, run_dir, here):
    other = shutil.copytree(run_dir, here / "other")
    file = other / "stage-2" / "unet_ema.safetensors"
    state = load_file(file)
    state["conv_in.weight"] = torch.zeros(32, 5, 3, 3)
    save_file(state, file)
    with pytest.raises(UserError, match="stage-2/unet_ema.safetensors does not fit the base.s UNet: .*conv_in"):
        reflow("sample", "--run-dir", other, "--prompt", SEVEN)


def test_the_exported_folder_samples_as_the_run_does(reflow, run_dir, student, weights, here, capsys):
    assert reflow("export", "--run-dir", run_dir, "--out", "student", "--dtype", "fp32") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "diffusers folder of tiny (stage 2 of 2, 2 windows): student"
    assert said[1].startswith("scheduler: DDIMScheduler, so it needs no package of ours. 2 steps with DDIMScheduler")
    assert reflow("sample", *in_fp32("--model", "student", "--prompt", SEVEN, "--prompt", "a two")) == 0
    wanted = sample(student, student.unet, [SEVEN, "a two"], 2, [0, 1], windows=2).images
    assert same("samples/00000.png", wanted[0]) and same("samples/00001.png", wanted[1])
    # Stock DDIM is right for 2 steps only; the folder says what it is, so more steps stay on the student's chords.
    assert reflow("sample", *in_fp32("--model", "student", "--prompt", SEVEN, "--steps", 6)) == 0
    assert same("samples-2/00000.png", sample(student, student.unet, [SEVEN], 6, [0], windows=2).images[0])
    with pytest.raises(UserError, match="fewer than the student's 2 windows"):
        reflow("sample", "--model", "student", "--prompt", SEVEN, "--steps", 1)
    pipe = StableDiffusionXLPipeline.from_pretrained("student")
    pipe.set_progress_bar_config(disable=True)
    noise = initial_noise([0], student.latent_shape())
    image = pipe(SEVEN, num_inference_steps=2, guidance_scale=1.0, latents=noise, output_type="pt").images[0]
    assert (image - (wanted[0] / 2 + 0.5)).abs().max() <= 1e-4


def test_a_folder_that_stock_ddim_cannot_sample_carries_our_scheduler(reflow, run_dir, student, here, capsys):
    assert reflow("export", "--run-dir", run_dir, "--out", "more", "--steps", 4, "--dtype", "fp32") == 0
    assert "scheduler: PiecewiseFlowScheduler, so `import reflow.sampling`" in capsys.readouterr().out
    assert reflow("sample", *in_fp32("--model", "more", "--prompt", SEVEN, "--steps", 4)) == 0
    assert same("samples/00000.png", sample(student, student.unet, [SEVEN], 4, [0], windows=2).images[0])
    with pytest.raises(UserError, match="num_inference_steps=1 is fewer than the 2 windows"):
        reflow("export", "--run-dir", run_dir, "--out", "fewer", "--steps", 1)
    assert not (here / "fewer").exists()


def report_of(run_dir, weights_digest):
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6, "count": 3}
    row = {"frechet": interval, "diversity": interval, "prompt_accuracy": interval, "milliseconds_per_image": 1.25}
    methods = [
        {"method": "teacher", "stage": None, "windows": None, "steps": 32, **row},
        {"method": "student, 4 windows", "stage": 1, "windows": 4, "steps": 4, "paired_images": interval, **row},
        {"method": "student, 2 windows", "stage": 2, "windows": 2, "steps": 2, "paired_images": interval, **row},
    ]
    (run_dir / "report").mkdir(exist_ok=True)
    settings = {"samples": 1797, "seeds": 3, "teacher_steps": 32}
    report = {"methods": methods, "differences": [], "settings": settings, "real_scans": 1797}
    report["weights"] = {"stage-2": weights_digest}
    (run_dir / "report" / "report.json").write_text(json.dumps(report))


def test_the_card_has_recipe_data_and_the_evaluation_of_these_very_weights(reflow, run_dir, here):
    run = shutil.copytree(run_dir, here / "run")
    digest = hashlib.sha256((run / "stage-2" / "unet_ema.safetensors").read_bytes()).hexdigest()
    report_of(run, digest)
    reflow("export", "--run-dir", run, "--out", "good")
    card = (here / "good" / "README.md").read_text(encoding="utf-8")
    for piece in (
        'license: "apache-2.0"',
        "# tiny, 2-step student",
        "Stage 2 of 2, reflow 0",
        "solver_steps = 2",
        "1,797 scans",
        "num_inference_steps=2, guidance_scale=1)",
        "| teacher | 32 |",
        "| student, 2 windows | 2 | 0.5000 ± 0.1000 |",
        "to the teacher's 32 steps from the same noise",
    ):
        assert piece in card, piece
    assert "student, 4 windows" not in card
    report_of(run, "another")
    reflow("export", "--run-dir", run, "--out", "stale")
    assert "## Evaluation" not in (here / "stale" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "options, words",
    [
        (("--out", "x.safetensors"), "--format diffusers writes a folder, so --out x.safetensors does not fit"),
        (("--out", "x", "--format", "delta"), "--format delta writes a file that ends in .safetensors"),
        (("--out", "x.safetensors", "--format", "single-file"), "two text encoders of one width"),
        (("--out", "full"), "full already exists; nothing was written"),
        (("--out", "x", "--stage", "5"), "--stage 5: .* has finished stages 1, 2 of 2"),
    ],
)
def test_what_export_refuses(reflow, run_dir, here, options, words):
    (here / "full").mkdir()
    (here / "full" / "precious.png").write_text("kept")
    with pytest.raises(UserError, match=words):
        reflow("export", "--run-dir", run_dir, *options)
    assert sorted(file.name for file in here.rglob("*")) == ["full", "precious.png"]


def test_a_delta_makes_the_student_out_of_the_base_again(reflow, run_dir, weights, student, here, capsys):
    assert reflow("export", "--run-dir", run_dir, "--format", "delta", "--out", "delta.safetensors") == 0
    merge = ("merge", "--base", "builtin", "--delta", "delta.safetensors")
    assert reflow(*merge, "--out", "merged", "--dtype", "fp32") == 0
    said = capsys.readouterr().out
    assert f"{len(weights)} tensors merged, 0 of another shape kept, 0 in one model only." in said
    got = load_file("merged/unet/diffusion_pytorch_model.safetensors")
    assert got.keys() == weights.keys()
    assert all(torch.allclose(got[key], weights[key], rtol=1e-6, atol=1e-9) for key in weights)
    assert reflow("sample", *in_fp32("--model", "merged", "--prompt", SEVEN)) == 0
    assert same("samples/00000.png", sample(student, student.unet, [SEVEN], 2, [0], windows=2).images[0])
    assert reflow(*merge, "--out", "none", "--dtype", "fp32", "--scale", "0") == 0
    base = family("digits").load(parts=("unet",)).unet.state_dict()
    none = load_file("none/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(none[key], base[key]) for key in base)
    # The sum is rounded once: fp16 weights are the fp32 sum's nearest.
    assert reflow(*merge, "--out", "half") == 0
    half = load_file("half/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(half[key], got[key].half()) for key in got)
    assert "plus 1 times the delta weights delta.safetensors" in (here / "half" / "README.md").read_text()


def test_a_published_delta_needs_to_be_told_how_it_is_sampled(reflow, weights, here, capsys):
    base = family("digits").load(parts=("unet",)).unet.state_dict()
    save_file({key: weights[key] - base[key] for key in weights}, "delta_weights.safetensors")
    merge = ("merge", "--base", "builtin", "--delta", "delta_weights.safetensors", "--out", "out")
    with pytest.raises(UserError, match="does not say which windows.*--windows 4 --network-time perflow"):
        reflow(*merge)
    assert not (here / "out").exists()
    told = ("--windows", "4", "--network-time", "perflow", "--prediction-type", "diff_eps")
    assert reflow(*merge, *told) == 0
    assert "PiecewiseFlowScheduler" in capsys.readouterr().out
    config = json.loads((here / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert (config["num_time_windows"], config["network_time"], config["prediction_type"]) == (4, "perflow", "diff_eps")
    with pytest.raises(UserError, match="out already exists"):
        reflow(*merge, *told)
    with pytest.raises(UserError, match="There is no file gone.safetensors"):
        reflow("merge", "--base", "builtin", "--delta", "gone.safetensors", "--out", "new")


def test_env_names_versions_device_and_every_op_with_its_reason(reflow, capsys):
    assert reflow("env") == 0
    said = capsys.readouterr().out
    assert f"torch          {torch.__version__}" in said and ("GPU 0" in said) == torch.cuda.is_available()
    lines = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.startswith("  ")}
    for op in ("aligned_v_loss", "guided_step", "window_chord", "cfg_combine"):
        assert lines[op][0] in ("torch", "triton") and len(lines[op]) > 3


@pytest.mark.parametrize("place", ["file", "stdin"])
def test_a_prompt_ends_at_the_end_of_its_line_alone(place, here, monkeypatch):
    text = "\ufeffa\u2028b\r\nc\x85d\x0ce\rf\n\n g \n".encode()
    (here / "odd [1].txt").write_bytes(text)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    args = argparse.Namespace(prompt=["first"], prompts="-" if place == "stdin" else "odd [1].txt")
    assert sample_command.read_prompts(args) == ["first", "a\u2028b", "c\x85d\x0ce\rf", "g"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    (here / "odd [1].txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="no UTF-8"):
        sample_command.read_prompts(args)


def test_export_uploads_only_when_it_is_asked_to_and_checks_that_first(reflow, run_dir, here, monkeypatch, capsys):
    from reflow.export import hub

    pushed = []
    monkeypatch.setattr(hub, "push", lambda path, repo, **options: pushed.append((str(path), repo, options)) or "https://hub/me/seven")
    assert reflow("export", "--run-dir", run_dir, "--out", "plain") == 0 and not pushed
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        reflow("export", "--run-dir", run_dir, "--out", "never", "--push", "me/seven")
    with pytest.raises(UserError, match="--public belongs to --push"):
        reflow("export", "--run-dir", run_dir, "--out", "never", "--public")
    assert not (here / "never").exists()
    monkeypatch.setattr(hub, "check", lambda repo: None)
    assert reflow("export", "--run-dir", run_dir, "--out", "folder", "--push", "me/seven") == 0
    assert reflow("export", "--run-dir", run_dir, "--out", "d.safetensors", "--format", "delta", "--push", "me/seven", "--public") == 0
    assert pushed[0] == ("folder", "me/seven", {"card": None, "private": True})
    assert pushed[1][:2] == ("d.safetensors", "me/seven") and str(pushed[1][2]["card"]) == "d.md" and not pushed[1][2]["private"]
    assert capsys.readouterr().out.count("on the hub: https://hub/me/seven") == 2
