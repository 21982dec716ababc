"""Teachers that are rectified flows: windows even before a time shift, shifted solver grids, merges by width, and their exact cases."""

import math

import pytest
import torch

from reflow.flow import ChordTable, Rectified, Windows, WindowSolver, network_time, shifted
from reflow.flow.exact import GaussianData, MixtureData, network
from reflow.flow.solver import time_grid

SHIFTS = (1.0, 3.0, math.exp(1.15))
F64 = torch.float64


def gaussian():
    return GaussianData(torch.tensor([0.7, -1.2], dtype=F64), torch.tensor([0.5, 1.4], dtype=F64))


def solved(solver, data, schedule, z, window, kind="velocity"):
    return solver.solve(network(data, schedule, kind), z, window)


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_shift_keeps_both_ends_and_has_its_inverse(shift):
    u = torch.linspace(0, 1, 101, dtype=F64)
    t = shifted(u, shift)
    assert t[0] == 0 and t[-1] == 1 and (t.diff() > 0).all()
    torch.testing.assert_close(shifted(t, 1 / shift), u, atol=1e-14, rtol=0)
    assert shifted(0.5, 3.0) == 0.75
    mu = math.log(shift)  # as diffusers' exponential shift has it
    torch.testing.assert_close(t[1:], math.exp(mu) / (math.exp(mu) + (1 / u[1:] - 1)), atol=1e-14, rtol=0)


def test_windows_lie_evenly_before_the_shift_and_merge_into_such():
    assert Windows.shifted(4, 3.0).boundaries == (1.0, 0.9, 0.75, 0.5, 0.0)
    for shift in SHIFTS:
        torch.testing.assert_close(Windows.shifted(8, shift).merge().boundaries, Windows.shifted(4, shift).boundaries)
        assert Windows.shifted(2, shift).boundaries[-1] == 0.0
    assert Windows.shifted(4, 1.0) == Windows.uniform(4)
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="shift"):
            Rectified(wrong)


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_solver_steps_on_the_base_samplers_own_grid(shift):
    """diffusers' grid of N steps, sigmas 1 - i/N shifted once, cut into windows."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    stock.set_timesteps(sigmas=[1 - i / 12 for i in range(12)])
    grid = time_grid(Windows.shifted(4, shift), 3, shift)
    mine = [*grid[:-1].T.flatten().tolist(), 0.0]
    torch.testing.assert_close(torch.tensor(mine, dtype=F64), stock.sigmas.double(), atol=1e-6, rtol=0)
    assert grid[-1].tolist() == list(Windows.shifted(4, shift).t_end)  # to the bit


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_solves_converge_to_the_exact_map_of_a_gaussian_at_the_methods_order(shift, method, order):
    data, windows, schedule = gaussian(), Windows.shifted(2, shift), Rectified(shift)
    z = torch.randn(64, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) * 1.1
    window = torch.arange(64) % 2
    start, end = (torch.tensor(t, dtype=F64)[window] for t in (windows.t_start, windows.t_end))
    exact = data.solve(z, 1 - start, start, 1 - end, end)
    errors = []
    for steps in (16, 32):
        solver = WindowSolver(schedule, windows, steps, prediction_type="velocity", method=method, dtype=F64)
        errors.append((solved(solver, data, schedule, z, window) - exact).norm().item())
    # The last step of Heun ends at sigma = 0 and is Euler's, whose error there is of second order as well.
    assert errors[1] < errors[0] / 2**order * 1.35 and errors[1] < {1: 0.4, 2: 0.05}[order]


def test_a_fine_solve_of_a_mixture_ends_on_the_data():
    means = torch.tensor([[2.0, 0.0], [-1.0, 1.5]], dtype=F64)
    data, schedule = MixtureData(means, 0.05, torch.tensor([0.4, 0.6], dtype=F64)), Rectified(3.0)
    z = torch.randn(512, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    solver = WindowSolver(schedule, Windows.uniform(1), 200, prediction_type="velocity", dtype=F64)
    found = solved(solver, data, schedule, z, torch.zeros(512, dtype=torch.long))
    nearest = torch.cdist(found, means)
    assert nearest.min(1).values.median() < 0.1 and abs(float((nearest.argmin(1) == 0).double().mean()) - 0.4) < 0.07


@pytest.mark.parametrize("shift", SHIFTS)
def test_velocity_and_noise_readings_are_one_flow(shift):
    """Euler in t is DDIM at alpha = 1 - t, sigma = t: an eps teacher and the velocity teacher solve alike, and so do their students."""
    data, windows, schedule = gaussian(), Windows(Windows.shifted(4, shift).boundaries[1:]), Rectified(shift)
    z, window = torch.randn(30, 2, dtype=F64, generator=torch.Generator().manual_seed(2)), torch.arange(30) % 3
    both = [
        solved(WindowSolver(schedule, windows, 5, prediction_type=kind, dtype=F64), data, schedule, z, window, kind) for kind in ("velocity", "epsilon")
    ]
    torch.testing.assert_close(both[0], both[1], atol=1e-6, rtol=0)  # the network is told an fp32 time
    t = torch.lerp(*(torch.tensor(e, dtype=F64)[window] for e in (windows.t_start, windows.t_end)), 0.3)
    velocity, noise = ChordTable(schedule, windows, "velocity", dtype=F64), ChordTable(schedule, windows, "ddim_eps", dtype=F64)
    v, eps = (network(data, schedule, kind)(z, 1000 * t) for kind in ("velocity", "epsilon"))
    for table, output in ((velocity, v), (noise, eps)):
        m, n = (c[:, None] for c in table.velocity_coefficients(window, t))
        torch.testing.assert_close(m * z + n * output, v, atol=1e-11, rtol=0)
    assert velocity.alpha_sigma(window, t)[1].allclose(t) and velocity.sigma_end[-1] == 0 and velocity.alpha_start[0] == 1 - windows.t_start[0]
    torch.testing.assert_close(network_time(t, "flow"), (1000 * t).float())


def test_the_first_window_starts_at_noise_alone_and_the_last_ends_at_data_alone():
    table = ChordTable(Rectified(3.0), Windows.shifted(4, 3.0), "velocity", dtype=F64)
    data, noise = torch.randn(1, 3, dtype=F64), torch.randn(1, 3, dtype=F64)
    assert torch.equal(table.start(data, noise, torch.tensor([0])), noise)
    assert float(table.alpha_end[-1]) == 1.0 and float(table.sigma_end[-1]) == 0.0


@pytest.mark.parametrize("shift", [3.0, math.exp(1.15)])
def test_merged_velocities_are_weighed_by_the_windows_widths(shift):
    """A straight student of 4 windows stepping through 2: the merged chord's velocity is (h1 v1 + h2 v2)/(h1 + h2), not the mean."""
    fine, coarse, schedule = Windows.shifted(4, shift), Windows.shifted(2, shift), Rectified(shift)
    table = ChordTable(schedule, fine, "velocity", dtype=F64)
    solver = WindowSolver.from_student(table, coarse, 2, network_time_mode="flow", dtype=F64)
    speeds = torch.tensor([0.3, -1.1, 0.8, 2.0], dtype=F64)

    def student(z, timestep):
        return speeds[fine.lookup(timestep.double() / 1000)][:, None].expand_as(z)

    z, window = torch.zeros(2, 3, dtype=F64), torch.arange(2)
    end = solver.solve(student, z, window)
    width = -torch.tensor(fine.boundaries, dtype=F64).diff()
    for k in (0, 1):
        h, v = width[2 * k : 2 * k + 2], speeds[2 * k : 2 * k + 2]
        whole = coarse.t_end[k] - coarse.t_start[k]
        torch.testing.assert_close(end[k] / whole, torch.full((3,), float((h * v).sum() / h.sum()), dtype=F64), atol=1e-14, rtol=0)
        assert abs(float((h * v).sum() / h.sum() - v.mean())) > 1e-3


def test_a_students_boundaries_between_grid_points_are_refused():
    table = ChordTable(Rectified(3.0), Windows.shifted(4, 3.0), "velocity", dtype=F64)
    with pytest.raises(ValueError, match="step across the student's boundary"):
        WindowSolver.from_student(table, Windows.uniform(1), 3, network_time_mode="flow")
    WindowSolver.from_student(table, Windows.uniform(1), 4, network_time_mode="flow")  # even before the shift: all boundaries are met


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_scheduler_knows_the_shift_that_made_its_windows(shift):
    """Not the base's static one, which a dynamic shift makes meaningless: steps within windows lie on the grid that was trained."""
    from reflow.sampling import FlowWindowScheduler

    base = {"shift": 7.0, "use_dynamic_shifting": True}
    scheduler = FlowWindowScheduler.for_student(base, Windows.shifted(4, shift))
    assert scheduler.config.shift == pytest.approx(shift, abs=1e-6)
    wanted = [*time_grid(Windows.shifted(4, shift), 2, shift)[:-1].T.flatten().tolist()]
    assert scheduler.grid(8) == pytest.approx(wanted, abs=1e-6)
    odd = FlowWindowScheduler.for_student(base, Windows((1.0, 0.8, 0.7, 0.0)))
    assert odd.config.shift == 7.0 and odd.grid(3) == [1.0, 0.8, 0.7]
