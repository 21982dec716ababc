"""The quick form of the soak of memory: some hundred steps, by what malloc and Python hold; `scripts/soak.sh growth` counts pages over 5,000."""

import ctypes
import pathlib
import sys

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import soak

growth = soak.row("growth")

import tiny
from reflow.training import engine, run
from reflow.training.ema import Ema

STEPS = 120


@pytest.fixture(autouse=True)
def group():
    engine.init_distributed()
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("what malloc holds is asked of glibc 2.33 or newer")
    for _ in range(2100):  # torch keeps the last 2,000 collectives: that record is full before the first step
        dist.all_reduce(torch.zeros(1))


def slope(folder, *settings, steps=STEPS):
    """Bytes a step over a run of one stage, without what its first third makes."""
    whole = tiny.recipe(folder, "train.batch_size=4", "train.micro_batch=4", f"stages.0.samples={steps * 4}", "validate.every=0", "checkpoint.every=0",
                        "log.every=40", "validate.images=1", "validate.pairs=1", *settings)
    watch = growth.Watch(10, growth.asked_for)
    undo = growth.watch_steps(watch)
    try:
        run.train(whole.model_copy(update={"stages": whole.stages[:1]}), folder / "run")
    finally:
        undo()
    assert watch.steps == steps
    return watch.slope(1 / 3)


@pytest.mark.parametrize("settings", [
    pytest.param((), id="solver"),
    pytest.param(("stages.0.pairs=32", "train.zero_stage=2", "train.precision=bf16"), id="stored pairs, ZeRO 2, bf16", marks=pytest.mark.slow)])
def test_a_step_holds_on_to_nothing(tmp_path, settings):
    assert slope(tmp_path, *settings) < growth.LIMIT


@pytest.mark.slow
def test_a_step_that_does_is_seen(tmp_path, monkeypatch):
    kept, update = [], Ema.update

    def leaking(self, *args):
        update(self, *args)
        kept.append([bytes(800), [object() for _ in range(12)]])

    monkeypatch.setattr(Ema, "update", leaking)
    assert slope(tmp_path, steps=60) > growth.LIMIT


def test_a_slope_is_no_single_step_and_no_stair_hides_it():
    watch = growth.Watch(1, int)
    watch.rows = [(step, 10**7 * (step > 800)) for step in range(0, 1000, 20)]
    assert watch.slope() == 0
    watch.rows = [(step, 2**18 * (step // 200)) for step in range(0, 5000, 20)]
    assert watch.slope() == pytest.approx(2**18 / 200, rel=0.05)
