"""The report page: what its headline says, its curves, and what it keeps to itself."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from reflow.evaluation import page, pictures, runs
from reflow.recipes import reading


def interval(mean, half=0.01):
    return {"mean": mean, "low": mean - half, "high": mean + half, "excludes_zero": abs(mean) > half}


def difference(method, windows, steps, images, frechet, reference):
    values = {"images": interval(images), "frechet": interval(frechet), "frechet_to_reference": interval(reference)}
    return {"method": method, "windows": windows, "steps": steps, **values}


REPORT = {
    "settings": {"teacher_steps": 32},
    "differences": [
        difference("student, 4 windows", 4, 4, -0.05, -0.3, 0.001),
        difference("student, 2 windows", 2, 2, -0.11, -3.0, 0.002),
        difference("student, 2 windows", 2, 8, 0.0077, 0.005, 0.28),
    ],
}


def test_the_headline_tells_what_got_worse_and_nothing_else():
    lines = page.worse(REPORT)
    assert lines == ["Further from real scans (FD) than the teacher's 32 steps: student, 2 windows at 8 steps (by 0.28)."]
    report = copy.deepcopy(REPORT)
    report["differences"][2]["images"] = interval(0.05)
    report["differences"][0]["images"] = interval(0.02)
    report["differences"][1]["frechet"] = interval(0.4)
    told = page.worse(report)
    assert told[0].startswith("Further from the teacher's images than its own DDIM with as many steps: student, 4 windows at 4 steps (by 0.02); ")
    assert "student, 2 windows at 8 steps (by 0.05)" in told[0] and "student, 2 windows at 2 steps (by 0.4)" in told[1]
    assert page.more(report["differences"][1], "frechet") and not page.more(report["differences"][1], "images")


def test_a_teachers_sampler_has_its_own_name():
    """Of a flow it is Euler: as the report says, or in one from before it did as its recipe does."""
    report = copy.deepcopy(REPORT)
    report["differences"][2]["images"] = interval(0.05)
    by_recipe = {"resolved_recipe": {"student": {"network_time": "flow"}}}
    for told, name in (({}, "DDIM"), ({"teacher_sampler": "Euler"}, "Euler"), (by_recipe, "Euler"), ({"teacher_sampler": "DDIM"} | by_recipe, "DDIM")):
        assert page.worse(report | told)[0].startswith(f"Further from the teacher's images than its own {name} with as many steps: ")
        assert f"than the teacher's own {name} with as many" in page.summary(report | told)
        assert pictures.series(told | {"methods": [{"windows": None, "steps": 4, "method": "teacher"}, {"windows": 4, "steps": 4, "method": "student"}]})[0][0] \
            == f"teacher's own {name}"  # fmt: skip


@pytest.mark.parametrize("text, shown", [
    ("--run-dir=/home/me/my runs/x/", "--run-dir=.../x"), ("/a/b/c.toml", ".../c.toml"), ("~/secret/x", ".../x"),
    ('data.path=["/a/b","/c/d e"]', 'data.path=[".../b",".../d e"]'), ("stabilityai/sdxl", "stabilityai/sdxl"), ("runs/x", "runs/x"),
    ("https://x/y", "https://x/y"), ("this and / or that", "this and / or that"), ("7.5", "7.5"),
])  # fmt: skip
def test_paths_show_their_last_names(text, shown):
    assert page.shortened(text) == shown


def test_a_recipes_strings_are_shortened_and_nothing_else():
    text = 'base = "/models/my base"\nprompts = ["a \\"b\\" c", "/x/y"]\nsteps = [2, 4]\n'
    assert page.without_paths(text) == 'base = ".../my base"\nprompts = ["a \\"b\\" c", ".../y"]\nsteps = [2, 4]\n'


def test_students_of_as_many_windows_are_told_apart(tmp_path):
    """As in a run that distils its own straightened student: two stages of one window."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text(reading.dump(reading.load("digits-instaflow")))
    for stage in (1, 2):
        (tmp_path / "run" / f"stage-{stage}").mkdir()
        (tmp_path / "run" / f"stage-{stage}" / "unet_ema.safetensors").write_bytes(b"")
    labels = [student.label for student in runs.open_run(tmp_path / "run").students]
    assert labels == ["student, 1 window (stage 1)", "student, 1 window (stage 2)"]
    assert [pictures.windows_in(label) for label in (*labels, "student, 16 windows", "teacher")] == [1, 1, 16, 0]
    shown = pictures.ordered(dict.fromkeys([(labels[1], 1), (labels[0], 1), ("teacher", 1), ("teacher", 32)]))
    assert shown[:2] == [("teacher", 32), ("teacher", 1)] and set(shown[2:]) == {(label, 1) for label in labels}
    methods = [{"method": label, "windows": 1, "steps": steps} for label, steps in ((labels[0], 1), (labels[1], 1), (labels[1], 4))]
    assert [m["method"] for m in pictures.series({"methods": methods})[-1][2]] == [labels[1]] * 2
    report = {**REPORT, "differences": [{**difference(label, 1, 1, -0.1, 0, 0), "stage": i + 1} for i, label in enumerate(labels)]}
    assert page.summary(report).startswith("With 1 (stage 1) or 1 (stage 2) steps the student is closer to the teacher's 32 steps")
    report["differences"] = report["differences"][:1]
    assert page.summary(report).startswith("With 1 step the student is closer")


def train(stage, samples, loss=0.5):
    return {"stage": stage, "total_samples": samples, "loss": loss, "learning_rate": 1e-3}


def test_the_curves_of_a_run(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "draw", lambda axis, records, value, colour, label: drawn.append((label, [value(r) for r in records])))
    records = [train(0, 100), train(0, 200, 0.25), train(1, 300)]
    fixed = [{"stage": 0, "total_samples": 200, "windows": [{"tau": tau, "mse": m} for tau, m in ((0.0, 1.0), (0.0, 3.0), (0.25, 5.0))]}]
    assert pictures.progress(records, fixed, tmp_path / "a.png")
    assert drawn == [("", [0.5, 0.25, 0.5]), ("", [1e-3] * 3), ("at 0 of a window", [2.0]), ("at 0.25 of a window", [5.0])]
    assert pictures.progress(records, [], tmp_path / "b.png")
    sizes = [Image.open(tmp_path / f"{name}.png").size[0] for name in "ab"]
    assert sizes[0] * 2 == pytest.approx(sizes[1] * 3, rel=0.01)
    assert not pictures.progress([{"stage": 0, "total_samples": 1}], [], tmp_path / "c.png") and not (tmp_path / "c.png").exists()


def test_differences_are_shown_where_they_are():
    """Two digits: of one the few steps lack ink at a corner, of the other they have too much; the third is the same."""
    reference = torch.zeros(3, 1, 8, 8)
    few = reference.clone()
    few[0, 0, 0, 0], few[1, 0, 0, 0], few[2, 0, 0, 0] = -1.0, 1.0, 0.0
    images = {("teacher", 32): reference, ("teacher", 2): few, ("student, 2 windows", 2): reference, ("student, 2 windows", 8): few}
    labels, scale = torch.tensor([4, 5, 6]), 2
    found = np.asarray(pictures.difference_grid(images, labels, scale=scale, columns=2)).astype(int)
    side, gap = 32 * scale, 4 * scale
    # The reference, the teacher's 2 steps and the student's, the latter two with a row of differences; not the student at 8.
    assert found.shape[0] == side + gap + 2 * (2 * side + 3 * gap)
    left = found.shape[1] - 2 * (side + gap)
    spot = 2 * (side + gap) - gap // 2 + 2, left + 2
    missing, more = found[spot], found[spot[0], spot[1] + side + gap]
    assert missing[2] > 150 > missing[0] + 50 and more[0] > 150 > more[2] + 50
    student = found[2 * (side + gap) + side + 2 * gap + side + gap :, left:]
    assert (student[:side - gap] == 255).all()
