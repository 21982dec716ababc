"""Deltas between networks of the exact bed: none where nothing was trained, the student itself on the base, and the experiment in seconds."""

from dataclasses import replace

import pytest
import torch

from reflow.experiments import plug_and_play
from reflow.experiments.beds import custom, measure, students
from reflow.experiments.beds.custom import Custom
from reflow.experiments.beds.exact import ExactBed
from reflow.experiments.beds.students import Stage, Student
from reflow.experiments.store import Store
from reflow.weights import delta
from tests.experiments.test_exact_experiments import folder, made  # noqa: F401


@pytest.fixture(scope="module")
def bed():
    return ExactBed()


def test_customs_are_the_mixture_that_their_name_says(bed):
    exact, generator = bed.mixture, torch.Generator().manual_seed(0)
    x = exact.sample(torch.arange(400) % 10, generator)
    labels = torch.full((400,), 10)
    for shift, change, volume in (("faded", lambda x: 0.6 * (x + 1) - 1, 0.6), ("moved", lambda x: x.view(-1, 8, 8).roll(1, 2).flatten(1), 1.0)):
        found = custom.SHIFTS[shift](exact.to(torch.float64)).log_likelihood(change(x.double()), labels, 1.0, 0.0)
        wanted = exact.to(torch.float64).log_likelihood(x.double(), labels, 1.0, 0.0) - 64 * torch.tensor(volume).double().log()
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    kind = custom.SHIFTS["one kind"](exact)
    assert kind.classes.tolist() == list(range(10)) and float(kind.weights.sum()) == pytest.approx(1)
    drawn = kind.sample(torch.zeros(50, dtype=torch.long), generator)
    assert len(set(exact.log_densities(drawn, 1.0, 0.0).argmax(1).tolist())) == 1


def test_deltas_of_nothing_and_of_the_base(tmp_path, bed):
    spec, store = Student((Stage(4, 12),), pairs=256, seed=1), Store(tmp_path)
    first, learnt = custom.first(spec), students.weights(spec, store)
    none = delta.make_delta(first, first)
    assert all(not bool(value.any()) for value in none.values())
    same, report = delta.merge(learnt, none)
    assert report.size == 0 and all(torch.equal(same[key], learnt[key]) for key in learnt)
    whole, _ = delta.merge(first, delta.make_delta(first, learnt))
    for key, value in learnt.items():
        torch.testing.assert_close(whole[key], value, rtol=0, atol=1e-6)
    z, labels = torch.randn((6, 64), generator=torch.Generator().manual_seed(0)), torch.arange(6)
    when = torch.full((6,), 749.0)
    torch.testing.assert_close(custom.of_weights(bed, first)(z, when, labels), bed.teacher(z, when, labels))  # the base says nothing of its own
    # A custom model that was not tuned is the base, and its own student the base's.
    untuned = custom.distil([spec], [first], [custom.of_weights(bed, first)], bed.mixture)[0]
    for key, value in learnt.items():
        torch.testing.assert_close(untuned[key], value, rtol=1e-3, atol=1e-5)


def test_tuning_goes_towards_its_digits(tmp_path, bed):
    store, spec = Store(tmp_path), Custom("faded", 150)
    ref = measure.reference(bed, store, samples=100, steps=40)
    weights = custom.tuned(spec, store, (0, 1))
    further = Custom("moved", 1, base=spec, learning_rate=0.0)
    assert further.at(1).base == spec.at(1) and float(further.data().means.max()) == pytest.approx(float(spec.data().means.max()))
    again = custom.tuned(further, store)  # from its base's weights, and no step away from them
    assert all(torch.equal(again[key], weights[key]) for key in weights)
    assert store.has(replace(spec, seed=1).name()) and spec.name() != replace(spec, shift="moved").name()
    solver = bed.solver(students.Windows.uniform(1), 20)
    found = bed.sample(custom.of_weights(bed, weights), solver, ref.noise, ref.labels)
    wanted, base = (float(x.mean()) for x in (spec.data().moments()[0], bed.mixture.moments()[0]))
    assert abs(float(found.mean()) - wanted) < 0.5 * abs(base - wanted)


def test_plug_and_play(folder, capsys):  # noqa: F811
    rows, found = made(folder, "plug-and-play", capsys)
    assert [line["base_is"] for line in found["rows"]] == ["first", "second"]
    line = found["rows"][0]
    assert line["fine"]["paired"]["mean"] == 0 < line["custom_32"]["paired"]["mean"] < line["custom_4"]["paired"]["mean"]
    assert line["base"]["paired"]["mean"] > 0.05 and line["training"] <= 18_000
    assert set(plug_and_play.WAYS) <= rows[0]["result"].keys()
