"""A step whose gradient is not finite is not taken, at every ZeRO stage and precision, and never in silence."""

import json

import pytest
import torch
from safetensors.torch import load_file

import tiny
from reflow.errors import UserError
from reflow.training import engine, run, targets

KINDS = [(zero, precision) for precision in ("fp32", "bf16") for zero in (0, 1, 2, 3)]


@pytest.fixture
def poison(monkeypatch):
    """poison(steps): the gradient of these micro-steps is NaN, their loss as it was."""
    loss = targets.loss

    def of(steps):
        seen = iter(range(10**6))

        def poisoned(output, *args, **kwargs):
            if output.requires_grad and next(seen) in steps:
                output.register_hook(lambda gradient: gradient * float("nan"))
            return loss(output, *args, **kwargs)

        monkeypatch.setattr(targets, "loss", poisoned)

    return of


def recipe(tmp_path, zero, precision, *more):
    return tiny.short(tmp_path, f"train.zero_stage={zero}", f"train.precision={precision}", "log.every=16", "validate.every=0",
                      "train.micro_batch=16", *more)  # fmt: skip


def records(folder):
    return [r for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if r["event"] == "train"]


@pytest.mark.parametrize("zero, precision, clip", [(*kind, 1.0) for kind in KINDS] + [(0, "fp32", 0.0), (2, "bf16", 0.0)])
def test_a_lost_step_stops_the_run_unless_the_recipe_allows_it(tmp_path, poison, zero, precision, clip):
    poison({1})
    with pytest.raises(UserError, match=r"gradient is not finite in 1 steps of stage 1, the first is step 1 \(samples 16 to 31\)"):
        run.train(recipe(tmp_path, zero, precision, f"train.clip={clip}"), tmp_path / "strict")
    assert not list((tmp_path / "strict").glob("stage-*/*.safetensors"))
    poison({1})
    assert run.train(recipe(tmp_path, zero, precision, f"train.clip={clip}", "train.max_nonfinite=16"), tmp_path / "run") == 0
    found = records(tmp_path / "run")
    assert [r["skipped_steps"] for r in found] == [0, 1, 0] and [r["grad_norm"] is None for r in found] == [False, True, False]
    assert all(t.isfinite().all() for t in load_file(tmp_path / "run" / "stage-1" / "unet_ema.safetensors").values())


@pytest.mark.parametrize("zero, precision", [(0, "fp32"), (2, "bf16")])
def test_a_stage_without_one_step_is_an_error(tmp_path, poison, zero, precision):
    poison(set(range(100)))
    with pytest.raises(UserError, match="gradient is not finite in 3 steps of stage 1"):
        run.train(recipe(tmp_path, zero, precision, "train.max_nonfinite=1000"), tmp_path / "run")
    assert not list((tmp_path / "run").glob("stage-*/*.safetensors"))
    assert [r["skipped_steps"] for r in records(tmp_path / "run")] == [1, 1, 1]


@pytest.mark.parametrize("zero, precision", KINDS)
def test_a_lost_step_leaves_masters_and_moments_as_they_were(tmp_path, zero, precision):
    engine.init_distributed()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    trained = engine.Engine(torch.nn.Linear(8, 8), recipe(tmp_path, zero, precision).train, 1)
    kept = []
    for factor, taken in ((1.0, True), (float("nan"), False), (float("inf"), False), (1.0, True)):
        trained.backward(trained(torch.ones(2, 8, dtype=dtype)).float().square().sum() * factor)
        assert trained.step(1e-2) is taken
        moments = [t.clone() for state in trained.base.state.values() for t in state.values() if torch.is_tensor(t)]
        kept.append([m.detach().clone() for m in trained.masters] + moments)
    one, nan, inf, last = kept
    assert len(one) > 2 and all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, nan, inf, strict=True))
    assert not torch.equal(one[0], last[0]) and all(t.isfinite().all() for t in last)


@pytest.mark.parametrize("what", ["average", "moments"])
def test_what_is_not_finite_reaches_no_file(tmp_path, monkeypatch, what):
    """The masters are whole; what goes into a checkpoint beside them is not."""
    from reflow.training.ema import Ema

    update, step = Ema.update, engine.Engine.step

    def spoiled_average(self, keep):
        update(self, keep)
        self.average[0].view(-1)[0] = float("nan")

    def spoiled_moments(self, rate):
        taken = step(self, rate)
        self.moments()[-1].view(-1)[0] = float("inf")
        return taken

    if what == "average":
        monkeypatch.setattr(Ema, "update", spoiled_average)
    else:
        monkeypatch.setattr(engine.Engine, "step", spoiled_moments)
    with pytest.raises(UserError, match="their average or the optimizer's moments are not finite after step 1 of stage 1"):
        run.train(recipe(tmp_path, 0, "fp32", "checkpoint.every=16"), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/stage-*"))
