"""What the optimizers of one pass store: bit-equal resumption, exchange with torch's and bitsandbytes' own, 8-bit moments as bitsandbytes keeps them."""

import copy
import json
import shutil

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise
from safetensors.torch import load_file

import tiny
import watch
from reflow.errors import UserError
from reflow.training import fused, run
from reflow_kernels import reference

SETTINGS = dict(lr=2e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
SIZES = ((64, 70), (4095,), (9000,), (3, 5))  # 8-bit states from 4096 elements on


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in SIZES]


def steps(optimizer, held, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        for p in held:
            p.grad = torch.randn(p.shape, generator=generator) * (0.1 + torch.rand(p.shape, generator=generator)) * 10.0 ** -(step % 3)
        optimizer.step()


@pytest.mark.parametrize("mine, theirs", [(fused.FusedAdamW, torch.optim.AdamW), (fused.FusedAdamW8bit, bnb.optim.AdamW8bit)])
@pytest.mark.parametrize("direction", ["from", "to"])
def test_state_dicts_go_both_ways(mine, theirs, direction):
    """Half of the steps with one, half with the other: as all of them with the second one that took over exactly what the first left."""
    first, second = (theirs, mine) if direction == "from" else (mine, theirs)
    held = parameters()
    one = first(held, **SETTINGS)
    steps(one, held, 0, 4)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in held]
    other = second(copies, **SETTINGS)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for p, q in zip(held, copies):
        a, b = one.state[p], other.state[q]
        assert a.keys() == b.keys() and int(a["step"]) == int(b["step"]) == 4
        assert all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a if k != "step")
    steps(one, held, 4, 6), steps(other, copies, 4, 6)
    for p, q in zip(held, copies):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6 if mine is fused.FusedAdamW or p.numel() < 4096 else 3e-4)


def test_eight_bits_equal_bitsandbytes_to_the_quantisers_step():
    """The same first steps from the same states; codes are at most one entry of the map away but near zero, where bitsandbytes on a CPU has fewer."""
    held, copies = parameters(), parameters()
    ours, theirs = fused.FusedAdamW8bit(held, **SETTINGS), bnb.optim.AdamW8bit(copies, **SETTINGS)
    steps(ours, held, 0, 1), steps(theirs, copies, 0, 1)
    for p, q in zip(held, copies):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
        a, b = ours.state[p], theirs.state[q]
        assert a.keys() == b.keys() and a["step"] == b["step"] and all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape for k in a if k != "step")
        for order in (1, 2) if p.numel() >= 4096 else ():
            assert torch.equal(a[f"qmap{order}"], b[f"qmap{order}"]) and a[f"state{order}"].dtype is torch.uint8
            torch.testing.assert_close(a[f"absmax{order}"], b[f"absmax{order}"], rtol=1e-6, atol=0)
            values = [dequantize_blockwise(s[f"state{order}"], absmax=s[f"absmax{order}"], code=s[f"qmap{order}"], blocksize=256) for s in (a, b)]
            scale = a[f"absmax{order}"].repeat_interleave(256)[: p.numel()].view(p.shape)
            # Between two neighbours of the map, and beside zero.
            entries = a[f"qmap{order}"]
            gap = torch.maximum(entries.diff()[torch.clamp(a[f"state{order}"].long(), max=254)], entries.diff()[torch.clamp(a[f"state{order}"].long() - 1, min=0)])
            assert bool(((values[0] - values[1]).abs() <= scale * (1.01 * gap + 4e-5)).all())
            assert float((values[0] != values[1]).float().mean()) < (0.01 if order == 1 else 0.15)
    # Twenty steps: each leaves about as much as the map's own rounding.
    steps(ours, held, 1, 20), steps(theirs, copies, 1, 20)
    exact = parameters()
    steps(torch.optim.AdamW(exact, **SETTINGS), exact, 0, 20)
    start = parameters()
    for p, q, e, s in zip(held, copies, exact, start):
        moved = (e - s).norm()
        apart, mine, other = ((x - y).norm() / moved for x, y in ((p, q), (p, e), (q, e)))
        assert apart < 0.02 and mine < max(1.1 * other, 1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_the_maps_are_bitsandbytes_own_and_codes_are_the_nearest(signed):
    qmap = reference.dynamic_map(signed)
    assert torch.equal(qmap, create_dynamic_map(signed=signed))
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    values = values if signed else values.square()
    values[256:512] = 0
    codes, absmax = reference.quantize(values, qmap)
    assert codes.dtype is torch.uint8 and absmax.shape == (4,) and absmax[1] == 0 and torch.equal(qmap[codes[256:512].long()], torch.zeros(256))
    shares = values / absmax.clamp(min=1e-30).repeat_interleave(256)[:1000]
    best = (shares.unsqueeze(1) - qmap).abs().min(1).values
    torch.testing.assert_close((shares - qmap[codes.long()]).abs(), best, rtol=0, atol=1e-7)
    read = reference.quantize(qmap[codes.long()] * absmax.repeat_interleave(256)[:1000], qmap)
    assert torch.equal(read[0], codes)  # what is read and written again stays; a scale may not, as the signed map has no -1


def test_a_zero_gradient_leaves_an_8_bit_parameter_where_it_is():
    p = torch.nn.Parameter(torch.ones(5000))
    optimizer = fused.FusedAdamW8bit([p], **{**SETTINGS, "weight_decay": 0.0})
    for _ in range(3):
        p.grad = torch.zeros(5000)
        optimizer.step()
    assert torch.equal(p, torch.ones(5000)) and optimizer.state[p]["step"] == 3


def test_masters_that_are_no_flat_fp32_are_refused():
    for wrong in (torch.ones(3, dtype=torch.bfloat16), torch.ones(3, 4).t()):
        with pytest.raises(ValueError, match="expected contiguous fp32"):
            fused.FusedAdamW([torch.nn.Parameter(wrong)], **SETTINGS)


def recipe(tmp_path, zero, precision, optimizer, *more):
    return tiny.short(tmp_path, "log.every=16", "validate.every=0", f"train.zero_stage={zero}", f"train.precision={precision}",
                      f"train.optimizer={optimizer}", *more)  # fmt: skip


def weights(folder):
    return load_file(folder / "stage-1" / "unet_ema.safetensors")


def losses(folder):
    return [r["loss"] for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if r["event"] == "train"]


def cut(settings, folder):
    with watch.watching() as seen, watch.leaving_after(1):
        run.train(settings, folder)
    return seen["saved"]


@pytest.mark.parametrize("zero, precision, optimizer", [
    (2, "fp32", "fused_adamw"), pytest.param(3, "fp32", "fused_adamw8bit", marks=pytest.mark.slow),
    pytest.param(3, "bf16", "fused_adamw", marks=pytest.mark.slow),
    pytest.param(0, "fp32", "fused_adamw8bit", marks=pytest.mark.slow)])
def test_a_run_that_goes_on_equals_one_that_was_not_cut(tmp_path, zero, precision, optimizer):
    settings = recipe(tmp_path, zero, precision, optimizer)
    assert run.train(settings, tmp_path / "whole") == 0
    cut(settings, tmp_path / "cut")
    with watch.watching() as seen:
        assert run.train(settings, tmp_path / "cut") == 0
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert seen["how"] == "same layout" and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_runs_of_adamw_and_of_the_pass_go_on_as_each_other(tmp_path, capsys, digits_base):
    plain, one = recipe(tmp_path, 1, "fp32", "adamw"), recipe(tmp_path, 1, "fp32", "fused_adamw")
    assert run.train(plain, tmp_path / "plain") == 0
    start = digits_base.unet.state_dict()
    for name, first, then in (("on", plain, one), ("back", one, plain)):
        saved = cut(first, tmp_path / name)
        with watch.watching() as seen:
            assert run.train(then, tmp_path / name) == 0
        assert "The run resumes with train.optimizer" in capsys.readouterr().out
        assert seen["how"] == "same layout" and set(watch.differences(saved, seen["loaded"]).values()) == {0.0}
        a, b = weights(tmp_path / name), weights(tmp_path / "plain")
        change = sum((b[k] - start[k]).square().sum() for k in a).sqrt()
        assert sum((a[k] - b[k]).square().sum() for k in a).sqrt() < 1e-4 * change
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_8_bit_moments_of_either_are_read_by_the_other_where_that_is_asked_for(tmp_path):
    theirs = recipe(tmp_path, 2, "fp32", "adamw8bit")
    saved = cut(theirs, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    mine = recipe(tmp_path, 2, "fp32", "fused_adamw8bit")
    with pytest.raises(UserError, match="train.optimizer: 'adamw8bit' -> 'fused_adamw8bit'.*--allow-config-change"):
        run.train(mine, tmp_path / "run")
    with watch.watching() as seen:
        assert run.train(mine, tmp_path / "run", allow_config_change=True) == 0
    assert seen["how"] == "same layout" and set(watch.differences(saved, seen["loaded"]).values()) == {0.0}
    # In other blocks they are rounded once more, without bitsandbytes.
    with watch.watching() as seen:
        assert run.train(recipe(tmp_path, 0, "fp32", "fused_adamw8bit"), tmp_path / "other", allow_config_change=True) == 0
    found = watch.differences(saved, seen["loaded"])
    assert seen["how"].endswith("rounded again") and found["masters"] == found["ema"] == found["steps"] == 0 and found["first"] < 0.02
