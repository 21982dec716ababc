"""What a stage says of itself at its end: the student beside the teacher's own solver at as many steps."""

import json

import pytest
import torch
from safetensors.torch import load_file

import tiny
import watch
from reflow.sampling.sampler import sample, sample_teacher
from reflow.training import run, verdict


def latents(*errors):
    """A fine solve of zeros and pictures that are so far from it, element by element."""
    return torch.tensor(errors).view(-1, 1, 1, 1).expand(-1, 4, 2, 2), torch.zeros(len(errors), 4, 2, 2)


@pytest.mark.parametrize("student, teacher, words", [
    ((1.0, 1.0), (2.0, 2.0), "the student beats the teacher's own solver: 1 from the teacher's 32 steps against 2 (RMS of latents), 50% closer; closer in 2 of 2"),
    ((3.0, 3.0), (2.0, 4.0), "beats the teacher's own solver: 3 from the teacher's 32 steps against 3.16 (RMS of latents), 5% closer; closer in 1 of 2"),
    ((3.0, 3.0), (2.0, 2.0), "the student is WORSE than the teacher's own solver: 3 from the teacher's 32 steps against 2 (RMS of latents), 50% FURTHER AWAY"),
    ((2.0, 2.0), (2.0, 2.0), "only equals"),
])
def test_the_sentence_says_who_is_closer_and_by_how_much(student, teacher, words):
    found = verdict.compare(latents(*student)[0], *latents(*teacher))
    assert words in verdict.sentence(2, 4, 32, found) and verdict.sentence(2, 4, 32, found).startswith("Stage 2, 4 steps: the student")
    assert "cannot be told" in verdict.sentence(2, 4, 4, found)
    assert verdict.compare(latents(1.0)[0], *latents(0.0))["gain"] is None


def records(folder, event):
    return [r for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if r["event"] == event]


@pytest.mark.parametrize("overrides, guidances", [((), (1.0, 1.0)), (("teacher.guidance_scale=2.0", "validate.guidance_scale=1.5"), (2.0, 1.0)),
                                                  pytest.param(("validate.guidance_scale=1.5",), (1.5, 1.5), marks=pytest.mark.slow)])
def test_every_stage_ends_with_its_verdict_which_is_that_of_its_own_files(tmp_path, capsys, digits_base, overrides, guidances):
    recipe = tiny.recipe(tmp_path, "validate.every=1000", "validate.teacher_steps=16", "stages.0.samples=32", "stages.1.samples=32", *overrides)
    assert run.train(recipe, tmp_path / "run") == 0
    found, out = records(tmp_path / "run", "verdict"), capsys.readouterr().out.splitlines()
    assert [(r["stage"], r["steps"], r["total_samples"]) for r in found] == [(1, 4, 32), (2, 2, 64)]
    assert all(out.count(r["said"]) == 1 and (r["teacher_guidance"], r["student_guidance"]) == guidances for r in found)
    assert all(("WORSE" in r["said"]) == (r["student_error"] > r["teacher_error"]) and r["pairs"] == 2 for r in found)
    # The last one again, from what the run left.
    data = run.encode_digits(digits_base)
    prompts = data.conditioning(data.preview(2))
    _, noise = run.loop.sampler.solve_draws(0, 0, [2**40, 2**40 + 1], data.shape)
    teacher = {n: sample_teacher(digits_base, digits_base.unet, prompts, n, range(2), noise=noise, guidance_scale=guidances[0], null=data.null,
                                 decode=False).latents for n in (2, 16)}
    unet = type(digits_base.unet).from_config(digits_base.unet.config).eval()
    unet.load_state_dict(load_file(tmp_path / "run" / "stage-2" / "unet_ema.safetensors"))
    student = sample(digits_base, unet, prompts, 2, range(2), windows=2, noise=noise, guidance_scale=guidances[1], null=data.null, decode=False).latents
    assert found[1]["student_error"] == pytest.approx(float((student - teacher[16]).square().mean().sqrt()), rel=1e-3)
    assert found[1]["teacher_error"] == pytest.approx(float((teacher[2] - teacher[16]).square().mean().sqrt()), rel=1e-3)


def test_every_validation_tells_student_and_teacher_from_the_untrained_one_on(tmp_path):
    sets = ("validate.every=32", "validate.teacher_steps=16", "stages.0.samples=64", "stages.1.samples=32", "checkpoint.every=32")
    assert run.train(tiny.recipe(tmp_path, *sets), tmp_path / "run") == 0
    found = records(tmp_path / "run", "paired")
    assert [(r["stage"], r["samples"], r["total_samples"], r["steps"]) for r in found] == [(1, 0, 0, 4), (1, 32, 32, 4), (1, 64, 64, 4), (2, 0, 64, 2), (2, 32, 96, 2)]
    # The untrained student of the first stage is its teacher's own DDIM; the last of each stage is its verdict.
    assert found[0]["student_error"] == pytest.approx(found[0]["teacher_error"], rel=1e-3)
    verdicts = records(tmp_path / "run", "verdict")
    assert [r["student_error"] for r in verdicts] == [found[2]["student_error"], found[4]["student_error"]]
    assert found[1]["teacher_error"] == found[0]["teacher_error"]
    # A run that is cut between two validations tells the same.
    with watch.leaving_after(3):
        assert run.train(tiny.recipe(tmp_path, *sets), tmp_path / "cut") == run.loop.LEFT_EARLY
    assert run.train(tiny.recipe(tmp_path, *sets), tmp_path / "cut") == 0
    assert records(tmp_path / "cut", "paired") == found


def test_a_student_that_is_behind_is_said_once_with_the_likely_cause(tmp_path, capsys):
    sets = ("validate.every=32", "validate.teacher_steps=16", "stages.0.samples=160", "objective.time_density=uniform", "train.learning_rate=0.05")
    assert run.train(tiny.short(tmp_path, *sets, "stages.0.samples=160"), tmp_path / "run") == 0
    behind, found = records(tmp_path / "run", "behind"), records(tmp_path / "run", "paired")
    assert [(r["stage"], r["samples"]) for r in behind] == [(1, 96)] and found[3]["gain"] < 0
    said = behind[0]["said"]
    assert said.startswith("Stage 1: after 60% of it the student is still WORSE at 4 steps than the teacher's own solver: ")
    assert "further away than before training" in said and "train.learning_rate = 0.05" in said
    assert capsys.readouterr().out.count(said) == 1
    assert run.train(tiny.short(tmp_path, *sets, "stages.0.samples=160", "validate.warn_after=1.0"), tmp_path / "quiet") == 0
    assert records(tmp_path / "quiet", "behind") == []


@pytest.mark.parametrize("overrides, began, now, words", [
    (["objective.time_density=uniform"], 0.08, 0.085, "objective.time_density = 'uniform', which spreads the training over the whole of each window"),
    ([], 0.08, 0.085, "It is coming closer, from 0.08: the likely cause is too short a stage"),
    ([], None, 0.085, "It is coming closer: the likely cause is too short a stage"),
    (["stages.0.learning_rate=0.5"], 0.08, 0.2, "further away than before training (0.08), so the likely cause is train.learning_rate = 0.5"),
])
def test_the_cause_is_the_density_the_rate_or_the_budget(tmp_path, overrides, began, now, words):
    recipe = tiny.recipe(tmp_path, *overrides).of_stage(0)
    assert words in verdict.cause(recipe, None if began is None else {"student_error": began}, {"student_error": now})


@pytest.mark.parametrize("share, total, every, batch", [(0.5, 160, 32, 16), (0.5, 100, 7, 16), (0.3, 1000, 100, 32), (0.0, 64, 32, 16), (0.9, 64, 48, 16)])
def test_the_first_validation_beyond_a_share_is_one(share, total, every, batch):
    total = -(-total // batch) * batch
    points = [done for done in range(batch, total + 1, batch) if run.loop.crossed(done, every, batch)]
    due = [done for done in points if verdict.first_after(share, done, total, every, batch)]
    assert due == [done for done in points if done >= share * total][: 1 if share else 0]
