"""`reflow experiment recipes`: one line a training, nothing made twice, and what counts as won."""

import json
import pathlib

import pytest

from reflow.commands import experiment
from reflow.errors import UserError
from reflow.experiments import recipes


def measured(error, own, samples=60):
    """A report with one stage of two windows and one of one, sampled at 2, 1 and 4 steps; the teacher was not sampled at 4."""
    def value(mean):
        return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01, "count": 9}

    students = [("student, 2 windows", 2, 2), ("student, 1 window", 1, 1), ("student, 1 window", 1, 4)]
    return {
        "settings": {"samples": samples}, "weights": {"stage-1": "a"},
        "methods": [*({"method": "teacher", "steps": n, "paired_images": value(own * n)} for n in (1, 2)), {"method": "teacher", "steps": 32},
                    *({"method": name, "steps": steps, "paired_images": value(error * steps)} for name, _, steps in students)],
        "differences": [{"method": name, "stage": 3 - windows, "windows": windows, "steps": steps, "images": value((error - own) * steps)} for name, windows, steps in students],
    }  # fmt: skip


@pytest.fixture
def trained(monkeypatch):
    """No training and no measuring: the trainings that were asked for, and errors by recipe and seed."""
    calls, errors = [], {}

    def train(name, folder, overrides, ranks, *, stages):
        seed = int(overrides[-1].rpartition("=")[2])
        calls.append((name, seed))
        errors[str(folder)] = errors.get((name, seed), 0.03 + 0.001 * seed)

    monkeypatch.setattr(recipes.digits_full, "train", train)
    monkeypatch.setattr(recipes, "open_run", lambda folder: folder)
    monkeypatch.setattr(recipes.report, "existing", lambda *_: None)
    monkeypatch.setattr(recipes.report, "make", lambda found, folder, settings, **_: measured(errors[str(found)], 0.05, settings.samples))
    return calls, errors


def run(out, *words):
    return experiment.run(_arguments("recipes", "--out", str(out), *words))


def _arguments(*words):
    import argparse

    parser = argparse.ArgumentParser()
    experiment.arguments(parser)
    return parser.parse_args(list(words))


def test_a_line_a_training_and_the_same_command_goes_on(tmp_path, trained, capsys):
    calls, _ = trained
    words = ["--recipe", "digits-perflow", "--recipe", "digits-phased", "--samples", "60"]
    assert run(tmp_path, *words, "--seeds", "2") == 0
    assert calls == [("digits-perflow", 0), ("digits-phased", 0), ("digits-perflow", 1), ("digits-phased", 1)]
    assert run(tmp_path, *words, "--seeds", "3") == 0 and calls[4:] == [("digits-perflow", 2), ("digits-phased", 2)]
    assert run(tmp_path, *words[:-1], "61", "--seeds", "1") == 0 and len(calls) == 8  # other samples are another measurement
    lines = [json.loads(line) for line in (tmp_path / "recipes.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and {"torch", "python"} <= lines[0]["versions"].keys() and "processor" in lines[0]["machine"]
    assert [(row["windows"], row["steps"]) for row in lines[0]["rows"]] == [(2, 2), (1, 1)]  # where the teacher was sampled too
    assert run(tmp_path, *words, "--seeds", "3") == 0
    found = json.loads((tmp_path / "recipes.json").read_text())["recipes"]
    assert [(x["recipe"], x["seeds"], x["won"]) for x in found] == [("digits-perflow", [0, 1, 2], True), ("digits-phased", [0, 1, 2], True)]
    row = found[0]["rows"][0]
    assert row["student"]["mean"] == pytest.approx(0.062) and row["teacher"]["mean"] == pytest.approx(0.1) and row["difference"]["mean"] == pytest.approx(-0.038)
    text = (tmp_path / "recipes.md").read_text()
    assert "| `digits-perflow` | 1 | 2 | 2 | 0.0620 | 0.1000 | -0.0380 ± 0.0050 | 3 |" in text and text in capsys.readouterr().out


@pytest.mark.parametrize("errors, seeds, won", [((0.03, 0.031, 0.032), 3, True), ((0.06, 0.061, 0.062), 3, False), ((0.03, 0.051, 0.06), 3, False), ((0.03,), 1, None)])
def test_a_recipe_is_won_where_the_interval_lies_below_zero(tmp_path, trained, errors, seeds, won):
    trained[1].update({("digits-perflow", seed): error for seed, error in enumerate(errors)})
    assert run(tmp_path, "--recipe", "digits-perflow", "--seeds", str(seeds), "--samples", "60") == 0
    assert json.loads((tmp_path / "recipes.json").read_text())["recipes"][0]["won"] is won


def test_bad_input_is_a_sentence(tmp_path):
    for words, said in [(["--seeds", "0"], "--seeds must be 1 or more"), (["--recipe", "digits-per"], "There is no recipe called 'digits-per'")]:
        with pytest.raises(UserError, match=said):
            run(tmp_path, *words)
    (tmp_path / "recipes.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="is not made of lines of this experiment"):
        run(tmp_path)


@pytest.mark.slow
@pytest.mark.launch
def test_a_short_training_for_real(tmp_path):
    small = ["stages.0.samples=256", "stages.0.pairs=64", "validate.every=0", "train.warmup=0"]
    assert run(tmp_path, "--recipe", "digits-perflow", "--seeds", "1", "--samples", "60", *(w for s in small for w in ("--set", s))) == 0
    line = json.loads((tmp_path / "recipes.jsonl").read_text())
    assert [row["steps"] for row in line["rows"]] == [4, 8, 16] and all(0 < row["student"] < 1 for row in line["rows"])


def test_the_readme_shows_what_was_measured():
    root = pathlib.Path(__file__).resolve().parents[2]
    result = json.loads((root / "bench" / "results" / "experiments" / "recipes.json").read_text())
    assert f"<!-- recipes:start -->\n{recipes.table(result, native=True)}<!-- recipes:end -->" in (root / "README.md").read_text()
    lines = [json.loads(line) for line in (root / "bench" / "results" / "experiments" / "recipes.jsonl").read_text().splitlines()]
    for found in result["recipes"]:
        mine = [line for line in lines if line["recipe"] == found["recipe"]]
        assert recipes.gather(mine) == found and found["won"] is True and len(found["seeds"]) >= 3
    assert {found["recipe"] for found in result["recipes"]} >= set(recipes.ALL) - {"digits"}
