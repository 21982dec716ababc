"""What a stage says of itself at its end: the student beside the teacher's own solver at as many steps."""

import json

import pytest
import torch
from safetensors.torch import load_file

import tiny
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
                                                  (("validate.guidance_scale=1.5",), (1.5, 1.5))])
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
