"""The optimizers of one pass: equal to AdamW, clip, average and copy one after another, at every ZeRO stage, and in what they store."""

import pytest
import torch

import tiny
from reflow.training import engine, shards
from reflow.training.ema import Ema

STEPS, RATE, CLIP, KEEP = 200, 3e-3, 3.5, 0.95
KINDS = [(zero, precision) for precision in ("fp32", "bf16") for zero in (0, 1, 2, 3)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def network(width=40):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(9, width), torch.nn.Tanh(), torch.nn.Linear(width, 3, bias=False))


def batch(step, dtype):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 9, generator=generator)
    return x.to(dtype), (4 * torch.tanh(x[:, :3]) * x[:, 3:6]).to(dtype)


def loss_of(module, step, dtype):
    x, y = batch(step, dtype)
    return (module(x) - y).float().square().mean()


def rate_of(step):
    return RATE * (1 - step / (2 * STEPS))


def settings(tmp_path, zero, precision, optimizer, clip=CLIP):
    return tiny.short(tmp_path, f"train.zero_stage={zero}", f"train.precision={precision}", f"train.optimizer={optimizer}", f"train.clip={clip}",
                      "train.weight_decay=0.1").train  # fmt: skip


def steps(trained, ema, first, last, precision):
    for step in range(first, last):
        trained.backward(loss_of(trained, step, DTYPES[precision]))
        ema.ride(KEEP)
        assert trained.step(rate_of(step))
        ema.update(KEEP)


def build(tmp_path, zero, precision, optimizer, width=40, clip=CLIP):
    trained = engine.Engine(network(width), settings(tmp_path, zero, precision, optimizer, clip), 1)
    return trained, Ema(trained.masters, trained.tail)


def plain(precision, clip=CLIP):
    """Masters and average by name after the steps, by torch alone: cast, clip, AdamW, lerp, copy."""
    module = network()
    masters = {n: torch.nn.Parameter(p.detach().clone()) for n, p in module.named_parameters()}
    module.to(DTYPES[precision])
    average = {n: m.detach().clone() for n, m in masters.items()}
    optimizer = torch.optim.AdamW(masters.values(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    clipped = 0
    for step in range(STEPS):
        loss_of(module, step, DTYPES[precision]).backward()
        for name, p in module.named_parameters():
            masters[name].grad, p.grad = p.grad.float(), None
        if clip:
            clipped += int(torch.nn.utils.clip_grad_norm_(masters.values(), clip) > clip)
        optimizer.param_groups[0]["lr"] = rate_of(step)
        optimizer.step()
        with torch.no_grad():
            for name, p in module.named_parameters():
                average[name].lerp_(masters[name], 1 - KEEP)
                p.copy_(masters[name])
    assert not clip or 20 < clipped < STEPS - 20  # both sides of the clip
    return {n: m.detach() for n, m in masters.items()}, average


def close(mine, theirs):
    """To a few roundings of fp32, of the largest weight of a tensor."""
    assert mine.keys() == theirs.keys()
    for name, wanted in theirs.items():
        torch.testing.assert_close(mine[name], wanted, rtol=0, atol=4e-7 * float(wanted.abs().max()), msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("zero, precision", KINDS)
def test_two_hundred_steps_equal_clip_adamw_average_and_copy(tmp_path, zero, precision):
    engine.init_distributed()
    trained, ema = build(tmp_path, zero, precision, "fused_adamw")
    steps(trained, ema, 0, STEPS, precision)
    if zero or precision == "fp32":
        masters, average = plain(precision)
    else:  # DeepSpeed takes the norm of bf16 gradients in bf16 here, so its own AdamW is what equals
        other, theirs = build(tmp_path, zero, precision, "adamw")
        steps(other, theirs, 0, STEPS, precision)
        masters, average = other.state(other.masters), other.state(theirs.average)
    close(trained.state(trained.masters), masters)
    close(trained.state(ema.average), average)
    assert any(not torch.equal(average[n], masters[n]) for n in masters)
    # The network computes with what the masters say.
    for (name, p), whole in zip(trained.params.items(), trained.whole(trained.masters)):
        shape = p.ds_shape if zero == 3 else p.shape
        assert whole[0] == name and whole[1].shape == shape
        mine = (p.ds_tensor if zero == 3 else p.data).reshape(-1)[: whole[1].numel()]
        assert torch.equal(mine, whole[1].reshape(-1).to(DTYPES[precision]))
    trained.destroy()
