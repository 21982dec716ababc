"""`reflow evaluate` end to end on run directories made by hand, so that what must come out is known."""

import argparse
import functools
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from reflow.commands import evaluate
from reflow.errors import UserError
from reflow.evaluation import machine, methods, report
from reflow.evaluation import suite as suite_module
from reflow.evaluation.runs import open_run
from reflow.evaluation.suite import Settings, Suite
from reflow.models import registry
from reflow.recipes import reading

RECIPE = {
    "name": "by-hand",
    "stages": [
        {"windows": 2, "solver_steps": 2, "samples": 1280},
        {"windows": 1, "solver_steps": 4, "samples": 1280},
    ],
}


@pytest.fixture(scope="module")
def base(device):
    return registry.family("digits").load("builtin", device=device)


def make_run(folder, unets, log=True):
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(reading.dump(reading.parse(RECIPE, "test")))
    for i, state in enumerate(unets):
        (folder / f"stage-{i + 1}").mkdir()
        save_file(
            {k: v.cpu().contiguous() for k, v in state.items()}, str(folder / f"stage-{i + 1}" / "unet_ema.safetensors")
        )
    if log:
        windows = [{"window": k, "direction": 0.1 / (k + 1), "magnitude": 0.01} for k in range(2)]
        lines = [
            {"event": "train", "stage": 1, "samples": 1280 * n, "total_samples": 1280 * n, "windows": windows}
            | {"loss": 0.5 / n, "learning_rate": 1e-3 * n}
            for n in (1, 2)
        ]
        fixed = [{"window": k, "tau": tau, "mse": 0.2} for k in range(2) for tau in (0.0, 0.25)]
        lines.append({"event": "validate", "stage": 1, "total_samples": 2560, "windows": fixed})
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "tra')
    return folder


@pytest.fixture(scope="module")
def untrained(base, tmp_path_factory):
    """Students that are the teacher: K steps on K windows must be the teacher's own K-step DDIM."""
    state = base.unet.state_dict()
    return make_run(tmp_path_factory.mktemp("runs") / "untrained", [state, state])


@pytest.fixture(scope="module")
def evaluated(untrained, device):
    with pytest.MonkeyPatch.context() as patch:
        for name, small in (("TIMING_BATCH", 4), ("TIMING_ROUNDS", 1), ("PATH_STEPS", 8)):
            patch.setattr(suite_module, name, small)
        patch.setattr("sys.argv", ["/opt/bin/reflow", "evaluate", "--run-dir", str(untrained)])
        assert evaluate.run(arguments(untrained, samples=60, seeds=2, device=str(device))) == 0
    return json.loads((untrained / "report" / "report.json").read_text())


def arguments(folder, **changes):
    parser = argparse.ArgumentParser()
    evaluate.arguments(parser)
    words = [w for key, value in changes.items() for w in ([f"--{key}"] if value is True else [f"--{key}", str(value)])]
    return parser.parse_args(["--run-dir", str(folder), *words])


def test_an_untrained_student_is_the_teachers_own_ddim(evaluated):
    native = [d for d in evaluated["differences"] if d["steps"] == d["windows"]]
    assert [(d["windows"], d["steps"]) for d in native] == [(2, 2), (1, 1)]
    for d in native:
        assert abs(d["images"]["mean"]) < 1e-5 and abs(d["latents"]["mean"]) < 1e-5 and d["images"]["count"] == 120
    rows = {(m["method"], m["steps"]): m for m in evaluated["methods"]}
    own, student = rows["teacher", 2], rows["student, 2 windows", 2]
    assert student["frechet"]["values"] == pytest.approx(own["frechet"]["values"], rel=1e-3)
    # A window of an eps network is straight only at its start, and the teacher's 32 steps are another sample.
    assert own["paired_images"]["low"] > 0.01


def test_report_has_what_a_reader_needs(evaluated, untrained):
    rows = evaluated["methods"]
    assert [(m["method"], m["steps"]) for m in rows] == [
        ("teacher", 32),
        ("teacher", 4),
        ("teacher", 2),
        ("teacher", 1),
        ("student, 2 windows", 2),
        ("student, 1 window", 1),
        ("student, 1 window", 2),
        ("student, 1 window", 4),
    ]
    assert "paired_images" not in rows[0]
    for row in rows:
        assert (
            row["milliseconds_per_image"] > 0
            and 0 <= row["prompt_accuracy"]["mean"] <= 1
            and row["diversity"]["mean"] > 0
        )
        assert (
            len(row["frechet"]["values"]) == 2
            and row["frechet"]["low"] < row["frechet"]["mean"] < row["frechet"]["high"]
        )
    assert evaluated["classifier"]["held_out_accuracy"] >= 0.98
    floor = evaluated["floor"]
    assert evaluated["real_scans"] == 60 and 50 <= floor["set_size"] <= 60
    # The bias of finite sets: about twice the distance at half the size.
    ratio = floor["set_size"] / floor["smaller_set_size"]
    assert 0.7 * ratio < floor["smaller_mean"] / floor["mean"] < 1.3 * ratio
    assert {"processor", "cores"} <= evaluated["machine"].keys() and {"torch", "python"} <= evaluated["versions"].keys()
    assert evaluated["command"].startswith("reflow") and evaluated["weights"].keys() == {"stage-1", "stage-2"}
    assert all((untrained / "report" / f"{name}.png").is_file() for name in ("grid", "differences", "quality", "training", "curves"))


def test_page_is_self_contained(evaluated, untrained):
    page = (untrained / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert str(untrained) not in page and str(untrained.parent) not in page and ".../untrained" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "<script" not in page and "@import" not in page
    assert (
        evaluated["command"].split()[0] in page
        and f"{100 * evaluated['classifier']['held_out_accuracy']:.1f} %" in page
    )
    assert f"{evaluated['methods'][1]['frechet']['mean']:.2f}" in page and "solver_steps = 4" in page


def test_the_same_weights_are_not_measured_twice(evaluated, untrained, capsys, monkeypatch, tmp_path, device):
    monkeypatch.setattr(report, "make", lambda *a, **k: pytest.fail("measured again"))
    assert evaluate.run(arguments(untrained, samples=60, seeds=2, device=str(device))) == 0
    printed = capsys.readouterr().out
    assert "--again" in printed and "student, 2 windows" in printed and "index.html" in printed
    with pytest.raises(pytest.fail.Exception):
        evaluate.run(arguments(untrained, samples=60, seeds=2, again=True))
    with pytest.raises(pytest.fail.Exception):
        evaluate.run(arguments(untrained, samples=61, seeds=2))


def test_results_do_not_depend_on_batches_or_workers(base, untrained):
    settings = dict(samples=60, seeds=1, paths=8)
    first = Suite(base, Settings(**settings, batch=60), workers=1)
    second = Suite(base, Settings(**settings, batch=17), workers=2)
    method = methods.teacher_method(base, 2)
    bar = type("Bar", (), {"update": lambda *a: None, "set_postfix_str": lambda *a, **k: None})()
    (a,), (b,) = first.draw(method, bar), second.draw(method, bar)
    torch.testing.assert_close(a.latents, b.latents, rtol=1e-4, atol=1e-4)
    assert torch.equal(methods.noises(3, [5], (4, 8, 8)), methods.noises(3, [4, 5], (4, 8, 8))[1:])
    assert not torch.equal(methods.noises(3, [5], (4, 8, 8)), methods.noises(4, [5], (4, 8, 8)))


def test_trajectory_ends_where_the_sampler_ends(base, untrained, device):
    """32 small steps of a student: the path by hand and the exported scheduler agree."""
    run = open_run(untrained)
    student, text = run.students[0], base.encode_prompts(["a handwritten two", "a handwritten six"])
    noise = methods.noises(0, [0, 1], base.latent_shape()).to(device)
    path = methods.trajectory(base, base.unet, student, methods.fine_windows(student.windows, 8), noise, text)
    assert path.shape == (9, 2, *base.latent_shape()) and torch.equal(path[0], noise)
    want = methods.student_method(base, student, base.unet, 8).draw(noise, text)
    torch.testing.assert_close(path[-1], want, rtol=1e-4, atol=1e-4)


def test_bad_input(base, untrained, tmp_path):
    with pytest.raises(UserError, match="holds no run of reflow"):
        open_run(tmp_path)
    with pytest.raises(UserError, match="no finished stage yet"):
        open_run(make_run(tmp_path / "new", []))
    with pytest.raises(UserError, match="1797 real scans.*--unequal-sets"):
        Suite(base, Settings(samples=1798))
    with pytest.raises(UserError, match="too few"):
        Suite(base, Settings(samples=5))
    with pytest.raises(UserError, match="--seeds 0"):
        evaluate.run(arguments(untrained, seeds=0))


def test_damaged_weights(base, untrained, tmp_path):
    state = {k: v.clone() for k, v in base.unet.state_dict().items()}
    state["conv_in.weight"][0] = float("nan")
    suite = Suite(base, Settings(samples=60, seeds=1, batch=60))
    with pytest.raises(UserError, match="1 tensors of .*stage-1/unet_ema.safetensors are not finite, the first is conv_in.weight"):
        suite.evaluate(open_run(make_run(tmp_path / "nan", [state])))
    other = make_run(tmp_path / "other", [{"x": torch.zeros(1)}])
    with pytest.raises(UserError, match="stage-1/unet_ema.safetensors does not fit the base"):
        suite.evaluate(open_run(other))
    assert not (other / "report").exists()


def test_disjoint_parts_hold_the_classes_equally():
    labels = torch.tensor([0] * 10 + [1] * 7 + [2] * 4)
    a, b = suite_module.disjoint_parts(labels, 0.5, torch.Generator().manual_seed(0))
    assert labels[a].bincount().tolist() == labels[b].bincount().tolist() == [5, 3, 2]
    assert not set(a.tolist()) & set(b.tolist())


def test_machine_is_described():
    found = machine.describe()
    assert found["machine"]["cores"] >= 1 and found["machine"]["processor"]
    assert found["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_several_guidance_scales_have_a_report_each(base, untrained, tmp_path, capsys, device, monkeypatch):
    """An untrained student guided at 3 is its teacher's own DDIM guided at 3, in every report."""
    monkeypatch.setattr(suite_module, "Settings", functools.partial(Settings, teacher_steps=8, paths=8))
    for name, few in {"TIMING_BATCH": 4, "TIMING_ROUNDS": 1, "FLOOR_SPLITS": 2}.items():
        monkeypatch.setattr(suite_module, name, few)
    monkeypatch.setattr(report.pictures, "curves", lambda *a: None)  # of the training, which is drawn elsewhere
    monkeypatch.setattr(report.pictures, "progress", lambda *a: None)
    monkeypatch.setattr(report.page, "write", lambda found, new, recipe: (new / "index.html").write_text("page"))
    words = arguments(untrained, samples=60, seeds=1, out=tmp_path / "out", device=str(device))
    words.guidance = [1.0, 3.0]
    assert evaluate.run(words) == 0
    printed = capsys.readouterr().out
    assert "training seed 0, guidance 3" in printed and str(tmp_path / "out" / "guidance-3" / "index.html") in printed
    found = {scale: json.loads((tmp_path / "out" / f"guidance-{scale}" / "report.json").read_text()) for scale in (1, 3)}
    for scale, told in found.items():
        assert told["settings"]["guidance"] == scale
        native = [d for d in told["differences"] if d["steps"] == d["windows"]]
        assert native and all(abs(d["images"]["mean"]) < 1e-5 for d in native)
        paths = {(s["method"], s["windows"]): s["path"]["mean"] for s in told["straightness"]}
        assert paths["teacher", 2] > 0
    errors = [next(m["paired_images"]["mean"] for m in told["methods"] if m["method"] == "teacher" and m["steps"] == 2) for told in found.values()]
    assert abs(errors[0] - errors[1]) > 1e-3
    assert evaluate.run(words) == 0 and capsys.readouterr().out.count("is of these weights already") == 2
    # A run whose students have learnt a guidance has that one only.
    learnt = tmp_path / "learnt"
    shutil.copytree(untrained, learnt)
    (learnt / "recipe.toml").write_text((learnt / "recipe.toml").read_text().replace("guidance_scale = 1.0", "guidance_scale = 2.0", 1))
    run = open_run(learnt)
    assert report.make_suite(run, Settings(samples=60, guidance=2.0)).student_guidance == 1.0
    with pytest.raises(UserError, match="have learnt guidance 2 and are sampled without any, so they have no --guidance 3"):
        report.make_suite(run, Settings(samples=60, guidance=3.0))
    with pytest.raises(UserError, match="--guidance 0.5 is not possible"):
        words.guidance = [0.5]
        evaluate.run(words)
