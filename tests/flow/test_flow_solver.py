"""The solve inside a window: stock DDIM, exact flows, index bookkeeping, guidance (oracles 9, 11)."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from reflow.flow import (
    VE,
    ChordTable,
    ContinuousVP,
    Rectified,
    Windows,
    WindowSolver,
    index,
    network_time,
)
from reflow.flow.exact import GaussianData, MixtureData, network
from reflow.flow.prediction import convert, ddim_step

STOCK = {"ddim_eps": "epsilon", "ddim_v": "v_prediction"}


def stock_sample(config, kind, steps, model, z):
    scheduler = DDIMScheduler(
        **config,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
        prediction_type=STOCK[kind],
    )
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        z = scheduler.step(model(z, timestep.expand(len(z)).to(z.device).float()), timestep, z).prev_sample
    return z


@pytest.mark.parametrize("kind", list(STOCK))
@pytest.mark.parametrize("count", [1, 2, 4, 5, 8, 10, 20])
def test_item9_k_steps_on_k_windows_are_stock_ddim(sd, sd_config, kind, count, model, device):
    z = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1)).to(device)
    table = ChordTable(sd, Windows.uniform(count), kind, device=device)
    truth = stock_sample(sd_config, kind, count, model, z)
    ours = z
    for k in range(count):
        window = torch.full((3,), k, device=device)
        t = table.t_start[window]
        p, q = (value.view(-1, 1, 1, 1) for value in table.end_coefficients(window, t))
        ours = p * ours + q * model(ours, network_time(t))
    once = torch.zeros(3, dtype=torch.long, device=device)
    solver = WindowSolver(sd, Windows.uniform(1), count, prediction_type=STOCK[kind], device=device)
    student = WindowSolver.from_student(table, Windows.uniform(1), count)
    for value in (ours, solver.solve(model, z, once), student.solve(model, z, once)):
        assert float((value - truth).abs().max() / truth.abs().max()) < 1e-6


def test_item11_indices_are_stepped_exactly(sd):
    solver = WindowSolver(sd, Windows.uniform(4), 10)
    _, _, timestep = solver.steps_table()
    assert timestep[:, 0].tolist() == [999, 974, 949, 924, 899, 874, 849, 824, 799, 774]
    assert timestep[0].tolist() == [999, 749, 499, 249]
    assert timestep.dtype == torch.float32
    # 32 steps over 8, 4, 2 windows and one: the same grid
    grids = [WindowSolver(sd, Windows.uniform(k), 32 // k).steps_table()[2].T.flatten().tolist() for k in (8, 4, 2, 1)]
    assert all(grid == grids[0] for grid in grids) and len(grids[0]) == 32
    assert grids[0] == [index(1 - i / 32) for i in range(32)]


@pytest.mark.parametrize(("count", "steps"), [(8, 4), (4, 8), (3, 7), (6, 5), (16, 2), (7, 3), (1, 32)])
def test_item11_windows_join_without_seams(sd, count, steps):
    # With one constant eps every window must end on the table's own (alpha, sigma), which is where the next one starts.
    windows = Windows.uniform(count)
    a, b, _ = WindowSolver(sd, windows, steps, dtype=torch.float64).steps_table()
    alpha, sigma = sd.alpha_sigma(torch.tensor(windows.boundaries, dtype=torch.float64))
    x0, eps = 0.7, -1.3
    z = alpha[:-1] * x0 + sigma[:-1] * eps
    for i in range(steps):
        z = a[i] * z + b[i] * eps
    torch.testing.assert_close(z, alpha[1:] * x0 + sigma[1:] * eps, rtol=1e-12, atol=1e-13)


def test_steps_that_do_not_fit_are_refused(sd):
    with pytest.raises(ValueError, match="300 solver steps do not fit into the window from 1 to 0.75"):
        WindowSolver(sd, Windows.uniform(4), 300)
    with pytest.raises(ValueError, match="at least one"):
        WindowSolver(sd, Windows.uniform(4), 0)
    WindowSolver(sd, Windows.uniform(4), 150)
    for bad in ({"method": "rk4"}, {"prediction_type": "ddim_eps"}):
        with pytest.raises(ValueError, match="not known"):
            WindowSolver(sd, Windows.uniform(4), 4, **bad)


KINDS = ("epsilon", "v_prediction", "sample", "velocity")


@pytest.mark.parametrize("kind", KINDS)
def test_every_reading_gives_one_trajectory(sd, kind, device):
    data = GaussianData(torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([0.3, 0.8], dtype=torch.float64))
    z = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    window = torch.arange(4, device=device)
    for method in ("ddim", "heun"):
        options = {"method": method, "device": device, "dtype": torch.float64}
        solvers = [WindowSolver(sd, Windows.uniform(4), 6, prediction_type=k, **options) for k in (kind, "epsilon")]
        got, truth = (
            solver.solve(network(data, sd, k), z, window) for solver, k in zip(solvers, (kind, "epsilon"), strict=True)
        )
        torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-10)
    ends = []
    for method in ("euler", "ddim"):
        options = {"prediction_type": kind, "method": method, "device": device, "dtype": torch.float64}
        ends.append(WindowSolver(sd, Windows.uniform(4), 6, **options).solve(network(data, sd, kind), z, window))
    assert torch.equal(*ends)


CONTINUOUS = {"vp": (ContinuousVP(), 0.05), "rectified": (Rectified(), 0.0), "ve": (VE(), 0.02)}


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("heun", 2)])
def test_order_of_convergence_on_a_gaussian(name, method, order, device):
    schedule, clean = CONTINUOUS[name]
    data = GaussianData(torch.tensor([1.0, -0.5], dtype=torch.float64), torch.tensor([0.6, 0.2], dtype=torch.float64))
    windows = Windows.uniform(2, t_noise=0.9, t_clean=clean)
    ends = torch.tensor(windows.boundaries, dtype=torch.float64, device=device)
    alpha, sigma = schedule.alpha_sigma(ends)
    window = torch.arange(2, device=device).repeat(8)
    z = torch.randn(16, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(device)
    z = alpha[window, None] * data.mean.to(device) + data.spread(alpha[window], sigma[window], z) * z
    truth = data.solve(z, alpha[window], sigma[window], alpha[window + 1], sigma[window + 1])
    model, errors = network(data, schedule), []
    for steps in (32, 64, 128):
        solver = WindowSolver(schedule, windows, steps, method=method, device=device, dtype=torch.float64)
        errors.append(float((solver.solve(model, z, window) - truth).norm()))
    rates = [errors[k] / errors[k + 1] for k in range(2)]
    assert all(2**order * 0.8 < rate < 2**order * 1.25 for rate in rates), (errors, rates)


def test_discrete_solves_reach_the_exact_gaussian_map(sd, device):
    data = GaussianData(torch.tensor([1.0, -0.5]), torch.tensor([0.6, 0.2]))
    windows, window = Windows.uniform(4), torch.arange(4, device=device).repeat(16)
    alpha, sigma = sd.alpha_sigma(torch.tensor(windows.boundaries, dtype=torch.float64, device=device))
    z = torch.randn(64, 2, generator=torch.Generator().manual_seed(3)).to(device)
    z = (alpha[window, None] * data.mean.to(device) + data.spread(alpha[window], sigma[window], z) * z).float()
    truth = data.solve(z, alpha[window], sigma[window], alpha[window + 1], sigma[window + 1])
    errors = {}
    for method, steps in (("ddim", 8), ("ddim", 120), ("heun", 8)):
        solver = WindowSolver(sd, windows, steps, method=method, device=device)
        errors[method, steps] = float((solver.solve(network(data, sd), z, window) - truth).abs().max())
    assert errors["ddim", 120] < 0.01 and errors["ddim", 8] < 0.15
    # eight Heun steps, sixteen network calls, beat 120 first-order ones
    assert errors["heun", 8] < errors["ddim", 120]


def test_mixture_map_converges_to_the_reference(sd, device):
    means = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [-1.0, -1.5]], dtype=torch.float64)
    data = MixtureData(means, 0.3, torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64))
    z = torch.randn(64, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(device)
    truth = data.solve(z, sd, 1.0, 0.0, steps=200)
    coarse = data.solve(z, sd, 1.0, 0.0, steps=100)
    assert float((truth - coarse).abs().max()) < 1e-4
    window = torch.zeros(64, dtype=torch.long, device=device)
    errors = []
    for steps in (25, 75, 225):
        solver = WindowSolver(sd, Windows.uniform(1), steps, method="heun", device=device, dtype=torch.float64)
        errors.append(float((solver.solve(network(data, sd), z, window) - truth).square().mean().sqrt()))
    assert errors[2] < 4e-3 and errors[2] < errors[1] / 3 < errors[0] / 9


def test_heun_is_the_textbook_trapezoid_and_euler_where_sigma_is_zero(device):
    schedule, windows, steps = Rectified(), Windows.uniform(2), 3
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(6), dtype=torch.float64).to(device)

    def flow(z, timestep):
        return torch.sin(z @ weight + timestep.double()[:, None] / 500)

    z = torch.randn(2, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(device)
    options = {"prediction_type": "velocity", "method": "heun", "device": device, "dtype": torch.float64}
    solver = WindowSolver(schedule, windows, steps, **options)
    got = solver.solve(flow, z, torch.tensor([0, 1], device=device))
    truth = z.clone()
    for row, start in enumerate((1.0, 0.5)):
        y = z[row : row + 1]
        for i in range(steps):
            t, after = start - 0.5 * i / steps, start - 0.5 * (i + 1) / steps

            def u(point, time):
                return flow(point, torch.full((1,), 1000 * time, device=device, dtype=torch.float32))

            first = u(y, t)
            moved = y + (after - t) * first
            y = moved if after < 1e-12 else y + (after - t) * (first + u(moved, after)) / 2
        truth[row] = y[0]
    torch.testing.assert_close(got, truth, rtol=1e-6, atol=1e-6)
    assert solver.evaluations == 6
    # a network that cannot be asked at sigma = 0 is not asked there
    times = solver.heun_table().timestep[:, 1]
    assert float(times.min()) > 0


def test_zero_terminal_snr_teachers(zero_snr, model, device):
    z = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(8)).to(device)
    window = torch.zeros(2, dtype=torch.long, device=device)
    for method in ("ddim", "heun"):
        options = {"prediction_type": "v_prediction", "method": method, "device": device}
        solver = WindowSolver(zero_snr, Windows.uniform(2), 4, **options)
        assert bool(torch.isfinite(solver.solve(model, z, window)).all())
        with pytest.raises(ValueError, match="zero terminal SNR.*v_prediction"):
            WindowSolver(zero_snr, Windows.uniform(2), 4, method=method)


def test_mixed_windows_equal_one_at_a_time(sd, model, device):
    z = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(9)).to(device)
    window = torch.tensor([3, 0, 2, 2, 1], device=device)
    for method in ("ddim", "heun"):
        solver = WindowSolver(sd, Windows.uniform(4), 8, method=method, device=device)
        together = solver.solve(model, z, window)
        alone = torch.cat([solver.solve(model, z[k : k + 1], window[k : k + 1]) for k in range(5)])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["ddim", "heun"])
def test_guidance_doubles_rows_and_none_does_not(sd, model, method, device):
    windows, window = Windows.uniform(2), torch.tensor([0, 1, 1], device=device)
    z = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(10)).to(device)
    seen = []

    def guided(both, timestep):
        seen.append(len(both))
        assert torch.equal(both[:3], both[3:]) and torch.equal(timestep[:3], timestep[3:])
        output = model(both, timestep)
        return torch.cat([0.5 * output[:3], output[3:]])

    def conditional(rows, timestep):
        seen.append(len(rows))
        return model(rows, timestep)

    def by_hand(rows, timestep):
        output = model(rows, timestep)
        return 0.5 * output + 3.0 * (output - 0.5 * output)

    def solver(scale):
        return WindowSolver(sd, windows, 4, method=method, guidance_scale=scale, device=device)

    calls = 4 if method == "ddim" else 8
    plain = solver(None).solve(conditional, z, window)
    assert seen == [3] * calls and solver(None).evaluations == calls
    seen.clear()
    ones = solver(1.0).solve(guided, z, window)
    assert seen == [6] * calls and solver(1.0).evaluations == 2 * calls
    torch.testing.assert_close(ones, plain, rtol=1e-5, atol=1e-5)
    truth = solver(None).solve(by_hand, z, window)
    torch.testing.assert_close(solver(3.0).solve(guided, z, window), truth, rtol=1e-4, atol=1e-4)
    each = torch.tensor([1.0, 3.0, 1.0], device=device)
    mixed = solver(each).solve(guided, z, window)
    torch.testing.assert_close(mixed[1], truth[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[0], plain[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["ddim", "heun"])
def test_only_the_networks_input_is_cast(sd, model, method, device):
    dtypes = set()

    def half(rows, timestep):
        dtypes.add((rows.dtype, timestep.dtype))
        return model(rows, timestep)

    z = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(11)).to(device)
    solver = WindowSolver(sd, Windows.uniform(2), 4, method=method, device=device)
    z_end = solver.solve(half, z, torch.tensor([0, 1], device=device), input_dtype=torch.bfloat16)
    assert dtypes == {(torch.bfloat16, torch.float32)} and z_end.dtype == torch.float32
    dtypes.clear()

    def low(rows, timestep):
        return half(rows, timestep).bfloat16()

    # without input_dtype the network is given the fp32 state, also when it answers in bf16
    assert solver.solve(low, z, torch.tensor([0, 1], device=device)).dtype == torch.float32
    assert dtypes == {(torch.float32, torch.float32)}


class _NoSync(TorchDispatchMode):
    """Fails on any op that would make the host wait for a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["ddim", "heun"])
def test_a_solve_never_asks_the_host(sd, model, method, device):
    table = ChordTable(sd, Windows.uniform(4), "ddim_v", device=device)
    solvers = [
        WindowSolver(sd, Windows.uniform(2), 4, method=method, guidance_scale=2.0, device=device),
        WindowSolver.from_student(table, Windows.uniform(2), 2),
    ]
    z = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(12)).to(device)
    t = torch.tensor([1.0, 0.7, 0.5, 0.2], device=device)
    Windows.uniform(2).lookup(t)
    with _NoSync():
        window = Windows.uniform(2).lookup(t)
        for solver in solvers:
            solver.solve(model, z, window)
        table.velocity_coefficients(window, t), network_time(t)
    with pytest.raises(AssertionError), _NoSync():
        t[0].item()


def test_solver_equals_ddim_steps_by_hand(zero_snr, model, device):
    z = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(16), dtype=torch.float64).to(device)
    options = {"prediction_type": "v_prediction", "device": device, "dtype": torch.float64}
    solver = WindowSolver(zero_snr, Windows.uniform(2), 3, **options)
    got = solver.solve(model, z, torch.tensor([0, 0], device=device))
    places = [index(1 - 0.5 * i / 3) for i in range(4)]
    alpha, sigma = zero_snr.at(torch.tensor(places, device=device))
    for i in range(3):
        output = model(z, torch.full((2,), float(places[i]), device=device))
        z = ddim_step("v_prediction", output, z, alpha[i], sigma[i], alpha[i + 1], sigma[i + 1])
        if i:
            eps = convert("v_prediction", "epsilon", output, z, alpha[i], sigma[i])
            assert bool(torch.isfinite(eps).all())
    torch.testing.assert_close(got, z, rtol=1e-12, atol=1e-12)
