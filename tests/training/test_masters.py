"""fp32 masters start from the fp32 weights, whatever dtype the network computes in."""

import pytest
import torch

import tiny
from reflow.training import engine
from reflow.training.ema import Ema


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_masters_equal_the_fp32_weights_to_the_bit(tmp_path, zero, precision):
    device = engine.init_distributed()
    network = torch.nn.Sequential(torch.nn.Linear(33, 17), torch.nn.Linear(17, 5, bias=False))
    start = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    assert any(not torch.equal(t, t.bfloat16().float()) for t in start.values())
    trained = engine.Engine(network, tiny.short(tmp_path, f"train.zero_stage={zero}", f"train.precision={precision}").train, 1)

    def is_start(buffers):
        found = trained.state(buffers)
        return found.keys() == start.keys() and all(torch.equal(found[k].cpu(), start[k]) for k in start)

    # What a stage of no steps would leave: a delta of nothing.
    assert is_start(trained.masters) and is_start(Ema(trained.masters).average)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    trained.backward(trained(torch.ones(2, 33, dtype=dtype, device=device)).float().square().sum())
    assert trained.step(0.0) and is_start(trained.masters)  # the first step does not read them from the rounded weights again
    trained.backward(trained(torch.ones(2, 33, dtype=dtype, device=device)).float().square().sum())
    assert trained.step(1e-2) and not is_start(trained.masters)
