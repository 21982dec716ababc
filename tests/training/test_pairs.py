"""Solved pairs that outlive their run: other recipes train on them without a teacher, and only where they fit."""

import argparse
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from reflow.commands import prepare
from reflow.errors import UserError
from reflow.training import run, solve_pairs

ONE = ("train.batch_size=8", "train.micro_batch=8", "validate.every=0")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    recipe = tiny.recipe(folder, *ONE)
    assert solve_pairs.solve(recipe, 1, 24, folder / "pairs") == 24
    return recipe, folder / "pairs"


def student(folder, *overrides):
    recipe = tiny.recipe(folder, *ONE, "stages.0.samples=24", *overrides)
    run.train(recipe.model_copy(update={"stages": recipe.stages[:1]}), folder / "run")
    return load_file(folder / "run" / "stage-1" / "unet_ema.safetensors")


def test_pairs_of_another_command_train_like_pairs_of_the_run(store, tmp_path):
    """Same seed and stage: the very same weights. Another seed and objective: another student, no solve at all."""
    own = student(tmp_path / "own", "stages.0.pairs=24")
    read = student(tmp_path / "read", f"stages.0.pairs_from={store[1]}")
    assert all(torch.equal(own[k], read[k]) for k in own)
    other = student(tmp_path / "other", f"stages.0.pairs_from={store[1]}", "stages.0.pairs=16", "train.seed=7", "objective.loss=mse")
    assert any(not torch.equal(own[k], other[k]) for k in own)
    assert [p.parent.parent.parent.name for p in tmp_path.glob("*/run/stage-1/pairs")] == ["own"]
    records = map(json.loads, (tmp_path / "read" / "run" / "log.jsonl").read_text().splitlines())
    assert {r["seconds"].get("teacher", 0) for r in records if r["event"] == "train"} == {0}


@pytest.mark.parametrize("override, named", [
    ("stages.0.solver_steps=2", "solver_steps: 1 -> 2"), ("teacher.guidance_scale=2.0", "teacher.guidance_scale: 1.0 -> 2.0"),
    ("stages.0.windows=8", "boundaries"), ("stages.0.pairs=25", "24 pairs"),
])  # fmt: skip
def test_pairs_that_do_not_fit_are_refused_by_name(store, tmp_path, override, named):
    with pytest.raises(UserError, match=named.replace("0.", "0[.]")):
        student(tmp_path, f"stages.0.pairs_from={store[1]}", override)


def test_a_killed_solve_goes_on_and_a_damaged_chunk_is_named(store, tmp_path):
    recipe, folder = store
    chunk = folder / "pairs-00000.safetensors"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-8])
    with pytest.raises(UserError, match="pairs-00000.safetensors"):
        student(tmp_path, f"stages.0.pairs_from={folder}")
    chunk.unlink()
    with pytest.raises(UserError, match="lacks 1 of its 1 chunks"):
        student(tmp_path / "b", f"stages.0.pairs_from={folder}")
    solve_pairs.solve(recipe, 1, 24, folder)
    assert chunk.read_bytes() == whole
    with pytest.raises(UserError, match="seed: 0 -> 5"):
        solve_pairs.solve(tiny.recipe(tmp_path, *ONE, "train.seed=5"), 1, 24, folder)
    with pytest.raises(UserError, match="--run-dir"):
        solve_pairs.solve(recipe, 2, 8, tmp_path / "c")


@pytest.mark.parametrize("name, change, words", [
    ("pairs.json", "[]", "is damaged"), ("pairs.json", '{"pairs": 1e3, "settings": {}}', "is damaged"), ("pairs.json", "[" * 9999, "not readable"),
    ("pairs.json", '{"pairs": 99999999999999, "settings": {}}', "is damaged"),
    ("item", lambda t: t + 10**6, "its item has a number outside 0 to 1796"), ("item", lambda t: t - 10**6, "its item has a number outside"),
    ("window", lambda t: t + 99, "its window has a number outside 0 to 3"), ("item", lambda t: t.float(), "its item is torch.float32"),
    ("z_start", lambda t: t[:, :, :2], "its z_start is torch.float32 .24, 4, 2, 8. and not"), ("z_end", lambda t: t[:5], "holds 5 pairs instead of 24"),
    ("z_end", lambda t: t.double(), "its z_end is torch.float64"), ("dropped", lambda t: t.view(2, -1), "its dropped is torch.bool .2, 12."),
    ("z_end", lambda t: t[0, 0, 0, 0].clone(), "its z_end is"), ("window", None, "it holds dropped, item, z_end, z_start and not"),
])  # fmt: skip
def test_a_doctored_store_is_refused_before_a_step(store, tmp_path, name, change, words):
    folder = shutil.copytree(store[1], tmp_path / "doctored")
    chunk = folder / "pairs-00000.safetensors"
    if name == "pairs.json":
        (folder / name).write_text(change)
    else:
        tensors = load_file(chunk)
        made = tensors.pop(name) if change is None else change(tensors[name])
        save_file(tensors if change is None else {**tensors, name: made.contiguous()}, chunk)
    with pytest.raises(UserError, match=words):
        student(tmp_path, f"stages.0.pairs_from={folder}")


def test_the_command_solves_pairs_and_says_how_to_use_them(store, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    prepare.arguments(parser)
    recipe = ["--recipe", str(store[1].parent / "tiny.toml"), "--set", "train.batch_size=8", "--set", "train.micro_batch=8"]
    out = tmp_path / "pairs"
    assert prepare.run(parser.parse_args(["--pairs", "8", "--out", str(out), *recipe])) == 0
    assert f"stages.0.pairs_from={out}" in capsys.readouterr().out
    ours, theirs = (load_file(folder / "pairs-00000.safetensors") for folder in (out, store[1]))
    assert all(torch.equal(ours[k], theirs[k][:8]) for k in ("item", "dropped", "window"))
    torch.testing.assert_close(ours["z_end"], theirs["z_end"][:8])  # solved in a batch of another size
    with pytest.raises(UserError, match="--family"):
        prepare.run(parser.parse_args(["--out", str(out)]))
    with pytest.raises(UserError, match="--recipe"):
        prepare.run(parser.parse_args(["--out", str(out), "--pairs", "4"]))
