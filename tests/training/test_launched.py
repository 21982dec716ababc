"""Two ranks through the deepspeed launcher."""

import json
import pathlib
import shutil
import signal
import threading
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

import tiny
import watch
from reflow.training import loop, run

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def matrix(launch, tmp_path_factory, request):
    """One launch for ZeRO 0 to 3, both optimizers and both precisions, each run whole and cut, and for what goes on in another layout."""
    out = tmp_path_factory.mktemp("matrix")
    asked = {item.callspec.params["name"] for item in request.session.items if item.function is test_an_interrupted_run_ends_bit_equal}
    (out / "names.json").write_text(json.dumps([name for name in NAMES if name in asked or name not in LONG]))
    with watch.watching() as seen, watch.leaving_after(1):
        assert run.train(tiny.short(out / "own", "train.zero_stage=1"), out / "one") == loop.LEFT_EARLY
    torch.save(seen["saved"], out / "one-saved.pt")
    finished = launch(HERE / "launched_matrix.py", out)
    assert (out / "result.json").exists(), finished.stdout[-3000:] + finished.stderr[-3000:]
    return out, json.loads((out / "result.json").read_text())


# The others stand for them in the short form.
LONG = {"zero0-adamw8bit-fp32", "zero0-adamw-merging", "zero1-adamw8bit-fp32", "zero3-adamw8bit-fp32",
        "zero0-adamw-bf16", "zero2-adamw-bf16", "zero2-adamw-lora", "zero2-adamw-merging"}
NAMES = [f"zero{z}-{o}-fp32" for o in ("adamw", "adamw8bit") for z in (0, 1, 2, 3)] + [f"zero{z}-adamw-bf16" for z in (0, 2, 3)] + [
    f"zero{z}-adamw-lora" for z in (2, 3)] + [f"zero{z}-adamw-merging" for z in (0, 2, 3)] + ["zero3-fused_adamw-fp32"]


@pytest.mark.launch
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in NAMES])
def test_an_interrupted_run_ends_bit_equal(matrix, name):
    row = next(row for row in matrix[1]["combinations"] if row["name"] == name)
    assert (row["code"], row["left"], row["again"]) == (0, 75, 0)
    assert row["same_weights"] and row["same_log"] and row["how"] == "same layout"
    assert row["partitioned"] == name.startswith("zero3")


EXACT = dict.fromkeys(("steps", "masters", "ema", "first", "second"), 0.0)


@pytest.mark.launch
@pytest.mark.parametrize("name", ["one-on-two", "zero2-on-zero3"])
def test_two_ranks_go_on_from_one_rank_and_from_another_zero_stage(matrix, name, digits_base):
    row = next(row for row in matrix[1]["resized"] if row["name"] == name)
    assert (row["code"], row["how"], row["differences"]) == (0, "other layout", EXACT)
    agrees(matrix[0] / name, matrix[0] / "zero2-adamw-fp32", digits_base, 1e-3, 1e-4)


@pytest.mark.launch
@pytest.mark.parametrize("name, zero, rounded, weights, loss", [
    ("zero2-adamw-fp32", 0, 0.0, 1e-3, 1e-4), ("zero3-adamw-bf16", 2, 0.0, 0.05, 0.02), ("zero2-adamw8bit-fp32", 1, 0.02, 0.05, 5e-3),
    pytest.param("zero0-adamw8bit-fp32", 3, 0.02, 0.05, 5e-3, marks=pytest.mark.slow),
])
def test_one_rank_goes_on_from_two(matrix, tmp_path, name, zero, rounded, weights, loss, digits_base):
    shutil.copytree(matrix[0] / f"{name}-cut", tmp_path / "run")
    optimizer, precision = name.split("-")[1:]
    recipe = tiny.short(tmp_path, f"train.zero_stage={zero}", f"train.optimizer={optimizer}", f"train.precision={precision}")
    with watch.watching() as seen:
        assert run.train(recipe, tmp_path / "run") == 0
    found = watch.differences(torch.load(matrix[0] / f"{name}-saved.pt"), seen["loaded"])
    assert {k: v for k, v in found.items() if k not in ("first", "second")} == {"steps": 0.0, "masters": 0.0, "ema": 0.0}
    if rounded:  # 8 bits in other blocks
        assert seen["how"].endswith("rounded again") and 0 < max(found["first"], found["second"]) < rounded
    else:
        assert seen["how"] == "other layout" and found["first"] == found["second"] == 0
    agrees(tmp_path / "run", matrix[0] / name, digits_base, weights, loss)
    resumed = next(r for r in map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines()) if r["event"] == "resume")
    assert resumed["ranks"] == [2, 1] and resumed["zero_stage"] == [int(name[4]), zero] and resumed["total_samples"] == 16


@pytest.mark.launch
def test_a_disk_that_is_full_for_one_rank_ends_all_with_a_sentence_and_loses_nothing(matrix):
    full = matrix[1]["full"]
    assert full["said"][0] == full["said"][1] and "rank 1: " in full["said"][0] and "rank 0" not in full["said"][0]
    assert "it goes on from stage-1-000000016" in full["said"][0]
    assert full["left"] == ["latest", "stage-1-000000016"] and full["again"] == 0
    a, b = (load_file(matrix[0] / name / "stage-1" / "unet_ema.safetensors") for name in ("full", "zero2-adamw-fp32"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def agrees(folder, whole, base, weights, loss):
    """A run that went on in another layout ends as the uninterrupted one does, to rounding: weights, and losses of the same samples."""
    a, b = (load_file(x / "stage-1" / "unet_ema.safetensors") for x in (folder, whole))
    assert relative(a, b, base.unet.state_dict()) < weights
    ours, theirs = dict(losses(folder)), dict(losses(whole))
    assert ours.keys() == theirs.keys() and ours == pytest.approx(theirs, rel=loss)


def relative(a, b, start):
    keys = [k for k in a if a[k].is_floating_point()]
    return float(sum((a[k] - b[k]).square().sum() for k in keys).sqrt() / sum((b[k] - start[k]).square().sum() for k in keys).sqrt())


@pytest.mark.launch
@pytest.mark.parametrize("kind, zeros", [("fp32", (0, 1, 2, 3)), pytest.param("merging", (0, 2, 3), marks=pytest.mark.slow)])  # whose targets are the average's, of all ranks
def test_zero_stages_agree_to_rounding(matrix, digits_base, kind, zeros):
    weights = [load_file(matrix[0] / f"zero{z}-adamw-{kind}" / "stage-1" / "unet_ema.safetensors") for z in zeros]
    if kind == "fp32":  # the optimizer of one pass, on the shards of two ranks
        weights.append(load_file(matrix[0] / "zero3-fused_adamw-fp32" / "stage-1" / "unet_ema.safetensors"))
    for other in weights[1:]:
        assert relative(other, weights[0], digits_base.unet.state_dict()) < 1e-3


@pytest.mark.launch
def test_one_rank_agrees_with_two_to_rounding(matrix, tmp_path, digits_base):
    assert run.train(tiny.short(tmp_path), tmp_path / "run") == 0
    one = load_file(tmp_path / "run" / "stage-1" / "unet_ema.safetensors")
    two = load_file(matrix[0] / "zero0-adamw-fp32" / "stage-1" / "unet_ema.safetensors")
    assert relative(one, two, digits_base.unet.state_dict()) < 1e-3
    assert not torch.equal(one["conv_out.weight"], digits_base.unet.state_dict()["conv_out.weight"])


def ranks_of(folder):
    """The training processes of a run, by rank."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if str(folder) in line and any(a.startswith("--local_rank=") for a in line):
            found[int(next(a.split("=")[1] for a in line if a.startswith("--local_rank")))] = process
    return found


def losses(folder):
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(r["total_samples"], r["loss"]) for r in records if r["event"] == "train"]


@pytest.mark.slow  # a killed rank by the launcher; test_kills.py kills without it
@pytest.mark.launch
def test_a_killed_rank_ends_the_others_and_the_same_command_ends_bit_equal(matrix, launch, tmp_path):
    tiny.recipe(tmp_path)

    def command(folder):
        sets = [a for o in tiny.LONGER for a in ("--set", o)]
        return ["scripts/train.py", "--recipe", tmp_path / "tiny.toml", "--run-dir", folder, *sets]

    def disturbed(number, rank, beyond):
        """Start, and once checkpoint number `beyond` stands send the signal to the rank(s)."""
        checkpoint = tmp_path / "cut" / "checkpoints" / f"stage-1-{beyond:09d}"
        started = threading.Thread(target=lambda: finished.append(launch(*command(tmp_path / "cut"))))
        finished = []
        started.start()
        end = time.monotonic() + 200
        while not checkpoint.exists():
            assert started.is_alive() and time.monotonic() < end, finished
            time.sleep(0.02)
        ranks_of(tmp_path / "cut")[rank].send_signal(number)
        start = time.monotonic()
        started.join(timeout=90)
        assert not started.is_alive() and time.monotonic() - start < 60 and not ranks_of(tmp_path / "cut")
        return finished[0]

    assert disturbed(signal.SIGKILL, 1, 64).returncode != 0
    asked = disturbed(signal.SIGUSR1, 0, 128)
    assert asked.returncode != 0 and "The same command goes on from there" in asked.stdout
    last = launch(*command(tmp_path / "cut"))
    assert last.returncode == 0, last.stderr
    whole = matrix[0] / "longer"
    for i in (0, 1):
        a, b = (load_file(x / f"stage-{i + 1}" / "unet_ema.safetensors") for x in (tmp_path / "cut", whole))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert losses(tmp_path / "cut") == losses(whole)
