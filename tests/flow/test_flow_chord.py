"""The chord schedule and its parameterisations (oracles 7, 8, 10, 19, 22), and zero terminal SNR."""

import pytest
import torch

from reflow.flow import PREDICTION_TYPES, VE, ChordTable, ContinuousVP, DiscreteVP, Rectified, Windows
from reflow.flow.prediction import ddim_step, from_x0_eps


def column(value, like):
    return value.to(like).view(-1, *[1] * (like.ndim - 1))


def everywhere(table, places=(0.0, 0.2, 0.55, 0.999, 1.0)):
    """(window, t) covering every window at several places, boundaries of both sides included."""
    window = torch.arange(len(table), device=table.device).repeat_interleave(len(places))
    tau = torch.tensor(places, device=table.device, dtype=table.dtype).repeat(len(table))
    return window, table.time(window, tau)


def perflow(table, window, kind):
    """PeRFlow's L and E of each sample's window, straight from abar."""
    times = torch.tensor(table.windows.boundaries, dtype=torch.float64)
    alpha, sigma = table.schedule.alpha_sigma(times)
    a_s, s_s, a_e, s_e = alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]
    lam, g = a_e / a_s, a_s / a_e
    eta = s_e - lam * s_s if kind == "ddim_eps" else -torch.sqrt(1 - g**2) / g
    return lam[window.cpu()], eta[window.cpu()]


@pytest.mark.parametrize("kind", ["ddim_eps", "diff_eps"])
@pytest.mark.parametrize("count", [1, 2, 4, 8, 3])
def test_item7_table_equals_perflows_closed_form(sd, kind, count, dtype, random, close, device):
    table = ChordTable(sd, Windows.uniform(count), kind, device=device, dtype=dtype)
    window, t = everywhere(table)
    z, eps = random(len(t), 3, 4, 4, seed=1), random(len(t), 3, 4, 4, seed=2)
    a, b = table.velocity_coefficients(window, t)
    velocity = column(a, z) * z + column(b, z) * eps

    exact = Windows.uniform(count)
    lam, eta = perflow(table, window, kind)
    start = torch.tensor(exact.t_start, dtype=torch.float64)[window.cpu()]
    end = torch.tensor(exact.t_end, dtype=torch.float64)[window.cpu()]
    now = t.double().cpu()
    zd, ed = z.double().cpu(), eps.double().cpu()
    denominator = now - end + lam * (start - now)
    truth = (column(1 - lam, zd) * zd - column(eta, zd) * ed) / column(denominator, zd)
    close(velocity, truth)

    # lambda_t, eta_t: the two-step form z_e^ = lambda_t z_t + eta_t eps
    d = lam * (now - start) + (end - now)
    p, q = table.end_coefficients(window, t)
    close(p, lam * (end - start) / d)
    close(q, eta * (end - now) / d)

    # inverse reading: the eps that gives a velocity
    m, n = table.output_target_coefficients(window, t)
    inverse = (column(1 - lam, zd) * zd - column(denominator, zd) * truth) / column(eta, zd)
    close(column(m, z) * z + column(n, z) * truth.to(z), inverse)


def test_item8_ratio_of_the_two_eps_readings(sd):
    expected = {
        8: [0.578, 0.532, 0.492, 0.463, 0.450, 0.462, 0.520, 0.929],
        4: [0.751, 0.658, 0.632, 0.959],
        2: [0.895, 0.982],
        1: [0.998],
    }
    for count, ratios in expected.items():
        windows = Windows.uniform(count)
        ddim, diff = (ChordTable(sd, windows, kind, dtype=torch.float64) for kind in ("ddim_eps", "diff_eps"))
        window, t = everywhere(ddim)
        (a, b), (a2, b2) = ddim.velocity_coefficients(window, t), diff.velocity_coefficients(window, t)
        assert torch.equal(a, a2)
        ratio = (b / b2).view(count, -1)
        # a constant of the window, and the published numbers
        assert float((ratio - ratio[:, :1]).abs().max()) < 1e-12
        assert ratio[:, 0].tolist() == pytest.approx(ratios, abs=6e-4)


def test_item10_chord_leaves_the_schedule(sd):
    table = ChordTable(sd, Windows.uniform(4), "ddim_eps", dtype=torch.float64)
    window = torch.arange(4)
    t = table.time(window, torch.full((4,), 0.5, dtype=torch.float64))
    chord, schedule = torch.stack(table.alpha_sigma(window, t)), torch.stack(sd.alpha_sigma(t))
    # the printed gaps are estimates from samples, good to 1 %
    assert (chord - schedule).norm(dim=0).tolist() == pytest.approx([0.0185, 0.0201, 0.0223, 0.0733], rel=0.012)
    assert chord[:, 3].tolist() == pytest.approx([0.911, 0.299], abs=6e-4)
    assert schedule[:, 3].tolist() == pytest.approx([0.929, 0.370], abs=6e-4)


def test_item22_speed_of_each_window(sd):
    expected = {
        8: [0.54, 0.83, 1.13, 1.39, 1.57, 1.70, 1.82, 2.78],
        4: [0.69, 1.25, 1.63, 2.28],
        2: [0.96, 1.89],
    }
    for count, speeds in expected.items():
        table = ChordTable(sd, Windows.uniform(count), "ddim_eps")
        assert table.speed.tolist() == pytest.approx(speeds, abs=6e-3)
        # and it is the rms of (z_end - z_start)/dt on a constant-eps path
        g = torch.Generator().manual_seed(0)
        x0, eps = torch.randn(count, 60000, generator=g), torch.randn(count, 60000, generator=g)
        z_s = table.alpha_start[:, None] * x0 + table.sigma_start[:, None] * eps
        z_e = table.alpha_end[:, None] * x0 + table.sigma_end[:, None] * eps
        rms = ((z_e - z_s) / table.dt[:, None]).square().mean(1).sqrt()
        torch.testing.assert_close(rms, table.speed, rtol=0.01, atol=0)


KINDS = {"ddim_eps": "epsilon", "ddim_v": "v_prediction"}
SCHEDULES = {"vp": None, "continuous": ContinuousVP(), "ve": VE()}


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_perfect_output_reads_as_the_chord(sd, kind, name, dtype, random, close, device):
    schedule = SCHEDULES[name] or sd
    windows = Windows.uniform(4, t_noise=0.96 if name == "continuous" else 1.0)
    table = ChordTable(schedule, windows, kind, device=device, dtype=dtype)
    window, t = everywhere(table)
    x0, eps = random(len(t), 8, seed=1), random(len(t), 8, seed=2)
    alpha, sigma = table.alpha_sigma(window, t)
    z = table.add_noise(x0, eps, window, t)
    ends = torch.tensor(windows.boundaries, dtype=torch.float64)
    a, s = (value.to(device) for value in schedule.alpha_sigma(ends))
    d_t = (ends[1:] - ends[:-1]).to(device)[window, None]
    velocity = (a.diff()[window, None] * x0.double() + s.diff()[window, None] * eps.double()) / d_t
    if kind == "velocity":
        output = velocity.to(dtype)
    elif kind == "diff_eps":
        g = (a[:-1] / a[1:])[window]
        scale = (s[1:] - s[:-1] / (a[:-1] / a[1:]))[window] * -g
        output = eps * (scale / torch.sqrt(s[:-1][window] ** 2 - (g * s[1:][window]) ** 2))[:, None].to(dtype)
    else:
        output = from_x0_eps(KINDS[kind], x0, eps, alpha, sigma)
    p, q = table.velocity_coefficients(window, t)
    close(p[:, None] * z + q[:, None] * output, velocity)
    end = a[1:][window, None] * x0.double() + s[1:][window, None] * eps.double()
    p, q = table.end_coefficients(window, t)
    close(p[:, None] * z + q[:, None] * output, end)


def test_chord_meets_the_schedule_at_both_ends(sd, device):
    table = ChordTable(sd, Windows.uniform(4), "ddim_v", device=device)
    window = torch.arange(4, device=device)
    for t, alpha, sigma in (
        (table.t_start, table.alpha_start, table.sigma_start),
        (table.t_end, table.alpha_end, table.sigma_end),
    ):
        got = table.alpha_sigma(window, t)
        torch.testing.assert_close(got[0], alpha, rtol=2e-7, atol=0)
        torch.testing.assert_close(got[1], sigma, rtol=2e-7, atol=0)
    expected = sd.at(torch.tensor([999, 749, 499, 249]))
    torch.testing.assert_close(table.alpha_start.cpu(), expected[0].float(), rtol=1e-7, atol=0)
    assert float(table.alpha_end[-1]) == pytest.approx(float(sd.alphas_cumprod[0]) ** 0.5)
    assert table.alpha_start.dtype == torch.float32 and bool((table.dt < 0).all())


@pytest.mark.parametrize("kind", ["ddim_eps", "ddim_v"])
def test_a_step_from_the_window_start_is_ddim(sd, kind, dtype, random, close, device):
    table = ChordTable(sd, Windows.uniform(4), kind, device=device, dtype=dtype)
    window = torch.arange(4, device=device)
    z, output = random(4, 6, seed=3), random(4, 6, seed=4)
    p, q = table.end_coefficients(window, table.t_start[window])
    a, s = sd.at(torch.tensor([999, 749, 499, 249, 0], device=device))
    truth = ddim_step(KINDS[kind], output.double(), z.double(), a[:-1], s[:-1], a[1:], s[1:])
    close(p[:, None] * z + q[:, None] * output, truth)


def test_eps_weight_has_its_published_factors(sd):
    expected = {
        "ddim_eps": [(0.100, 0.348), (0.192, 0.426), (0.331, 0.516), (0.377, 0.458)],
        "diff_eps": [(0.075, 0.261), (0.127, 0.280), (0.209, 0.326), (0.361, 0.439)],
    }
    for kind, factors in expected.items():
        table = ChordTable(sd, Windows.uniform(4), kind, dtype=torch.float64)
        window, t = everywhere(table, (0.0, 1.0))
        got = table.eps_weight(window, t).sqrt().view(4, 2)
        torch.testing.assert_close(got, torch.tensor(factors, dtype=torch.float64), rtol=0, atol=6e-4)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_eps_weight_turns_velocity_errors_into_noise_errors(sd, kind, dtype, random, close, device):
    table = ChordTable(sd, Windows.uniform(4), kind, device=device, dtype=dtype)
    window, t = everywhere(table)
    z, v, error = (random(len(t), 8, seed=k) for k in (1, 2, 3))
    reader = table if kind == "diff_eps" else ChordTable(sd, table.windows, "ddim_eps", device=device, dtype=dtype)
    m, n = reader.output_target_coefficients(window, t)
    eps = [m[:, None] * z + n[:, None] * value for value in (v, v + error)]
    noise_mse = (eps[1] - eps[0]).double().square().mean(1)
    close(table.eps_weight(window, t) * error.square().mean(1), noise_mse)


def test_zero_terminal_snr(zero_snr, dtype, random, close, device):
    windows = Windows.uniform(4)
    for kind in ("ddim_eps", "diff_eps"):
        with pytest.raises(ValueError, match='window 0.*zero terminal SNR.*"ddim_v"'):
            ChordTable(zero_snr, windows, kind)
        # inner windows carry signal and are welcome
        ChordTable(zero_snr, Windows((0.75, 0.5)), kind)
    table = ChordTable(zero_snr, windows, "ddim_v", device=device, dtype=dtype)
    window, t = everywhere(table)
    x0, eps = random(len(t), 8, seed=1), random(len(t), 8, seed=2)
    assert torch.equal(table.start(x0, eps, window)[0], eps[0])
    z = table.add_noise(x0, eps, window, t)
    output = from_x0_eps("v_prediction", x0, eps, *table.alpha_sigma(window, t))
    p, q = table.velocity_coefficients(window, t)
    ends = torch.tensor(windows.boundaries, dtype=torch.float64)
    a, s = (value.to(device) for value in zero_snr.alpha_sigma(ends))
    truth = 4 * (-a.diff()[window, None] * x0.double() - s.diff()[window, None] * eps.double())
    close(p[:, None] * z + q[:, None] * output, truth)
    weights = table.eps_weight(window, t)
    assert bool(torch.isfinite(weights).all()) and weights[0] == 0
    cosine = DiscreteVP.from_config({"beta_schedule": "squaredcos_cap_v2", "beta_start": 0.1, "beta_end": 0.2})
    with pytest.raises(ValueError, match="zero terminal SNR"):
        ChordTable(cosine, windows, "ddim_eps")


def test_velocity_on_the_rectified_schedule_is_plain_flow_matching(dtype, random, close, device):
    table = ChordTable(Rectified(), Windows.uniform(1), "velocity", device=device, dtype=dtype)
    x0, eps, t = random(5, 3, seed=1), random(5, 3, seed=2), torch.linspace(0, 1, 5).to(device, dtype)
    window = torch.zeros(5, dtype=torch.long, device=device)
    flow = (1 - t.double())[:, None] * x0.double() + t.double()[:, None] * eps.double()
    close(table.add_noise(x0, eps, window, t), flow)
    sample_coef, output_coef = table.velocity_coefficients(window, t)
    assert sample_coef.tolist() == [0] * 5 and output_coef.tolist() == [1] * 5


def test_item19_merging_windows(sd, random, dtype, close):
    # v_merged = (v_1 + v_2)/2 for equal windows, so the merged speed is at most the mean, and equal only if parallel.
    fine, coarse = (ChordTable(sd, Windows.uniform(k), "velocity", dtype=dtype) for k in (4, 2))
    z = [random(3, 16, seed=k) for k in range(3)]
    first, second = ((z[k + 1] - z[k]) / fine.dt[k] for k in range(2))
    merged = (z[2] - z[0]) / coarse.dt[0]
    close(merged, (first.double() + second.double()) / 2)
    mean_speed = (first.norm(dim=1) + second.norm(dim=1)) / 2
    assert bool((merged.norm(dim=1) < mean_speed).all())
    parallel = (first + 2.5 * first) / 2
    close(parallel.norm(dim=1), (first.double().norm(dim=1) * 3.5) / 2)


def test_table_moves_and_refuses(sd, device):
    table = ChordTable(sd, Windows.uniform(2), "ddim_eps")
    moved = table.to(device, torch.float64)
    assert moved.alpha_start.dtype == torch.float64 and moved.dt.device.type == device.type and len(moved) == 2
    window = torch.tensor([0, 1], device=device)
    tau = torch.tensor([0.25, 0.5], device=device, dtype=torch.float64)
    torch.testing.assert_close(moved.tau(window, moved.time(window, tau)), tau)
    with pytest.raises(ValueError, match='"epsilon".*"ddim_eps"'):
        ChordTable(sd, Windows.uniform(2), "epsilon")
    with pytest.raises(ValueError, match="same noise level"):
        ChordTable(VE(sigma_max=2.0), Windows((1.0, 0.9, 0.5)), "velocity")
    # Narrow is not flat: one step of the training grid is a window, though its ends' noise differs by .001 only.
    narrow = ChordTable(sd, Windows((1.0, 0.501, 0.5)), "ddim_eps")
    assert 1e-4 < float(narrow.sigma_start[1] - narrow.sigma_end[1]) < 5e-3
