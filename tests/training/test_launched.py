"""Two ranks through the deepspeed launcher."""

import json
import pathlib
import signal
import threading
import time

import psutil
import pytest
import tiny
import torch
from safetensors.torch import load_file

from reflow.training import run

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def matrix(launch, tmp_path_factory):
    """One launch for ZeRO 0 to 3, both optimizers and both precisions, each run whole and interrupted."""
    out = tmp_path_factory.mktemp("matrix")
    finished = launch(HERE / "launched_matrix.py", out)
    assert (out / "result.json").exists(), finished.stdout[-3000:] + finished.stderr[-3000:]
    return out, {row["name"]: row for row in json.loads((out / "result.json").read_text())}


NAMES = [f"zero{z}-{o}-fp32" for o in ("adamw", "adamw8bit") for z in (0, 1, 2, 3)] + [f"zero{z}-adamw-bf16" for z in (0, 2, 3)]


@pytest.mark.launch
@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_run_ends_bit_equal(matrix, name):
    row = matrix[1][name]
    assert (row["code"], row["left"], row["again"]) == (0, 75, 0)
    assert row["same_weights"] and row["same_log"]
    assert row["partitioned"] == name.startswith("zero3")


def relative(a, b, start):
    keys = [k for k in a if a[k].is_floating_point()]
    return float(sum((a[k] - b[k]).square().sum() for k in keys).sqrt() / sum((b[k] - start[k]).square().sum() for k in keys).sqrt())


@pytest.mark.launch
def test_zero_stages_agree_to_rounding(matrix, digits_base):
    weights = [load_file(matrix[0] / f"zero{z}-adamw-fp32" / "stage-1" / "unet_ema.safetensors") for z in (0, 1, 2, 3)]
    for other in weights[1:]:
        assert relative(other, weights[0], digits_base.unet.state_dict()) < 1e-3


@pytest.mark.launch
def test_one_rank_agrees_with_two_to_rounding(matrix, tmp_path, digits_base):
    assert run.train(tiny.recipe(tmp_path), tmp_path / "run") == 0
    one = load_file(tmp_path / "run" / "stage-1" / "unet_ema.safetensors")
    two = load_file(matrix[0] / "zero0-adamw-fp32" / "stage-1" / "unet_ema.safetensors")
    assert relative(one, two, digits_base.unet.state_dict()) < 1e-3
    assert not torch.equal(one["conv_out.weight"], digits_base.unet.state_dict()["conv_out.weight"])


LONGER = ("stages.0.samples=256", "stages.1.samples=32", "checkpoint.every=32", "log.every=16", "checkpoint.keep=9", "train.zero_stage=2")


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


@pytest.mark.launch
def test_a_killed_rank_ends_the_others_and_the_same_command_ends_bit_equal(launch, tmp_path):
    tiny.recipe(tmp_path)

    def command(folder):
        sets = [a for o in LONGER for a in ("--set", o)]
        return ["scripts/train.py", "--recipe", tmp_path / "tiny.toml", "--run-dir", folder, *sets]

    def disturbed(number, rank, beyond):
        """Start, and once checkpoint number `beyond` stands send the signal to the rank(s)."""
        checkpoint = tmp_path / "cut" / "checkpoints" / f"stage-0-{beyond:09d}"
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
    whole = launch(*command(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    for i in (0, 1):
        a, b = (load_file(tmp_path / x / f"stage-{i}" / "unet_ema.safetensors") for x in ("cut", "whole"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
