"""Two ranks through the deepspeed launcher."""

import json
import pathlib

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


NAMES = [f"zero{z}-adamw-{p}" for z in (0, 1, 2, 3) for p in ("fp32", "bf16")] + [f"zero{z}-adamw8bit-fp32" for z in (0, 1, 2, 3)]


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
