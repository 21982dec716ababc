"""Full disks, in every command: one sentence that names the place, nothing half-written, and the same command goes on to the same end."""

import json
import re
import shutil
import sys
import types

import numpy as np
import pytest
from PIL import Image

import full_disk
import tiny
from reflow.data import digits

RECIPE = ("stages.0.samples=48", "stages.0.pairs=32", "validate.images=1", "validate.pairs=1", "validate.every=32", "log.every=16", "checkpoint.every=16",
          "checkpoint.keep=9")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    pixels, labels = digits.images()
    for i in range(12):
        Image.fromarray(((pixels[i, 0].numpy() + 1) * 127.5).round().astype(np.uint8)).resize((16, 16 + 8 * (i % 2))).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(digits.caption(int(labels[i])))
    (folder / "999.png").write_bytes(b"no picture")
    (folder / "999.txt").write_text("nothing")
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    short = tiny.short(folder, *RECIPE)
    from reflow.recipes import reading
    (folder / "short.toml").write_text(reading.dump(short))
    return folder / "short.toml"


# The command, the option that names its output, and where the disk is full: for files beyond a size, or at a place.
COMMANDS = {
    "train": (["train", "--recipe", "RECIPE"], "--run-dir",
              (0, 100, "out/.rules", "out/log.jsonl", "out/tensorboard", "out/validation", 30_000, 300_000, "out/checkpoints/.latest",
               "out/checkpoints/.stage-1-000000032.tmp/.state", "out/.log.jsonl")),
    "prepare": (["prepare", "--family", "digits", "--data", "SCANS", "--batch-size", "4", "--shard-size", "8", "--max-bad-share", "0.2"], "--out",
                (0, 100, 1000, 3000, 9_000, 20_000)),
    "prepare by size": (["prepare", "--family", "digits", "--data", "SCANS", "--batch-size", "4", "--shard-size", "8", "--max-bad-share", "0.2",
                         "--buckets", "16x16", "16x24"], "--out", (150, 800)),
    "prepare --pairs": (["prepare", "--pairs", "600", "--recipe", "RECIPE"], "--out", (0, 100, 2000, 200_000)),
    "sample": (["sample", "--run-dir", "RUN", "--prompt", "a handwritten seven", "--count", "2"], "--out", (0, 100, 400)),
    "evaluate": (["evaluate", "--run-dir", "RUN"], "--out", (0, 150, 1500)),
    "export": (["export", "--run-dir", "RUN"], "--out", (0, 500, 3_000, 30_000, 500_000)),
    "export a delta": (["export", "--run-dir", "RUN", "--format", "delta"], "--out=.safetensors", (0, 30_000, 1_000_000)),
    "merge": (["merge", "--base", "builtin", "--delta", "DELTA", "--dtype", "fp32"], "--out", (0, 3_000, 500_000)),
}


@pytest.fixture
def measured(monkeypatch):
    """`reflow evaluate` without its minutes of measuring: what it writes, of the sizes in which it writes it."""
    from reflow.evaluation import report

    def draw(*args):
        args[-1].write_bytes(b"x" * 1000)

    suite = types.SimpleNamespace(evaluate=lambda run: {"recipe": "tiny", "training_seed": 0}, pictures={}, labels=None)
    monkeypatch.setattr(report, "make_suite", lambda *_: suite)
    for name in ("sample_grid", "difference_grid"):
        monkeypatch.setattr(report.pictures, name, lambda *_: Image.new("L", (9, 9)))
    for name in ("quality", "curves", "progress"):
        monkeypatch.setattr(report.pictures, name, draw)
    monkeypatch.setattr(report.page, "render", lambda *_: "x" * 3000)
    monkeypatch.setattr("reflow.evaluation.table.text", lambda _: "a table")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(name, measured, reflow, run_dir, recipe, scans, tmp_path, monkeypatch):
    words, option, sizes = COMMANDS[name]
    option, _, suffix = option.partition("=")
    monkeypatch.setattr(sys, "argv", ["reflow"])  # which the report tells
    monkeypatch.chdir(tmp_path)
    for folder in ("free", "full"):
        (tmp_path / folder).mkdir()
    if "DELTA" in words:
        reflow("export", "--run-dir", run_dir, "--format", "delta", "--out", "delta.safetensors")
    places = {"RECIPE": recipe, "SCANS": scans, "RUN": run_dir, "DELTA": "delta.safetensors"}
    words = [places.get(word, word) for word in words]
    code, said = full_disk.command([*words, option, f"free/out{suffix}"])
    assert code == 0, said
    wanted = full_disk.tree(tmp_path / "free")
    # In one folder: each time the command goes on from where it met the disk's end before.
    for full in sizes:
        room = {"size": full} if isinstance(full, int) else {"place": f"full/{full}"}
        code, said = full_disk.command([*words, option, f"full/out{suffix}"], **room)
        assert code in (1, 2) and re.fullmatch(r"reflow: .*full/out.*", said), (full, said)
        assert "should not happen" not in said and ".tmp" not in said, (full, said)
        assert ("File too large" if isinstance(full, int) else "No space left") in said, (full, said)
        for path, content in full_disk.tree(tmp_path / "full").items():
            unfinished = path.endswith((".journal", ".next")) or "manifest" in path  # from which the same command goes on
            assert unfinished or (path in wanted and wanted[path] in (None, content)), f"{path} is half-written: {full}, {said}"
    code, said = full_disk.command([*words, option, f"full/out{suffix}"])
    assert code == 0, said
    found = full_disk.tree(tmp_path / "full")
    assert found.keys() == wanted.keys() and [k for k in wanted if found[k] != wanted[k]] == []
    if name == "train":
        logs = [[json.loads(line) for line in (tmp_path / f / "out" / "log.jsonl").read_text().splitlines()] for f in ("free", "full")]
        curves = [[(r["event"], r["total_samples"], r.get("loss"), r.get("windows")) for r in log] for log in logs]
        assert curves[0] == curves[1]
    shutil.rmtree(tmp_path)
