"""A student as the next stage's teacher: merging windows (oracle 19) and stepping by its own parameterisation."""

import pytest
import torch

from reflow.flow import ChordTable, Windows, WindowSolver, network_time
from reflow.flow.prediction import from_x0_eps


def test_item19_a_straight_student_is_merged_exactly(sd, device):
    # Straight sub-windows: the student's velocity is constant in each, and two Euler steps give the merged end exactly.
    fine, coarse = Windows.uniform(8), Windows.uniform(8).merge()
    g = torch.Generator().manual_seed(13)
    velocities = torch.randn(8, 3, 5, generator=g, dtype=torch.float64).to(device)

    def student(z, timestep):
        window = fine.lookup((timestep.double() + 1) / 1000)
        return velocities[window, torch.arange(len(z), device=z.device)]

    table = ChordTable(sd, fine, "velocity", device=device, dtype=torch.float64)
    z = torch.randn(3, 5, generator=g, dtype=torch.float64).to(device)
    window = torch.tensor([0, 1, 3], device=device)
    rows = torch.arange(3, device=device)
    truth = z - (velocities[2 * window, rows] + velocities[2 * window + 1, rows]) / 8
    for steps in (2, 4, 6):
        solver = WindowSolver.from_student(table, coarse, steps)
        torch.testing.assert_close(solver.solve(student, z, window), truth, rtol=1e-12, atol=1e-12)
        assert solver.evaluations == steps
    merged = (solver.solve(student, z, window) - z) / torch.tensor(-0.25, dtype=torch.float64)
    speeds = (velocities[2 * window, rows].norm(dim=1) + velocities[2 * window + 1, rows].norm(dim=1)) / 2
    assert bool((merged.norm(dim=1) < speeds).all())


@pytest.mark.parametrize("kind", ["ddim_eps", "ddim_v", "diff_eps", "velocity"])
def test_a_student_steps_by_its_own_parameterisation(sd, kind, model, device):
    table = ChordTable(sd, Windows.uniform(4), kind, device=device)
    z = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(14)).to(device)
    window = torch.tensor([0, 1], device=device)
    for steps, mode in ((2, "index"), (4, "perflow")):
        solver = WindowSolver.from_student(table, Windows.uniform(2), steps, network_time_mode=mode)
        got = solver.solve(model, z, window)
        truth, width = z, 0.5 / steps
        for i in range(steps):
            t = 1.0 - 0.5 * window - width * i
            inner = table.windows.lookup(t)
            a, b = (value.view(-1, 1, 1, 1) for value in table.velocity_coefficients(inner, t))
            truth = truth - width * (a * truth + b * model(truth, network_time(t, mode)))
        torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


def test_a_perfect_student_keeps_the_constant_eps_path(sd, device):
    # ddim_v network on one constant (x0, eps): every step lands on the chord, so the merged end is A_e x0 + S_e eps.
    table = ChordTable(sd, Windows.uniform(4), "ddim_v", device=device, dtype=torch.float64)
    g = torch.Generator().manual_seed(15)
    x0, eps = torch.randn(2, 6, generator=g, dtype=torch.float64), torch.randn(2, 6, generator=g, dtype=torch.float64)
    x0, eps = x0.to(device), eps.to(device)

    def perfect(z, timestep):
        t = (timestep.double() + 1) / 1000
        return from_x0_eps("v_prediction", x0, eps, *table.alpha_sigma(table.windows.lookup(t), t))

    window = torch.tensor([0, 1], device=device)
    z = ChordTable(sd, Windows.uniform(2), "ddim_v", device=device, dtype=torch.float64).start(x0, eps, window)
    got = WindowSolver.from_student(table, Windows.uniform(2), 4).solve(perfect, z, window)
    alpha, sigma = sd.alpha_sigma(torch.tensor([0.5, 0.0], dtype=torch.float64, device=device))
    torch.testing.assert_close(got, alpha[:, None] * x0 + sigma[:, None] * eps, rtol=1e-12, atol=1e-12)


def test_a_student_does_not_step_across_its_boundaries(sd):
    table = ChordTable(sd, Windows.uniform(8), "ddim_eps")
    for windows, steps in ((Windows.uniform(4), 1), (Windows.uniform(4), 3), (Windows.uniform(2), 6)):
        with pytest.raises(ValueError, match="across the student's boundary"):
            WindowSolver.from_student(table, windows, steps)
    with pytest.raises(ValueError, match="trained from 0.5 to 0 only"):
        WindowSolver.from_student(ChordTable(sd, Windows((0.5, 0.25, 0)), "ddim_eps"), Windows.uniform(1), 2)
    # its own windows again (reflow once more) with any number of steps
    assert WindowSolver.from_student(table, Windows.uniform(8), 3).evaluations == 3
