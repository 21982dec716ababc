"""The solver run backwards, from clean to noisy: exact maps, order, what it undoes, and what it refuses."""

import pytest
import torch

from reflow.flow import VE, ContinuousVP, Rectified, Windows, WindowSolver
from reflow.flow.exact import GaussianData, network
from reflow.flow.prediction import KINDS

CONTINUOUS = {"vp": (ContinuousVP(), 0.05), "rectified": (Rectified(), 0.05), "ve": (VE(), 0.02)}


def gaussian():
    return GaussianData(torch.tensor([1.0, -0.5], dtype=torch.float64), torch.tensor([0.6, 0.2], dtype=torch.float64))


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("heun", 2)])
def test_it_reaches_the_exact_flows_noisy_end_at_the_methods_order(name, method, order, device):
    schedule, clean = CONTINUOUS[name]
    data, windows = gaussian(), Windows.uniform(2, t_noise=0.9, t_clean=clean)
    ends = torch.tensor(windows.boundaries, dtype=torch.float64, device=device)
    alpha, sigma = schedule.alpha_sigma(ends)
    window = torch.arange(2, device=device).repeat(8)
    z = torch.randn(16, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(device)
    z = alpha[window + 1, None] * data.mean.to(device) + data.spread(alpha[window + 1], sigma[window + 1], z) * z
    truth = data.solve(z, alpha[window + 1], sigma[window + 1], alpha[window], sigma[window])
    errors = []
    for steps in (32, 64, 128):
        solver = WindowSolver(schedule, windows, steps, method=method, backward=True, device=device, dtype=torch.float64)
        errors.append(float((solver.solve(network(data, schedule), z, window) - truth).norm()))
    rates = [errors[k] / errors[k + 1] for k in range(2)]
    assert all(2**order * 0.75 < rate < 2**order * 1.35 for rate in rates), (errors, rates)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"v_prediction"}))  # along a line v itself turns
@pytest.mark.parametrize("steps", [1, 5])
def test_there_and_back_is_the_same_place_where_the_answer_does_not_change(sd, kind, steps, device):
    """A constant answer of any kind makes each step a map that its own reverse undoes."""
    answer = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    z = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    window = torch.arange(4, device=device).repeat(2)
    settings = dict(prediction_type=kind, device=device, dtype=torch.float64)
    down, up = (WindowSolver(sd, Windows.uniform(4), steps, backward=b, **settings) for b in (False, True))
    for first, second in ((down, up), (up, down)):
        there = first.solve(lambda x, t: answer, z, window)
        assert float((there - z).norm() / z.norm()) > 0.01
        torch.testing.assert_close(second.solve(lambda x, t: answer, there, window), z, rtol=1e-9, atol=1e-9)


def test_the_network_is_asked_at_the_clean_side_of_every_step(sd, device):
    asked = []

    def model(x, t):
        asked.append(t.tolist())
        return torch.zeros_like(x)

    WindowSolver(sd, Windows.uniform(2), 2, backward=True, device=device).solve(model, torch.ones(2, 1, device=device), torch.tensor([0, 1], device=device))
    assert asked == [[499.0, 0.0], [749.0, 249.0]]  # index(.5), index(0); then index(.75), index(.25)


@pytest.mark.parametrize("method", ["ddim", "heun"])
def test_windows_join_and_guidance_doubles_the_rows(sd, method, device):
    data = gaussian()
    z = torch.randn(6, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(device)
    settings = dict(method=method, backward=True, device=device, dtype=torch.float64)
    whole = WindowSolver(sd, Windows.uniform(1), 8, **settings).solve(network(data, sd), z, torch.zeros(6, dtype=torch.long, device=device))
    half = WindowSolver(sd, Windows.uniform(2), 4, **settings)
    parts = half.solve(network(data, sd), z, torch.ones(6, dtype=torch.long, device=device))
    parts = half.solve(network(data, sd), parts, torch.zeros(6, dtype=torch.long, device=device))
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)
    guided = WindowSolver(sd, Windows.uniform(1), 8, guidance_scale=1.0, **settings)
    rows = []

    def two(x, t):
        rows.append(len(x))
        return network(data, sd)(x, t)

    torch.testing.assert_close(guided.solve(two, z, torch.zeros(6, dtype=torch.long, device=device)), whole, rtol=1e-9, atol=1e-9)
    assert set(rows) == {12}


def test_a_sample_teacher_cannot_begin_without_noise_and_others_can(sd, zero_snr, device):
    with pytest.raises(ValueError, match="cannot step from sigma = 0"):
        WindowSolver(Rectified(), Windows.uniform(2), 2, prediction_type="sample", backward=True, device=device)
    z, window = torch.ones(2, 1, device=device), torch.tensor([0, 1], device=device)
    for kind in ("epsilon", "v_prediction", "velocity"):
        assert bool(torch.isfinite(WindowSolver(Rectified(), Windows.uniform(2), 2, prediction_type=kind, backward=True, device=device).solve(
            lambda x, t: 0.5 * x, z, window)).all())
    # At zero terminal SNR nothing is asked at alpha = 0, so that an epsilon teacher may go there.
    up = WindowSolver(zero_snr, Windows.uniform(1), 4, backward=True, device=device)
    assert bool(torch.isfinite(up.solve(lambda x, t: 0.5 * x, z, torch.zeros(2, dtype=torch.long, device=device))).all())
