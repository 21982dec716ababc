"""The average of the weights: what its formula says, at the samples that it counts."""

import math

import pytest
import torch

from reflow.recipes import reading
from reflow.training import ema


def test_ema_is_the_average_that_its_formula_says():
    weights = [torch.randn(5), torch.randn(3, 2)]
    average, plain = ema.Ema(weights), [w.clone() for w in weights]
    for step in range(6):
        for w in weights:
            w += torch.randn_like(w)
        d = ema.decay(20.0, 0.5, 10 * step, 10)  # the ramp ends after 40 samples
        assert d == pytest.approx((step / (step + 1)) ** (2 * math.log(2)) if step < 4 else 0.5 ** 0.5)
        average.update(d)
        plain = [d * p + (1 - d) * w for p, w in zip(plain, weights)]
    for a, p in zip(average.average, plain):
        torch.testing.assert_close(a, p)
    assert ema.decay(100.0, 0.0, 500, 100) == 0.5 and ema.decay(0.0, 0.1, 500, 100) == 0.0


@pytest.mark.parametrize("batches", [1, 3, 8])
def test_the_ema_looks_back_by_samples_and_not_by_batches(batches):
    # From 300 to 1,500 samples, across the end of the ramp at 1,000: however the samples are cut, as much is left as the integral says.
    cut = [300 + 1200 * i / batches for i in range(batches + 1)]
    left = math.prod(ema.decay(100.0, 0.1, a, b - a) for a, b in zip(cut, cut[1:]))
    steps = 300 + 0.01 * (torch.arange(120_000, dtype=torch.float64) + 0.5)
    assert left == pytest.approx(float(2 ** -(0.01 / torch.minimum(torch.tensor(100.0), 0.1 * steps)).sum()), rel=1e-6)


@pytest.mark.parametrize("name", reading.available())
def test_the_ema_of_every_recipe_looks_back_as_far_as_the_plan_says(name):
    recipe = reading.load(name)
    train = recipe.train
    for stage in recipe.stages:
        steps = -(-stage.samples // train.batch_size)
        said = ema.half_life_at(train.ema_half_life, train.ema_warmup, steps * train.batch_size)
        assert said == min(train.ema_half_life, 0.1 * steps * train.batch_size)
        # Weight of every step in the average that the stage leaves: half of it is younger than about the half-life.
        weights, rest = [], 1.0
        for step in reversed(range(steps)):
            d = ema.decay(train.ema_half_life, train.ema_warmup, step * train.batch_size, train.batch_size)
            weights.append((1 - d) * rest)
            rest *= d
        assert sum(weights) == pytest.approx(1.0) and rest == 0.0
        half = next(n for n in range(steps) if sum(weights[: n + 1]) >= 0.5)
        assert 0.9 * said - train.batch_size <= half * train.batch_size <= said


def test_before_and_after_a_ramp_the_half_life_is_what_the_recipe_says():
    assert ema.half_life_at(100.0, 0.1, 400) == 40.0 and ema.half_life_at(100.0, 0.1, 1000) == ema.half_life_at(100.0, 0.1, 5000) == 100.0
    assert ema.half_life_at(100.0, 0.0, 0) == 100.0
    assert ema.decay(100.0, 0.1, 0, 10) == 0.0 and ema.decay(100.0, 0.0, 0, 100) == 0.5  # a ramp's first step forgets the start
    assert ema.decay(0.5, 0.0, 0, 1) == 0.25 and ema.decay(-1.0, 0.0, 0, 1) == 0.0


def test_an_average_begins_as_a_copy_without_a_gradient_and_is_restored_in_place():
    master = torch.randn(4, requires_grad=True)
    average = ema.Ema([master, torch.randn(2)])
    assert torch.equal(average.average[0], master) and not average.average[0].requires_grad
    assert average.average[0].data_ptr() != master.data_ptr()
    average.update(0.25)
    assert not average.average[0].requires_grad and list(average.state_dict()) == ["0", "1"]
    kept, places = {k: v.clone() for k, v in average.state_dict().items()}, [a.data_ptr() for a in average.average]
    for a in average.average:
        a.zero_()
    average.load_state_dict(kept)
    assert [a.data_ptr() for a in average.average] == places
    assert all(torch.equal(a, kept[str(i)]) for i, a in enumerate(average.average))
