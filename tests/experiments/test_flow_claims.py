"""Halves, stochastic samplers and readings on the exact bed: what must hold of them whatever was trained."""

import math

import pytest
import torch

from reflow.experiments import half_straightening as halves
from reflow.experiments import stochasticity
from reflow.experiments.beds import readings, restart, samplers
from reflow.experiments.beds.exact import ExactBed
from reflow.experiments.beds.mixture import LowRankMixture
from reflow.flow import Windows
from reflow.flow.exact import GaussianData


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


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def test_every_sampler_reaches_a_gaussian():
    bed, levels = ExactBed(dtype=torch.float64), samplers.ends(ExactBed())
    mean, std = torch.linspace(-0.8, 0.8, 4, dtype=torch.float64), torch.tensor([0.1, 0.3, 0.6, 1.2], dtype=torch.float64)
    data = GaussianData(mean, std)

    def network(z, alpha, sigma):
        return data.x0_eps(z, alpha, sigma)[1]

    network.labels = torch.zeros(4000)
    network.on = lambda schedule: lambda z, timestep, labels: network(z, *schedule.at(timestep[:1].long()))
    alpha, sigma = (float(x[0]) for x in samplers.table(bed, 1))
    x = alpha * data.sample(4000, generator()) + sigma * torch.randn((4000, 4), generator=generator(6), dtype=torch.float64)
    alpha, sigma = bed.clean()
    should = torch.sqrt((alpha * std) ** 2 + sigma**2)
    off = {}
    for name in (*stochasticity.DETERMINISTIC, *stochasticity.STOCHASTIC):
        for steps in (125, 250):
            found = stochasticity.sample(bed, name, network, x, levels, steps, generator(7))
            off[name, steps] = float((found.std(0) / should - 1).abs().max())
        assert float(((found.mean(0) - alpha * mean) / should).abs().max()) < 0.08 and off[name, 250] < 0.15, (name, off)
    for name in ("DDIM", "ancestral"):  # of first order on the table: what is left halves, but for chance
        assert 1.4 < off[name, 125] / off[name, 250] < 2.2


def test_restart_keeps_to_its_evaluations_and_is_heun_where_they_are_few():
    bed, labels = ExactBed(dtype=torch.float64), torch.arange(20) % 10
    network, asked, levels = samplers.Network(bed.mixture, labels), [], samplers.ends(bed)
    x = torch.randn((20, 64), generator=generator(), dtype=torch.float64)

    def counted(z, alpha, sigma):
        asked.append(sigma / alpha)
        return network(z, alpha, sigma)

    for steps in (2, 5, 10, 25, 50):
        asked.clear()
        own, times = restart.split(steps)
        assert own + times * restart.INNER == steps and (times > 0) is (steps > 5)
        found = restart.restarted(counted, x, *levels, steps, generator(3))
        assert len(asked) == 2 * steps
        ways_up = sum(b > a * 1.01 for a, b in zip(asked, asked[1:]))
        assert ways_up == times
        heun = samplers.churned(network, x, samplers.karras(*levels, steps), generator(), churn=0.0)
        assert torch.equal(found, heun) is (times == 0)


def test_ancestral_without_noise_is_ddim_and_with_it_is_a_double_step_noised_again():
    bed = ExactBed(dtype=torch.float64)
    z, labels = noise()
    network = samplers.Network(bed.mixture, labels)
    grid = samplers.table(bed, 7)
    mine = samplers.ancestral(network, z, *grid, generator(), eta=0.0)
    torch.testing.assert_close(mine, bed.sample(bed.teacher, bed.solver(Windows.uniform(1), 7), z, labels), rtol=0, atol=1e-11)
    # One ancestral step: DDIM twice as far in log(sigma / alpha), then noise back up to the level (exact where variance is preserved).
    (a, s), (b, r) = ((float(grid[0][i]), float(grid[1][i])) for i in (3, 4))
    beyond = (r / b) ** 2 / (s / a)
    c, q = 1 / math.hypot(1, beyond), beyond / math.hypot(1, beyond)
    far = samplers.ancestral(network, z, torch.tensor([a, c]), torch.tensor([s, q]), generator(), eta=0.0)
    drawn = torch.randn(z.shape, generator=generator(), dtype=torch.float32).double()
    again = b / c * far + math.sqrt(r * r - (b / c * q) ** 2) * drawn
    torch.testing.assert_close(samplers.ancestral(network, z, grid[0][3:5], grid[1][3:5], generator()), again, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["VP", "VE", "sub-VP"])
def test_rates_of_the_diffusions_are_those_of_their_schedules(kind):
    one = samplers.Diffusion(kind, 14.0, 0.03)
    for s in one.times(5)[1:-1]:
        (a, p), (b, q), (c, r) = (one.alpha_sigma(s + d) for d in (-1e-5, 0.0, 1e-5))
        drift, square = one.rates(s)
        assert drift == pytest.approx((math.log(c) - math.log(a)) / 2e-5, rel=1e-6, abs=1e-9)
        assert square == pytest.approx(2 * b * q * (r / c - p / a) / 2e-5, rel=1e-6)  # g^2 = 2 alpha sigma d(sigma / alpha)
    (a, p), (c, r) = (one.alpha_sigma(s) for s in (one.times(1)))
    assert (p / a, r / c) == (pytest.approx(14.0), pytest.approx(0.03))


def test_the_field_is_smooth_fixed_and_as_large_as_eps():
    bed = ExactBed()
    z, labels = noise(400, torch.float32)
    field, again = (samplers.like_eps(bed, samplers.Field.drawn(64, 0.5, 1)) for _ in range(2))
    assert torch.equal(field(z, 0.6, 0.8), again(z, 0.6, 0.8))
    torch.testing.assert_close(field(z, 0.6, 0.8), field(2 * z, 1.2, 1.6), rtol=1e-4, atol=1e-5)  # of the place, whatever its scale
    near, far = (float((field(z + d * torch.randn(z.shape, generator=generator()), 0.6, 0.8) - field(z, 0.6, 0.8)).square().mean()) for d in (0.05, 3))
    assert near < 0.05 * far
    even = samplers.like_eps(bed, samplers.Field.drawn(64, 0.5, 1, "eps"))
    assert 0.8 < float(even(z, 0.6, 0.8).square().mean().sqrt()) < 1.1  # eps itself is .92 in RMS over the table
    torch.testing.assert_close(field(z, 0.6, 0.8) * even.scale / 0.6, even(z, 0.6, 0.8) * field.scale, rtol=1e-4, atol=1e-4)


def test_where_curves_cross():
    assert stochasticity.crossing([10, 100, 1000], [1.0, 1.0, -1.0]) == pytest.approx(10**2.5)
    assert stochasticity.crossing([10, 100], [1.0, 0.5]) is None and stochasticity.crossing([10, 100], [-1.0, -0.5]) == 10
    assert stochasticity.crossing([10, 100, 1000], [-1.0, 1.0, -1.0]) == pytest.approx(10**2.5)


def test_families_know_the_flows_time():
    """A family's own times come back from the flow's, and its scale is alpha + sigma."""
    for name, family in readings.families(ExactBed()).items():
        grid = family.grid(9)
        alpha, sigma = family.schedule.alpha_sigma(grid)
        timestep, scale = family.of_flow(readings.flow_times(family, 9))
        torch.testing.assert_close(scale, alpha + sigma, rtol=1e-9, atol=0, msg=name)
        torch.testing.assert_close(timestep.double(), family.schedule.timestep(grid), rtol=1e-6, atol=1e-9, msg=name)


def test_one_point_is_straight_as_a_flow_and_unit_variance_stands_still_as_vp():
    z, labels = noise()
    wide = ExactBed(dtype=torch.float64).mixture
    point = LowRankMixture(wide.means[:1] * 0 + 0.3, wide.axes[:1], wide.spread[:1] * 0, 1e-14, torch.ones(1, dtype=torch.float64), torch.zeros(1).long())
    unit = readings.unit_gaussian(wide)
    labels = torch.zeros_like(labels)
    states = readings.straight_steps(point, labels, z, "flow", 20)
    flat = readings.bent(states, [1 - i / 20 for i in range(21)])
    assert flat["deviation"] < 1e-6 and flat["bow"] < 1e-9 and flat["rfpp"] < 1e-9
    torch.testing.assert_close(readings.straight_steps(point, labels, z, "flow", 1)[-1], torch.full_like(z, 0.3), rtol=0, atol=1e-9)
    circle = readings.straight_steps(point, labels, z, "VP", 400, heun=True)
    bow = readings.bent(circle, [math.pi / 2 * (1 - i / 400) for i in range(401)])
    ends = (z - 0.3).square().mean()  # of z = .3 cos + z sin over a quarter: mean and mean square of its speed
    speed = (z.square().mean() + 0.3**2) / 2 - 2 / math.pi * 0.3 * z.mean()
    assert bow["deviation"] == pytest.approx(float((1 - (2 / math.pi) ** 2 * ends / speed).sqrt()), rel=1e-3)
    still = readings.straight_steps(unit, labels, z, "VP", 3)
    torch.testing.assert_close(still[-1], z, rtol=0, atol=1e-12)
    moved = readings.straight_steps(unit, labels, z, "flow", 1)[-1]  # Euler's velocity at t = 1 is the noise less the mean
    torch.testing.assert_close(moved, torch.zeros_like(z), rtol=0, atol=1e-12)


def test_scaled_data_are_the_same_flow_at_other_levels():
    bed = ExactBed(dtype=torch.float64)
    z, labels = noise()
    for factor in (0.1, 10.0):
        x0, eps = readings.scaled(bed.mixture, factor).x0_eps(z, labels, 0.6, 0.8)
        again = bed.mixture.x0_eps(z, labels, 0.6 * factor, 0.8)
        torch.testing.assert_close(x0, factor * again[0], rtol=0, atol=1e-9 * max(1, factor))
        torch.testing.assert_close(eps, again[1], rtol=0, atol=1e-9)
