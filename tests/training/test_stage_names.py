"""Stages are counted from 1 in a run directory; directories of versions that counted from 0 are read and go on as they are."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import tiny
from reflow.commands.common import open_run, stage_of, student_file
from reflow.evaluation import runs
from reflow.training import loop, run
from reflow.weights.runs import checkpoint_name, first, stage_folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    assert run.train(tiny.recipe(folder, "checkpoint.every=16"), folder / "run") == 0
    return folder / "run"


def numbered_from_zero(new, old):
    """The directory as an earlier version would have left it."""
    shutil.copytree(new, old)
    for number in (1, 2):
        (old / f"stage-{number}").rename(old / f"stage-{number - 1}")
        for folder in sorted((old / "checkpoints").glob(f"stage-{number}-*")):
            folder.rename(folder.with_name(folder.name.replace(f"stage-{number}", f"stage-{number - 1}", 1)))
    latest = old / "checkpoints" / "latest"
    latest.write_text(latest.read_text().replace("stage-2", "stage-1"))
    lines = [json.loads(line) for line in (old / "log.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({**x, "stage": x["stage"] - 1} if "stage" in x else x) + "\n" for x in lines)
    (old / "log.jsonl").write_text(text)
    return old


def test_folders_checkpoints_and_the_log_count_from_one(whole):
    assert sorted(p.name for p in whole.glob("stage-*")) == ["stage-1", "stage-2"]
    assert {p.name.split("-")[1] for p in (whole / "checkpoints").glob("stage-*")} <= {"1", "2"}
    stages = [json.loads(line).get("stage") for line in (whole / "log.jsonl").read_text().splitlines()]
    assert set(stages) - {None} == {1, 2}
    assert first(whole) == 1 and stage_folder(whole, 1) == whole / "stage-2" and checkpoint_name(whole, 0, 32) == "stage-1-000000032"


def test_an_old_directory_is_read_as_what_it_is(whole, tmp_path):
    old = numbered_from_zero(whole, tmp_path / "old")
    for number in (1, 2):
        mine, theirs = (student_file(*open_run(str(folder)), number) for folder in (whole, old))
        assert stage_of(mine) == stage_of(theirs) == number and theirs.parent.name == f"stage-{number - 1}"
        a, b = load_file(mine), load_file(theirs)
        assert all(torch.equal(a[k], b[k]) for k in a)
    here, there = runs.open_run(whole), runs.open_run(old)
    assert [r["stage"] for r in here.log("train")] == [r["stage"] for r in there.log("train")]
    assert [s.digest() for s in here.students] == [s.digest() for s in there.students]


def test_an_old_directory_goes_on_with_its_own_numbers(whole, tmp_path):
    recipe = tiny.recipe(tmp_path, "checkpoint.every=16")
    old = numbered_from_zero(whole, tmp_path / "old")
    (old / "stage-1" / "unet_ema.safetensors").unlink()
    assert run.train(recipe, old) in (0, loop.LEFT_EARLY)
    assert sorted(p.name for p in old.glob("stage-*")) == ["stage-0", "stage-1"]
    a, b = (load_file(f / "unet_ema.safetensors") for f in (whole / "stage-2", old / "stage-1"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert {json.loads(line).get("stage") for line in (old / "log.jsonl").read_text().splitlines()} - {None} == {0, 1}
