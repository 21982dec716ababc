"""Steps where they are wanted: a count for each window, and windows that the base solves instead of the student."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny_pipelines
from reflow.data import digits
from reflow.errors import UserError
from reflow.flow import DiscreteVP, Windows, WindowSolver
from reflow.models import denoise, family
from reflow.sampling import PiecewiseFlowScheduler, initial_noise, sample, sample_parts, sample_teacher

TWO = Windows((1.0, 0.5, 0.0))
PROMPTS, SEEDS = digits.prompts(torch.arange(4)), range(4)


@pytest.fixture(scope="module")
def base():
    return family("digits").load("builtin")


@pytest.fixture(scope="module")
def other(base):
    """A student that is no copy of its base."""
    unet = type(base.unet).from_config(base.unet.config)
    generator = torch.Generator().manual_seed(0)
    unet.load_state_dict({k: v * (1 + 0.05 * torch.randn(v.shape, generator=generator)) if v.is_floating_point() else v for k, v in base.unet.state_dict().items()})
    return unet.eval()


def test_each_window_has_its_count(tmp_path):
    scheduler = PiecewiseFlowScheduler(num_time_windows=2, steps_per_window=[1, 9])
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == [999, *(round(500 - 500 / 9 * i) - 1 for i in range(9))]
    scheduler.save_pretrained(tmp_path)
    again = PiecewiseFlowScheduler.from_pretrained(tmp_path)
    again.set_timesteps(10)
    assert again.timesteps.tolist() == scheduler.timesteps.tolist()
    again.set_timesteps(5, steps_per_window=(3, 2))  # for this call
    assert again.timesteps.tolist() == [999, 832, 666, 499, 249]
    assert PiecewiseFlowScheduler.from_config(again.config, num_time_windows=4).config.steps_per_window is None
    even = PiecewiseFlowScheduler.from_config(again.config, steps_per_window=None)
    even.set_timesteps(4)
    assert even.timesteps.tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize("make, words", [
    (lambda: PiecewiseFlowScheduler(num_time_windows=2, steps_per_window=[1]), "steps_per_window is [1]; give 2 whole numbers of at least 1"),
    (lambda: PiecewiseFlowScheduler(num_time_windows=2, steps_per_window=[1, 0]), "give 2 whole numbers"),
    (lambda: PiecewiseFlowScheduler(num_time_windows=2, steps_per_window=[1, True]), "give 2 whole numbers"),
    (lambda: PiecewiseFlowScheduler(num_time_windows=2, steps_per_window="19"), "give 2 whole numbers"),
    (lambda: PiecewiseFlowScheduler(num_time_windows=2, steps_per_window=3), "give 2 whole numbers"),
    (lambda: PiecewiseFlowScheduler(num_time_windows=2, steps_per_window=[1, 9]).set_timesteps(4), "num_inference_steps=4 does not fit steps_per_window=[1, 9]"),
    (lambda: PiecewiseFlowScheduler(num_time_windows=2).set_timesteps(4, steps_per_window=[1, 9]), "which are 10 steps: use num_inference_steps=10"),
])
def test_counts_that_do_not_fit_are_sentences(make, words):
    with pytest.raises(UserError) as error:
        make()
    assert words in str(error.value)


@pytest.mark.parametrize("kind", ["ddim_eps", "diff_eps", "velocity"])
def test_more_steps_in_one_window_leave_a_straight_one_where_it_was(kind):
    """A constant velocity, read back through each step's own coefficients: any split ends at the same place."""
    z, v, ends = torch.ones(1, 1, 2, 2, dtype=torch.float64), 0.7, []
    for split in ((1, 1), (1, 5), (4, 2)):
        scheduler = PiecewiseFlowScheduler(num_time_windows=2, prediction_type=kind)
        scheduler.set_timesteps(sum(split), steps_per_window=split)
        state = z.clone()
        for i, t in enumerate(scheduler.timesteps):
            keep, gain = scheduler._steps[i]
            nexts = [*scheduler._times[1:], 0.0]
            dt = nexts[i] - scheduler._times[i]
            output = ((1 - keep) * state + v * dt) / gain
            state = scheduler.step(output, t, state).prev_sample
        ends.append(float(state[0, 0, 0, 0]))
    assert ends == pytest.approx([1 - v] * 3, abs=1e-9)


def test_a_pipeline_and_our_loop_take_the_same_split(tmp_path):
    pipe = tiny_pipelines.quiet(tiny_pipelines.sd15())
    pipe.save_pretrained(tmp_path)
    small = family("sd15").load(tmp_path)
    pipe.scheduler = PiecewiseFlowScheduler.for_student(small.scheduler_config, 2)
    pipe.scheduler = PiecewiseFlowScheduler.from_config(pipe.scheduler.config, steps_per_window=[1, 4])
    noise = initial_noise([3], small.latent_shape())
    want = pipe(["abc"], num_inference_steps=5, guidance_scale=1.0, latents=noise, height=64, width=64, output_type="latent").images
    got = sample(small, small.unet, ["abc"], (1, 4), [3], windows=2)
    assert got.evaluations == 5
    torch.testing.assert_close(got.latents, want, rtol=1e-4, atol=1e-4)
    assert (sample(small, small.unet, ["abc"], 5, [3], windows=2).latents - got.latents).abs().max() > 1e-3  # (3, 2)


def test_all_windows_of_the_student_or_of_the_teacher_are_the_plain_samplers(base, other):
    scheduler = PiecewiseFlowScheduler.for_student(base.scheduler_config, TWO)
    own = sample_parts(base, other, PROMPTS, (2, 3), SEEDS, scheduler=scheduler, teacher_windows=())
    torch.testing.assert_close(own.latents, sample(base, other, PROMPTS, (2, 3), SEEDS, windows=TWO).latents, rtol=1e-4, atol=1e-4)
    whole = sample_parts(base, other, PROMPTS, (4, 4), SEEDS, scheduler=scheduler, teacher_windows=(0, 1), teacher_guidance_scale=3.0)
    teacher = sample_teacher(base, base.unet, PROMPTS, 8, SEEDS, guidance_scale=3.0)
    torch.testing.assert_close(whole.latents, teacher.latents, rtol=1e-4, atol=1e-4)
    assert (own.evaluations, whole.evaluations) == (5, 16)


@pytest.mark.parametrize("taught", [0, 1])
def test_each_half_is_solved_by_its_own_network(base, other, taught):
    scheduler = PiecewiseFlowScheduler.for_student(base.scheduler_config, TWO)
    steps = (1, 9) if taught == 1 else (9, 1)
    got = sample_parts(base, other, PROMPTS, steps, SEEDS, scheduler=scheduler, teacher_windows={taught}, guidance_scale=2.0)
    rows, z = base.encode_prompts(PROMPTS), initial_noise(SEEDS, base.latent_shape())
    null = base.null_conditioning(1).expand(4)
    with torch.no_grad():
        for k in (0, 1):
            if k == taught:
                part = Windows((TWO.t_start[k], TWO.t_end[k]))
                solver = WindowSolver(DiscreteVP.from_config(base.scheduler_config), part, 9, prediction_type=base.prediction_type)
                z = solver.solve(lambda x, t: denoise(base.unet, x, t, rows), z, torch.zeros(4, dtype=torch.long))
            else:
                scheduler.set_timesteps(2)
                two = denoise(other, torch.cat([z, z]), scheduler.timesteps[k].expand(8), null.cat(rows))
                guided = two[:4] + 2.0 * (two[4:] - two[:4])
                z = scheduler.step(guided, scheduler.timesteps[k], z).prev_sample
    torch.testing.assert_close(got.latents, z, rtol=1e-3, atol=1e-3)
    assert got.evaluations == 9 + 2


def test_parts_that_do_not_fit_are_sentences(base, other):
    scheduler = PiecewiseFlowScheduler.for_student(base.scheduler_config, TWO)
    for steps, windows, words in [((1,), (), "do not fit the student's 2 windows"), ((1, 0), (), "at least 1"), ((1, 1), (2,), "There is no window 3; the student has 2"),
                                  ((1, 900), (1,), "Window 2: ")]:
        with pytest.raises(UserError, match=words):
            sample_parts(base, other, PROMPTS, steps, SEEDS, scheduler=scheduler, teacher_windows=windows)


RECIPE = 'name = "halves"\n[model]\nfamily = "digits"\n[[stages]]\nwindows = 2\nsolver_steps = 1\nsamples = 500\nhalf = "noisy"\n'


@pytest.fixture
def run_dir(tmp_path, other):
    (tmp_path / "run" / "stage-1").mkdir(parents=True)
    (tmp_path / "run" / "recipe.toml").write_text(RECIPE)
    save_file({k: v.contiguous() for k, v in other.state_dict().items()}, tmp_path / "run" / "stage-1" / "unet_ema.safetensors", {
        "windows": json.dumps([1.0, 0.5, 0.0]), "prediction_type": "ddim_eps", "network_time": "index"})
    return tmp_path / "run"


def test_the_command_shares_the_windows_between_student_and_base(reflow, base, other, run_dir, tmp_path):
    words = ["--run-dir", run_dir, "--prompt", PROMPTS[3], "--dtype", "fp32"]
    assert reflow("sample", *words, "--steps", "1,9", "--teacher-windows", "2", "--out", tmp_path / "a") == 0
    note = json.loads(Image.open(tmp_path / "a" / "00000.png").text["reflow"])
    assert (note["steps"], note["steps_per_window"], note["teacher_windows"]) == (10, [1, 9], [2])
    scheduler = PiecewiseFlowScheduler.for_student(base.scheduler_config, TWO)
    want = sample_parts(base, other, PROMPTS[3:4], (1, 9), [0], scheduler=scheduler, teacher_windows=(1,))
    got = torch.tensor(list(Image.open(tmp_path / "a" / "00000.png").convert("L").tobytes()), dtype=torch.float32)
    assert (got / 127.5 - 1 - want.images[0, 0].flatten()).abs().max() < 0.02
    assert load_file(run_dir / "stage-1" / "unet_ema.safetensors").keys() == other.state_dict().keys()
    # Without counts the steps are spread as the student's.
    assert reflow("sample", *words, "--steps", "6", "--teacher-windows", "2", "--out", tmp_path / "b") == 0
    for options, said in [(["--steps", "1,2,3"], "are 3 numbers, and the student has 2 windows"), (["--teacher-windows", "3"], "--teacher-windows 3: the student has 2"),
                          (["--teacher-windows", "1", "--teacher"], "leave --teacher out"), (["--teacher", "--steps", "1,2"], "a base has none"),
                          (["--teacher-windows", "1", "--steps", "2", "--guidance", "2,1"], "several --guidance scales")]:
        with pytest.raises(UserError, match=said):
            reflow("sample", *words, *options, "--out", tmp_path / "c")
    with pytest.raises(UserError, match="choose within a training run"):
        reflow("sample", "--model", "builtin", "--prompt", "a", "--teacher-windows", "1", "--out", tmp_path / "c")
