"""`reflow experiment`: what is listed, how options reach `run`, and how seeds of the full run are put together."""

import argparse
import importlib
import json

import pytest

from reflow.commands import experiment
from reflow.errors import UserError
from reflow.experiments import digits_full, everything


def arguments(*words):
    parser = argparse.ArgumentParser()
    experiment.arguments(parser)
    return parser.parse_args(list(words))


def test_the_list_names_every_module_with_its_first_line(capsys):
    assert experiment.run(arguments()) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert {"digits", "digits-teacher"} <= set(names) and names == sorted(names)
    assert "The full run on digits" in lines[names.index("digits")]


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="'digit'.*did you mean 'digits'"):
        experiment.run(arguments("digit"))


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A module of experiments in a folder of its own; calls of its `run` are kept."""
    (tmp_path / "some_figure.py").write_text(
        '"""One figure."""\n\nNAME = "figure"\nCALLS = []\n\n\n'
        "def run(out, *, steps: int = 4, rate: float = 0.5, recipe: str = 'x', fast: bool = False, set_: tuple = ()):\n"
        "    CALLS.append((out, steps, rate, recipe, fast, set_))\n"
    )
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "helper.py").write_text("def help_me():\n    pass\n")
    monkeypatch.setattr(experiment.experiments, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(experiment.experiments, "__path__", [str(tmp_path)])
    import sys

    yield
    sys.modules.pop("reflow.experiments.some_figure", None)


def test_options_are_those_of_run(made):
    assert set(experiment.available()) == {"figure"}
    assert experiment.run(arguments("figure")) == 0
    words = ["--steps", "8", "--rate", "2", "--recipe", "y", "--fast", "--set", "a=1", "--set", "b=2", "--out", "o"]
    assert experiment.run(arguments("figure", *words)) == 0
    from reflow.experiments import some_figure

    first, second = some_figure.CALLS
    assert (str(first[0]), *first[1:5], list(first[5])) == ("runs/experiments/figure", 4, 0.5, "x", False, [])
    assert (str(second[0]), *second[1:]) == ("o", 8, 2.0, "y", True, ["a=1", "b=2"])


def test_an_unknown_option_is_refused(made, capsys):
    with pytest.raises(SystemExit) as stopped:
        experiment.run(arguments("figure", "--step-count", "8"))
    assert stopped.value.code == 2 and "--step-count" in capsys.readouterr().err


def value(mean, low=None, high=None, **more):
    return {"mean": mean, "low": low, "high": high, "count": 9, **more}


def seed_report(seed, error, distance):
    student = {"method": "student, 2 windows", "stage": 1, "windows": 2, "steps": 2}
    difference = value(error - 0.5, error - 0.6, error - 0.4, excludes_zero=True)
    return {
        "recipe": "r",
        "training_seed": seed,
        "settings": {"teacher_steps": 32},
        "sampling_seeds": [0],
        "real_scans": 9,
        "classifier": {},
        "floor": {},
        "timing": {},
        "machine": {},
        "versions": {},
        "seconds": {},
        "weights": {},
        "straightness": [],
        "methods": [
            {
                "method": "teacher",
                "stage": None,
                "windows": None,
                "steps": 32,
                "frechet": value(0.5),
                "diversity": value(1.0),
                "milliseconds_per_image": 9.0,
            },
            {
                **student,
                "frechet": value(distance),
                "diversity": value(0.9),
                "paired_images": value(error),
                "milliseconds_per_image": distance,
            },
        ],
        "differences": [
            {
                **student,
                "images": difference,
                "latents": difference,
                "frechet": {**value(0.1, -1, 1), "excludes_zero": False},
                "frechet_to_reference": value(0.2, excludes_zero=False),
            }
        ],
    }


def test_training_seeds_are_put_together():
    reports = [seed_report(0, 0.1, 1.0), seed_report(1, 0.2, 2.0), seed_report(2, 0.3, 6.0)]
    result = digits_full.gather(reports, [1.0, 2.0, 3.0])
    teacher, student = result["methods"]
    assert teacher == reports[0]["methods"][0]
    assert student["frechet"]["mean"] == 3.0 and student["frechet"]["values"] == [1.0, 2.0, 6.0]
    # Standard deviation of the errors 0.1, and Student's t with two degrees of freedom.
    half = 4.302652729911275 * 0.1 / 3**0.5
    assert student["paired_images"]["high"] - 0.2 == pytest.approx(half) and student["milliseconds_per_image"] == 2.0
    (difference,) = result["differences"]
    assert difference["images"]["mean"] == pytest.approx(-0.3)
    assert difference["below_zero_for_every_seed"] == {
        "images": True,
        "latents": True,
        "frechet": False,
        "frechet_to_reference": False,
    }
    assert result["frechet_relative_to_teacher"]["student, 2 windows, 2 steps"] == pytest.approx(6.0)
    assert [s["training_seed"] for s in result["per_seed"]] == result["training_seeds"] == [0, 1, 2]
    json.dumps(result)


def test_one_seed_above_zero_spoils_it():
    result = digits_full.gather([seed_report(0, 0.1, 1.0), seed_report(1, 0.7, 1.0)], [1.0, 1.0])
    assert not result["differences"][0]["below_zero_for_every_seed"]["images"]


def test_a_finished_seed_is_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(digits_full.subprocess, "run", lambda *a, **k: pytest.fail("trained again"))
    (tmp_path / "seed-0" / "stage-1").mkdir(parents=True)
    (tmp_path / "seed-0" / "stage-1" / "unet_ema.safetensors").touch()
    digits_full.train("digits-quick", tmp_path / "seed-0", [], 2, stages=1)
    with pytest.raises(pytest.fail.Exception):
        digits_full.train("digits-quick", tmp_path / "seed-0", [], 2, stages=2)


@pytest.mark.slow
@pytest.mark.launch
def test_two_seeds_through_the_launcher(tmp_path, monkeypatch, capsys):
    """The whole experiment in miniature, and the same command again: it trains and measures nothing twice."""
    small = [f"stages.{i}.{key}" for i in range(3) for key in ("samples=256", "pairs=128")]
    options = dict(recipe="digits-quick", seeds=2, samples=60, sampling_seeds=2, set_=("validate.every=0", *small))
    digits_full.run(tmp_path / "out", **options)
    result = json.loads((tmp_path / "out" / "digits.json").read_text())
    assert result["training_seeds"] == [0, 1] and result["ranks"] >= 1 and all(s > 0 for s in result["training_seconds"])
    assert [(d["windows"], d["steps"]) for d in result["differences"]] == [(8, 8), (4, 4), (2, 2), (2, 4), (2, 8)]
    first, second = (seed["weights"]["stage-3"] for seed in result["per_seed"])
    assert first != second
    teachers = [[m["frechet"]["values"] for m in seed["methods"] if m["windows"] is None] for seed in result["per_seed"]]
    assert teachers[0] == teachers[1]
    assert result["resolved_recipe"]["stages"][2]["samples"] == 256 and result["machine"]["cores"] >= 1
    assert all((tmp_path / "out" / name).stat().st_size for name in ("digits.png", "digits-samples.png"))

    monkeypatch.setattr(digits_full.subprocess, "run", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr(digits_full.report, "make", lambda *a, **k: pytest.fail("measured again"))
    capsys.readouterr()
    digits_full.run(tmp_path / "out", **options)
    again = json.loads((tmp_path / "out" / "digits.json").read_text())
    assert again["methods"] == result["methods"] and "training seed 1:" in capsys.readouterr().out


def test_a_failed_launch_is_told_and_its_time_is_kept(tmp_path, monkeypatch):
    calls = []

    def failing(command, env):
        calls.append(command)
        return argparse.Namespace(returncode=3)

    monkeypatch.setattr(digits_full.subprocess, "run", failing)
    for _ in range(2):
        with pytest.raises(UserError, match="exit code 3.*same command goes on"):
            digits_full.train("digits-quick", tmp_path / "seed-1", ["train.seed=1"], 2, stages=1)
    assert digits_full.taken(tmp_path)["seed-1"] >= 0
    command = calls[0]
    assert command[1:3] == ["-m", "deepspeed.launcher.runner"] and command[-2:] == ["--set", "train.seed=1"]
    assert command[command.index("--num_accelerators") + 1] == "2" and str(tmp_path / "seed-1") in command


def test_all_is_every_experiment_that_has_a_bed(tmp_path, monkeypatch, capsys):
    known = experiment.available()
    with_beds = {name for name, one in known.items() if one.options and "bed" in one.options}
    assert set(everything.ORDER) == with_beds - {"all"} and set(everything.ON_DIGITS) <= set(everything.ORDER)
    asked = []
    for name in everything.ORDER:
        module = importlib.import_module(known[name].module)
        monkeypatch.setattr(module, "run", lambda out, name=name, **options: asked.append((name, out, options)))
    everything.run(tmp_path, quick=True)
    assert [name for name, _, _ in asked] == list(everything.ORDER) and all(out == tmp_path / name for name, out, _ in asked)
    assert asked[0][2] == {"bed": "exact", "data": "", "quick": True, "report": False, "device": "cpu"}
    asked.clear()
    everything.run(tmp_path, bed="digits")
    assert tuple(name for name, _, _ in asked) == everything.ON_DIGITS
    with pytest.raises(UserError, match="all is there for --bed exact or mnist or digits, not 'cifar'"):
        everything.run(tmp_path, bed="cifar")
