"""Halves, stochastic samplers and readings on the exact bed: what must hold of them whatever was trained."""

import pytest
import torch

from reflow.experiments import half_straightening as halves
from reflow.experiments.beds.exact import ExactBed
from reflow.flow import Windows


def noise(count=20, dtype=torch.float64):
    return torch.randn((count, 64), generator=torch.Generator().manual_seed(3), dtype=dtype), torch.arange(count) % 10


def test_halves_of_the_teacher_are_the_teacher():
    bed = ExactBed(dtype=torch.float64)
    z, labels = noise()
    states = halves.path(bed, halves.untrained(bed, 0.5, (4, 4)), z, labels)
    torch.testing.assert_close(states[-1], bed.sample(bed.teacher, bed.solver(Windows.uniform(1), 8), z, labels), rtol=0, atol=1e-11)
    # One step of the untrained chord is one step of DDIM; further ones are not, since the chord is not the schedule.
    for counts in ((1, 1), (9, 9)):
        mine, own = (halves.path(bed, halves.untrained(bed, 0.5, counts, chords=chords), z, labels)[-1] for chords in (True, False))
        off = float((mine - own).abs().max())
        assert off < 1e-11 if counts == (1, 1) else off > 1e-3


def test_each_half_has_its_own_model_and_steps():
    bed = ExactBed(dtype=torch.float64)
    z, labels = noise()
    asked = {"noisy": [], "clean": []}

    def watched(name):
        def call(x, timestep, of):
            asked[name].append(float(timestep[0]))
            return bed.teacher(x, timestep, of)

        return call

    split = halves.middle(bed)
    table = bed.table(Windows((1.0, split, 0.0)))
    pieces = [halves.piece(bed, table, 0, 3, watched("noisy"), bed.teacher), halves.piece(bed, table, 1, 5, None, watched("clean"))]
    states = halves.path(bed, pieces, z, labels)
    assert len(states) == 9 and [len(v) for v in asked.values()] == [3, 5]
    assert asked["noisy"][0] == 999 and asked["clean"][0] == round(1000 * split) - 1 < min(asked["noisy"])
    alpha, sigma = bed.schedule.at(torch.tensor(round(1000 * split) - 1))
    assert float(sigma / (alpha + sigma)) == pytest.approx(0.5, abs=5e-4)
    trained = halves.student_of("clean", split, {"steps": 7, "times": "uniform", "seed": 1}, held=True)
    assert (trained.stages[0].active, trained.stages[0].rest, trained.stages[0].windows) == ((1,), "teacher", (1.0, split, 0.0))
    assert halves.student_of("both", split, {"steps": 7, "times": "near start", "seed": 1}).stages[0].active == ()
