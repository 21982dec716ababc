"""The committed run of the flow bed: the student beats its teacher at equal steps, and the README says what the file says."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULT = json.loads((ROOT / "bench" / "results" / "experiments" / "digits-flow.json").read_text())


def value(method, steps, key):
    return next(m[key] for m in RESULT["methods"] if (m["method"], m["steps"]) == (method, steps))


def test_students_are_closer_than_their_teacher_at_equal_steps_in_every_seed():
    native = [d for d in RESULT["differences"] if d["steps"] == d["windows"]]
    assert [d["windows"] for d in native] == [8, 4, 2] and RESULT["training_seeds"] == [0, 1, 2]
    assert all(d["images"]["high"] < 0 and d["below_zero_for_every_seed"]["images"] for d in native)
    assert RESULT["resolved_recipe"]["student"]["shift"] == 2.0 and RESULT["recipe"] == "digits-flow"


def test_the_readme_says_what_the_file_says():
    text = (ROOT / "README.md").read_text()
    for windows in (8, 4, 2):
        student = value(f"student, {windows} windows", windows, "paired_images")
        half = (student["high"] - student["low"]) / 2
        assert f"{student['mean']:.4f} ± {half:.4f}".replace("0.", ".") in text
        assert f"{value('teacher', windows, 'paired_images')['mean']:.4f}"[1:] in text
    assert f"{value('teacher', 2, 'frechet')['mean']:.2f}" in text and f"{value('teacher', 32, 'frechet')['mean']:.2f}" in text
