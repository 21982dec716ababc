"""Few-step methods side by side: other samplers and another trainer against exact cases, costs that add up, untrained students that are their teacher."""

import math
from dataclasses import replace

import pytest
import torch

from reflow.experiments import cells, comparison
from reflow.experiments.beds import SHORT, consistency, fitting, measure, methods, stock, students
from reflow.experiments.beds.consistency import Consistency, Grid, carried
from reflow.experiments.beds.exact import Correction, ExactBed, untrained
from reflow.experiments.beds.mixture import CLASSES
from reflow.experiments.store import Store
from reflow.flow import Windows
from tests.experiments.test_exact_experiments import folder, made  # noqa: F401


@pytest.fixture(scope="module")
def bed():
    return ExactBed(dtype=torch.float64)


def noises(count=12, dtype=torch.float64):
    return torch.randn((count, 64), generator=torch.Generator().manual_seed(1), dtype=dtype), torch.arange(count) % CLASSES


def own_ddim(bed, steps, z, labels, guidance=None):
    return bed.sample(bed.teacher, bed.solver(Windows.uniform(1), steps, guidance=guidance), z, labels)


class Counted:
    def __init__(self, bed):
        self.bed, self.calls = bed, 0

    def __call__(self, *row):
        self.calls += 1
        return self.bed.teacher(*row)


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("guidance", [None, 3.0])
def test_stock_ddim_is_the_beds_where_its_steps_divide_a_thousand(bed, steps, guidance):
    z, labels = noises()
    found = stock.sample(bed, bed.teacher, stock.made("DDIM", steps), z, labels, guidance=guidance)
    torch.testing.assert_close(found, own_ddim(bed, steps, z, labels, guidance), rtol=0, atol=2e-5)  # its table is fp32


def test_stock_ddim_floors_its_steps_and_ends_at_index_0(bed):
    z, labels = noises()
    found = stock.sample(bed, bed.teacher, stock.made("DDIM", 32), z, labels)
    assert 1e-4 < float((found - own_ddim(bed, 32, z, labels)).square().mean().sqrt()) < 2e-2  # 1000 / 32 is floored to 31
    scheduler = stock.DDIMScheduler(**stock.COMMON, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(4)
    to_zero = stock.sample(bed, bed.teacher, scheduler, z, labels)
    alpha, sigma = bed.clean()
    assert float((to_zero - own_ddim(bed, 4, z, labels)).square().mean().sqrt()) > 0.3 * sigma  # diffusers' default end has no noise left


@pytest.mark.parametrize("steps", [4, 32])
def test_first_order_dpm_solvers_are_ddim(bed, steps):
    z, labels = noises()
    for algorithm in ("dpmsolver", "dpmsolver++"):
        scheduler = stock.dpm(algorithm_type=algorithm, solver_order=1)
        scheduler.set_timesteps(steps)
        torch.testing.assert_close(stock.sample(bed, bed.teacher, scheduler, z, labels), own_ddim(bed, steps, z, labels), rtol=0, atol=1e-4)


def test_every_sampler_goes_to_the_flow(bed):
    z, labels = noises()
    fine = bed.fine(z, labels, steps=200)
    for kind in stock.KINDS:
        one, many = (stock.sample(bed, bed.teacher, stock.made(kind, n), z, labels) for n in (1, 100))
        torch.testing.assert_close(one, own_ddim(bed, 1, z, labels), rtol=0, atol=1e-4)  # one step of any of them is of first order
        assert float((many - fine).square().mean().sqrt()) < 0.02, kind
        counted = Counted(bed)
        stock.sample(bed, counted, stock.made(kind, 4), z, labels)
        assert counted.calls == stock.evaluations(kind, 4)


def test_the_consistency_functions_end_is_the_point_itself(bed):
    grid, z = Grid(bed, 32, 4), noises(32)[0]
    torch.testing.assert_close(carried(z, torch.randn_like(z), grid.end, grid.end), z)
    assert grid.last.nonzero()[:, 0].tolist() == [7, 15, 23, 31]
    torch.testing.assert_close(grid.stop[:, grid.last], grid.end[:, grid.last])
    torch.testing.assert_close(grid.stop[:, :-1], grid.start[:, 1:])
    with pytest.raises(ValueError, match="32 steps make no 3 equal phases"):
        Grid(bed, 32, 3)
    # With the exact answer for an average, a last step costs nothing: teacher and student make the same step.
    spec, network = Consistency(4, 1), Correction(64).to(torch.float64)
    n, labels = torch.full((12,), 7), noises()[1]
    for target in ("network", "average"):
        found = consistency.loss(bed, replace(spec, target=target), grid, network, [p.detach() for p in network.parameters()], noises()[0], n, labels)
        assert float(found.detach()) == pytest.approx(0.0, abs=1e-12)
    early = consistency.loss(bed, spec, grid, network, [], noises()[0], n - 7, labels)
    assert float(early.detach()) > 1e-4  # two steps of the teacher are not one


def test_consistency_students_begin_as_their_teacher_and_learn(tmp_path, bed):
    z, labels = noises(dtype=torch.float32)
    spec, plain = Consistency(4, 60, pairs=256), ExactBed()
    once = consistency.noised_again(spec, untrained(plain), 1, z, labels)
    torch.testing.assert_close(once, own_ddim(plain, 4, z, labels), rtol=0, atol=1e-4)
    table = spec.table()
    torch.testing.assert_close(once, plain.sample(untrained(plain), plain.student_solver(table), z, labels), rtol=0, atol=1e-4)
    store = Store(tmp_path)
    ref = measure.reference(plain, store, **SHORT)
    error = measure.of_student(plain, consistency.trained(spec, store, (0, 1)), table, ref)["4"]["paired"]
    assert store.has(replace(spec, seed=1).name()) and error < measure.of_teacher(plain, 4, ref)["paired"]
    # Noised anew it is a draw of the same distribution, not the same sample; at one step a phase nothing is drawn.
    again = [consistency.noised_again(spec, untrained(plain), 2, z, labels, seed=s) for s in (0, 0, 1)]
    torch.testing.assert_close(again[0], again[1])
    assert float((again[0] - again[2]).abs().max()) > 0.1


def test_fit_is_the_students_trainer(tmp_path):
    """The same draws and loss through `fit` make the student that `students.train` makes."""
    spec = students.Student((students.Stage(4, 12),), pairs=256)
    store = Store(tmp_path)
    plain, (z_start, z_end, window, labels) = spec.bed(), students.pool(students._pool_key(spec), store)
    generator, table, settings = torch.Generator().manual_seed(1), spec.table(), spec.stages[0].settings()

    def loss(network, average):
        rows = torch.randint(len(labels), (spec.batch,), generator=generator)
        draws = torch.rand((spec.batch, 1, 2), generator=generator)
        at = students.targets.points(z_start[rows], z_end[rows], window[rows], draws, table, settings)
        output = students.student(plain, network)(at.model_input, students.network_time(at.t), labels[rows])
        return students.targets.loss(output, at, table, settings).loss

    found = fitting.fit(Correction(64), 12, loss, learning_rate=spec.learning_rate)[0]
    for name, value in students.weights(spec, store).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", methods.METHODS)
def test_methods_spend_their_budget_and_begin_as_their_teacher(name):
    method, budget = methods.METHODS[name], 60_000
    spec = method.at(budget)
    total = comparison.optimizer_steps(spec)
    assert spec.evaluations() <= budget < method.of(total + 1).evaluations()
    z, labels = noises(4, torch.float32)
    bed, steps = ExactBed(), len(spec.table())
    own = methods.sample(bed, spec, untrained(bed), 1, z, labels)
    ddim = own_ddim(bed, steps, z, labels)
    if getattr(spec, "prediction_type", "") in ("diff_eps", "velocity"):
        assert float((own - ddim).abs().max()) > 0.1
    else:
        torch.testing.assert_close(own, ddim, rtol=0, atol=1e-4)


def test_a_budget_that_trains_nothing_is_told():
    with pytest.raises(ValueError, match=r"1,000 network evaluations are too few: 4 optimizer steps cost 5,632"):
        methods.METHODS["4 windows, near start"].at(1000)


def test_cost_until_an_error_is_reached():
    assert comparison.reached([100, 200, 400], [0.3, 0.2, 0.1], 0.2) == pytest.approx(200)
    assert comparison.reached([100, 200, 400], [0.3, 0.2, 0.1], 0.15) == pytest.approx(math.sqrt(200 * 400))
    assert comparison.reached([100, 200], [0.3, 0.2], 0.1) is None and comparison.reached([100, 200], [0.1, 0.05], 0.2) == 100


def test_comparison(folder, capsys):  # noqa: F811
    rows, found = made(folder, "comparison", capsys)
    assert {line["method"] for line in found["methods"]} == set(comparison.QUICK)
    by = {line["method"]: line for line in found["methods"]}
    assert "unguided" not in by["PeRFlow-fixed"] and set(by["PeRFlow"]["unguided"]) == {"4", "8"} and set(by["2-rectified flow"]["guided"]) == set("1248")
    assert all(line["training"] <= found["budget"] for line in found["methods"])
    ddim = {line["steps"]: line["paired"] for line in found["teacher"] if (line["teacher"], line["guided"]) == ("DDIM", False)}
    assert ddim[1] > ddim[2] > ddim[4] > ddim[8]
    assert cells.select(rows, timed="4 windows, near start")
