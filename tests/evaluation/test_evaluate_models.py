"""`reflow evaluate` for pipelines and for runs of any family: which model an option belongs to, sentences, a whole run."""

import argparse
import json

import pytest
import torch
from safetensors.torch import save_file

import tiny_pipelines
from reflow.commands import compared, evaluate
from reflow.errors import UserError
from reflow.evaluation.comparison import timing
from reflow.evaluation.contenders import runs
from reflow.recipes import reading


def parsed(*words):
    parser = argparse.ArgumentParser()
    evaluate.arguments(parser)
    args = parser.parse_args([str(word) for word in words])
    return compared.filled(compared.Models.of(args))


def test_options_belong_to_the_models_before_them():
    a, b, c = parsed("--pipeline", "A", "--lora", "a.safetensors", "--name", "first", "--pipeline", "B", "--steps", 1, 2, "--pipeline", "C", "--steps", 8)
    assert (a.own, b.own, c.own) == ({"lora": "a.safetensors", "name": "first"}, {}, {})
    assert a.shared == b.shared == {"steps": [1, 2]} and c.shared == {"steps": [8]}


def test_options_before_all_models_are_of_those_without_their_own():
    a, b, t = parsed("--steps", 4, "--guidance", 1, 7.5, "--pipeline", "A", "--pipeline", "B", "--guidance", 2, "--teacher", "T", "--steps", 50)
    assert a.shared == {"steps": [4], "guidance": [2.0]} and b.shared == a.shared  # --guidance behind both is of both
    assert t.teacher and t.shared == {"steps": [50]}


def test_an_option_of_no_model_is_refused(capsys):
    with pytest.raises(SystemExit):
        parsed("--lora", "x", "--pipeline", "A")
    assert "belongs to a model; write it behind the --pipeline" in capsys.readouterr().err
    with pytest.raises(UserError, match="Several --teacher"):
        parsed("--pipeline", "A", "--teacher", "T", "--teacher", "U")


def test_what_to_evaluate_is_asked_for(reflow, tmp_path):
    for words in ((), ("--teacher", "T"), ("--run-dir", tmp_path, "--pipeline", "A")):
        with pytest.raises(UserError, match="Write what to evaluate"):
            reflow("evaluate", *words)
    with pytest.raises(UserError, match="a run has its own teacher"):
        reflow("evaluate", "--run-dir", tmp_path, "--teacher", "T")
    with pytest.raises(UserError, match="GPUs that PyTorch can use"):
        compared.chosen_devices(["cuda:99"])
    with pytest.raises(UserError, match="GPUs that PyTorch can use"):
        compared.chosen_devices(["tpu"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of SD1.5's family whose students are the teacher, untrained: 2 windows, then 1."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    pipe = tiny_pipelines.sd15()
    pipe.save_pretrained(folder / "base")
    place = folder / "run"
    recipe = {
        "name": "tiny",
        "model": {"family": "sd15", "base": str(folder / "base")},
        "validate": {"prompts": ["a red cube", "two cats"]},
        "stages": [{"windows": 2, "solver_steps": 2, "samples": 1280}, {"windows": 1, "solver_steps": 4, "samples": 1280}],
    }
    for stage in (1, 2):
        (place / f"stage-{stage}").mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in pipe.unet.state_dict().items()}, str(place / f"stage-{stage}" / "unet_ema.safetensors"))
    (place / "recipe.toml").write_text(reading.dump(reading.parse(recipe, "test")))
    return place


def test_a_run_of_any_family_is_measured_without_any_network(run, reflow, capsys, monkeypatch):
    """Students that are the teacher are as far from its many steps as its own few, to rounding."""
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(runs, "PATH_STEPS", 4)
    assert reflow("evaluate", "--run-dir", run, "--steps", 1, 2, "--guidance", 1, 3, "--per-prompt", 2, "--teacher-steps", 4) == 0
    report = json.loads((run / "report" / "report.json").read_text())
    rows = {(r["model"], r["steps"], r["guidance"]): r for r in report["rows"]}
    for guidance in (1.0, 3.0):
        for student, steps in (("student, 1 window", 1), ("student, 1 window", 2), ("student, 2 windows", 2)):
            own = rows["teacher", steps, guidance]["measures"]
            found = rows[student, steps, guidance]["measures"]
            if (student, steps) != ("student, 1 window", 2):  # more steps than windows: no longer the teacher's DDIM
                assert found["paired_latents"]["mean"] == pytest.approx(own["paired_latents"]["mean"], rel=1e-3)
            assert rows[student, steps, guidance]["evaluations"] == steps * (2 if guidance > 1 else 1)
            assert {"paired_pixels", "diversity_latents"} <= found.keys()
            assert rows[student, steps, guidance]["seconds"]["denoise"] > 0
    assert ("student, 2 windows", 1, 1.0) not in rows and "not at 1 steps: each of its windows needs one" in report["notes"][0]
    assert rows["teacher", 4, 1.0]["is_reference"] and "paired_pixels" not in rows["teacher", 4, 1.0]["measures"]
    straight = {(s["model"], s["windows"]): s for s in report["straightness"]}
    assert set(straight) == {("teacher", 1), ("teacher", 2), ("student, 1 window", 1), ("student, 2 windows", 2)}
    assert straight["teacher", 1]["path"] == straight["teacher", 2]["path"] and len(straight["teacher", 2]["window_deviation"]) == 2
    assert {m["label"] for m in report["models"]} == {"teacher", "student, 1 window", "student, 2 windows"}
    assert report["not_measured"]["fid_to_teacher"] == "needs --features inception=PATH"
    assert report["cost"]["network_evaluations"] == 4 * sum(r["evaluations"] for r in report["rows"])
    out = capsys.readouterr().out
    assert "student, 2 windows" in out and "Paired with teacher at 4 steps and the same guidance" in out
    assert reflow("evaluate", "--run-dir", run, "--steps", 1, 2, "--guidance", 1, 3, "--per-prompt", 2, "--teacher-steps", 4) == 0
    assert "is of these models and settings already" in capsys.readouterr().out


def test_a_runs_sample_is_the_same_in_every_batch(run):
    from reflow.evaluation.contenders.runs import RunSpec

    contender = RunSpec(run, 2).open("cpu", "fp32")
    together = contender.draw(["a red cube", "two cats", "a red cube"], [5, 6, 7], 2, 1.0)
    alone = contender.draw(["two cats"], [6], 2, 1.0)
    assert torch.allclose(together.latents[1], alone.latents[0], atol=1e-5) and together.images.shape[1] == 3
    with pytest.raises(UserError, match="is not finished"):
        RunSpec(run, 3).open("cpu", "fp32")
    with pytest.raises(UserError, match="needs a step for each of its 2 windows, and 1 was asked for"):
        RunSpec(run, 1).open("cpu", "fp32").check(1, 1.0)


def test_digits_options_and_the_others_do_not_mix(run, reflow):
    from reflow.commands import comparing

    with pytest.raises(UserError, match="belong to the digits' own report"):
        reflow("evaluate", "--pipeline", "A", "--samples", 60)
    parser = argparse.ArgumentParser()
    evaluate.arguments(parser)
    with pytest.raises(UserError, match="--limit is not read by the digits' own report"):
        comparing.refuse_for_digits(parser.parse_args(["--limit", "3"]))
    with pytest.raises(UserError, match="compares with a teacher; name it"):
        reflow("evaluate", "--pipeline", "A", "--protocol", "paired")


def test_pipelines_of_any_make_are_compared_with_their_teacher(run, reflow, capsys, monkeypatch, tmp_path):
    """The base's own DDIM with so many steps is the teacher; a folder, the same with another scheduler, and an exported student."""
    monkeypatch.setattr(timing, "ROUNDS", 1)
    base, student, prompts, out = run.parent / "base", tmp_path / "student", tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a red cube\ntwo cats\n")
    reflow("export", "--run-dir", run, "--stage", 1, "--dtype", "fp32", "--out", student)
    words = ("--pipeline", base, "--name", "euler", "--scheduler", "EulerDiscreteScheduler", "--steps", 2, "--pipeline", student, "--teacher", base,
             "--steps", 2, "--guidance", 1, "--per-prompt", 2, "--data", prompts, "--bootstrap", 2, "--out", out)  # fmt: skip
    assert reflow("evaluate", *words) == 0
    report = json.loads((out / "report.json").read_text())
    rows = {r["model"]: r for r in report["rows"]}
    assert set(rows) == {"euler", "student", "base"} and rows["base"]["is_reference"] and rows["student"]["evaluations"] == 2
    # Untrained, the student is its teacher's own two steps but for how diffusers spaces them; what tells is that the pairs share their noise.
    assert rows["student"]["measures"]["paired_pixels"]["mean"] < rows["student"]["measures"]["diversity_latents"]["mean"]
    assert {m["label"]: m["known"] and m["known"]["name"] for m in report["models"]} == {"base": None, "euler": None, "student": "reflow"}
    page = (out / "index.html").read_text()
    assert "euler" in page and "<script" in page and "http://" not in page.replace("http://www.w3.org", "") and not (out / "samples").exists()
    with pytest.raises(UserError, match="2 windows, and each of them needs a step|2 steps or more"):
        reflow("evaluate", "--pipeline", student, "--steps", 1, "--data", prompts, "--out", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_known_models_are_refused_in_settings_that_they_are_not_made_for(reflow, tmp_path, run):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    for words, said in (
        (("--steps", 8), r"made for 4 steps.*asked 8 steps: write --steps 4"),
        (("--steps", 4, "--guidance", 7.5), r"write --guidance 1"),
    ):
        with pytest.raises(UserError, match=said):
            reflow("evaluate", "--pipeline", run.parent / "base", "--known", "sdxl-lightning-4step", *words, "--data", prompts, "--out", tmp_path / "x")
