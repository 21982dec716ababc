"""The optimizers of one pass: equal to AdamW, clip, average and copy one after another, at every ZeRO stage, and in what they store."""

import functools
import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from reflow.errors import UserError
from reflow.training import engine
from reflow.training.ema import Ema

STEPS, RATE, CLIP, KEEP = 200, 3e-3, 30.0, 0.95
KINDS = [(zero, precision) for precision in ("fp32", "bf16") for zero in (0, 1, 2, 3)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Layers(torch.nn.Module):
    """Layers side by side, so that gradients are what a step draws, whatever the weights: no rounding of theirs grows in a network."""

    def __init__(self, width):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(9, width), torch.nn.Linear(9, 3, bias=False)])

    def forward(self, x, r):
        return sum((layer(x) * r[:, :layer.out_features]).sum() for layer in self.layers)


def network(width=40):
    torch.manual_seed(0)
    return Layers(width)


def loss_of(module, step, dtype, width=40):
    generator = torch.Generator().manual_seed(step)
    x, r = (torch.randn(8, size, generator=generator) for size in (9, width))
    return module(x.to(DEVICE, dtype), (r * (0.2 + step % 7 / 7)).to(DEVICE, dtype)).float()


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


@functools.cache
def plain(precision, clip=CLIP):
    """Masters and average by name after the steps, by torch alone: cast, clip, AdamW, lerp, copy."""
    module = network().to(DEVICE)
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
        torch.testing.assert_close(mine[name], wanted, rtol=0, atol=4e-7 * float(wanted.detach().abs().max()), msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("zero, precision, groups", [(*kind, 1) for kind in KINDS] + [(3, "bf16", 2)])
def test_two_hundred_steps_equal_clip_adamw_average_and_copy(tmp_path, monkeypatch, zero, precision, groups):
    engine.init_distributed()
    if groups > 1:  # as ZeRO 3 holds a network of more than sub_group_size weights
        config = engine.config_for
        monkeypatch.setattr(engine, "config_for", lambda *a: engine.overlay(config(*a), {"zero_optimization": {"sub_group_size": 100}}, "test"))
    trained, ema = build(tmp_path, zero, precision, "fused_adamw")
    assert zero == 0 or len(trained.masters) == groups
    steps(trained, ema, 0, STEPS, precision)
    masters, average = plain(precision)
    close(trained.state(trained.masters), {n: m.cpu() for n, m in masters.items()})
    close(trained.state(ema.average), {n: a.cpu() for n, a in average.items()})
    assert any(not torch.equal(average[n], masters[n]) for n in masters)
    # The network computes with what the masters say.
    for (name, p), whole in zip(trained.params.items(), trained.whole(trained.masters)):
        shape = p.ds_shape if zero == 3 else p.shape
        assert whole[0] == name and whole[1].shape == shape
        mine = (p.ds_tensor if zero == 3 else p.data).reshape(-1)[: whole[1].numel()]
        assert torch.equal(mine, whole[1].reshape(-1).to(DTYPES[precision]))
    trained.destroy()


@pytest.mark.parametrize("zero, precision", KINDS)
def test_a_lost_step_leaves_masters_and_moments_alone_and_the_average_goes_on(tmp_path, zero, precision):
    engine.init_distributed()
    trained, ema = build(tmp_path, zero, precision, "fused_adamw8bit" if zero == 2 else "fused_adamw", width=500)

    def step(factor):
        trained.backward(loss_of(trained, 0, DTYPES[precision], 500) * factor)
        ema.ride(KEEP)
        taken = trained.step(RATE)
        moments = [t.clone() for state in trained.base.state.values() for t in state.values() if torch.is_tensor(t)]
        before = [a.clone() for a in ema.average]
        ema.update(KEEP)
        return taken, [m.detach().clone() for m in trained.masters] + moments, before

    taken, kept, before = step(1.0)
    assert taken and all(torch.equal(a, b) for a, b in zip(before, ema.average))  # the pass had taken it
    for factor in (float("nan"), float("inf")):
        average = [a.clone() for a in ema.average]
        taken, now, before = step(factor)
        assert not taken and len(kept) > 2 and all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(average, before))
        for a, b, m in zip(ema.average, average, trained.masters):
            torch.testing.assert_close(a, torch.lerp(b, m.detach(), 1 - KEEP))
    taken, now, _ = step(1.0)
    assert taken and not torch.equal(now[0], kept[0]) and all(t.float().isfinite().all() for t in now)
    trained.destroy()


class Passes(TorchDispatchMode):
    """Bytes read and written by every operation, those of tensors with a share of the parameters' size alone."""

    def __init__(self, least):
        super().__init__()
        self.least, self.own, self.fused = least, 0, 0

    def size(self, value):
        if isinstance(value, (list, tuple)):
            return sum(map(self.size, value))
        return value.nbytes if isinstance(value, torch.Tensor) and value.numel() >= self.least else 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if op.is_view:
            return result
        if op.namespace == "reflow_kernels":
            param, grad, first, second, average, copy = args[:6]
            self.fused += self.size(grad) + 2 * self.size([param, first, second, average]) + self.size(copy)
        elif op is torch.ops.aten.copy_.default:
            self.own += self.size(args[:2])
        else:  # what is made in place is read and written
            self.own += self.size(args) + self.size(result)
        return result


README = Path(__file__).resolve().parents[2] / "reflow" / "training" / "README.md"


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the README counts a CPU's operations")
@pytest.mark.parametrize("zero, precision", KINDS)
def test_bytes_of_the_pass_and_of_what_stays_deepspeeds_are_those_of_the_readme(tmp_path, zero, precision):
    engine.init_distributed()
    trained, ema = build(tmp_path, zero, precision, "fused_adamw", width=500)
    row = next(re.findall(r"\| (\d+) ", line) for line in README.read_text().splitlines()
               if re.match(rf"\| ZeRO {'1 and 2' if zero in (1, 2) else zero}, {precision} \|", line))  # fmt: skip
    for step in (0, 1):
        trained.backward(loss_of(trained, step, DTYPES[precision], 500))
        ema.ride(KEEP)
        count = sum(shape.numel() for shape in trained.shapes.values())
        with Passes(500) as passes:
            assert trained.step(RATE)
            ema.update(KEEP)
    # The smallest parameters are left out of the count, and shards have padding.
    assert [round(passes.fused / count), round(passes.own / count)] == [int(n) for n in row[:2]]
    trained.destroy()


@pytest.mark.parametrize("part", ["offload_optimizer", "offload_param"])
def test_a_deepspeed_file_that_offloads_is_refused(tmp_path, part):
    path = tmp_path / "own.json"
    path.write_text(f'{{"zero_optimization": {{"{part}": {{"device": "cpu"}}}}}}')
    train = tiny.short(tmp_path, "train.zero_stage=3", "train.optimizer=fused_adamw", f"train.deepspeed={path}").train
    with pytest.raises(UserError, match=rf"own.json: zero_optimization.{part} moves .* 'fused_adamw' .* or write optimizer = 'adamw'"):
        engine.config_for(train, 1, 100, 1)
    path.write_text(f'{{"zero_optimization": {{"{part}": {{"device": "none"}}}}}}')
    assert engine.config_for(train, 1, 100, 1)["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize("optimizer", ["fused_adamw", "fused_adamw8bit"])
def test_offload_by_the_recipe_and_paging_are_refused(tmp_path, optimizer):
    with pytest.raises(UserError, match=f"'{optimizer}' cannot be offloaded. Write optimizer = 'adamw'"):
        tiny.short(tmp_path, "train.offload=true", "train.zero_stage=2", f"train.optimizer={optimizer}")
    with pytest.raises(UserError, match=f"'train.optimizer' = 'paged_{optimizer}' cannot be used"):
        tiny.short(tmp_path, f"train.optimizer=paged_{optimizer}")
