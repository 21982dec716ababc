"""The README says what the committed results say."""

import json
import pathlib

import pytest

from bench import report
from bench.__main__ import main

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_readme_is_up_to_date():
    """The block of the bench is checked as soon as the README has its markers."""
    text = (ROOT / "README.md").read_text()
    blocks = [name for name in report.BLOCKS if name == "digits" or f"<!-- {name}:start -->" in text]
    assert main(["report", "--check", "--blocks", *blocks]) == 0


def test_a_changed_number_is_noticed(tmp_path):
    text = (ROOT / "README.md").read_text()
    number = f"{json.loads(report.DIGITS.read_text())['methods'][1]['paired_images']['mean']:.4f}"
    assert number in text
    readme = tmp_path / "README.md"
    readme.write_text(text.replace(number, "0.0000"))
    arguments = ["report", "--blocks", "digits", "--readme", str(readme), "--results", str(tmp_path / "none")]
    assert main([*arguments, "--check"]) == 1
    assert main(arguments) == 0 and readme.read_text() == text


def test_a_missing_marker_is_said():
    with pytest.raises(ValueError, match="x:start"):
        report.fill("no markers", "x", "block")


def test_the_committed_run_meets_its_promise():
    """Every training seed: the 4- and 2-step students are nearer to the teacher's 32 steps than its own 4 and 2 steps are."""
    result = json.loads(report.DIGITS.read_text())
    assert len(result["per_seed"]) == 3
    for seed in result["per_seed"]:
        own = {d["steps"]: d["images"] for d in seed["differences"] if d["steps"] == d["windows"]}
        assert own[4]["high"] < 0 and own[2]["high"] < 0
