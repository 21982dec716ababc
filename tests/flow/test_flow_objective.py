"""Time densities and losses (oracles 12, 13, 14), weights by time, and what each loss means."""

import math

import pytest
import torch

from reflow.flow import (
    PREDICTION_TYPES,
    ChordTable,
    Windows,
    chord_loss,
    sample_tau,
    schedule_end_coefficients,
    schedule_loss,
    schedule_point,
    time_weight,
    window_weight,
)
from reflow.flow.objective import NORMAL_FLOOR, u_shaped_density


def uniforms(count, device="cpu", seed=0):
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)).to(device)


def test_item14_u_shape_density_and_its_sampler(device):
    ends = u_shaped_density(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([2.075, 0.551, 2.075], abs=5e-4)
    edges = torch.linspace(0, 1, 20001, dtype=torch.float64)
    assert float(torch.trapezoid(u_shaped_density(edges), edges)) == pytest.approx(1.0, abs=1e-7)
    tau = sample_tau(uniforms(200_000, device), "u_shaped").double().cpu()
    counts = torch.histc(tau, bins=20, min=0, max=1) / 200_000
    cumulative = torch.cumulative_trapezoid(u_shaped_density(edges), edges)
    mass = torch.cat([torch.zeros(1, dtype=torch.float64), cumulative])[::1000].diff()
    torch.testing.assert_close(counts, mass, rtol=0, atol=4e-3)
    # other sharpness: the mean stays at the middle, the spread grows
    sharp = sample_tau(uniforms(200_000, device), "u_shaped", sharpness=12.0)
    assert float(sharp.mean()) == pytest.approx(0.5, abs=5e-3) and float(sharp.std()) > float(tau.std()) + 0.05


@pytest.mark.parametrize("kind", ["uniform", "u_shaped", "window_start", "exponential"])
def test_tau_is_a_function_of_each_samples_uniforms_below_one(kind, device):
    u = uniforms(64, device)
    tau = sample_tau(u, kind)
    assert tau.dtype == u.dtype and tau.device.type == device.type
    assert torch.equal(sample_tau(u[10:20], kind), tau[10:20])
    assert torch.equal(sample_tau(u.view(4, 16, 2), kind), tau.view(4, 16))
    extremes = torch.tensor([[0.0, 0.0], [0.999999, 0.0], [0.0, 1 - 2**-24], [0.999999, 1 - 2**-24]], device=device)
    for options in ({}, {"share": 0.0, "upper": 1.0}):
        tau = sample_tau(extremes, kind, **options)
        assert bool(((tau >= 0) & (tau < 1)).all())


@pytest.mark.parametrize("sharpness", [0.01, math.log(10), 4.0, 30.0])
def test_the_exponential_density_and_its_sampler(sharpness, device):
    tau = sample_tau(uniforms(200_000, device, seed=2), "exponential", sharpness=sharpness).double().cpu()
    edges = torch.linspace(0, 1, 21, dtype=torch.float64)
    mass = (torch.expm1(-sharpness * edges) / math.expm1(-sharpness)).diff()
    torch.testing.assert_close(torch.histc(tau, bins=20, min=0, max=1) / 200_000, mass, rtol=0, atol=4e-3)
    # Simple ReFlow's 10^t: ten times as many at the noisy end as at the clean one.
    if sharpness == math.log(10):
        assert float((tau < 0.01).sum() / (tau > 0.99).sum()) == pytest.approx(10 ** 0.99, rel=0.15)
    with pytest.raises(ValueError, match='"exponential" has sharpness 0'):
        sample_tau(uniforms(2, device), "exponential", sharpness=0.0)


def test_window_start_mixes(device):
    u = uniforms(100_000, device, seed=1)
    tau = sample_tau(u).cpu()
    assert float((tau == 0).float().mean()) == pytest.approx(0.5, abs=5e-3)
    inner = tau[tau > 0]
    assert float(inner.max()) < 0.7 and float(inner.mean()) == pytest.approx(0.35, abs=4e-3)
    assert bool((sample_tau(u, share=1.0) == 0).all())
    torch.testing.assert_close(sample_tau(u, share=0.0, upper=1.0), u[:, 1])
    assert torch.equal(sample_tau(u, "uniform"), u[:, 1])
    for bad in ({"share": 1.5}, {"upper": 0.0}, {"upper": 1.2}):
        with pytest.raises(ValueError, match="share .* upper"):
            sample_tau(u, **bad)
    with pytest.raises(ValueError, match='"u_shaped"'):
        sample_tau(u, "logit_normal")


@pytest.fixture
def case(sd, random, dtype, device):
    """make(kind, error) -> arguments of chord_loss, an output whose velocity is off by `error` * noise."""

    def make(kind, error=0.3, count=4, schedule=sd):
        table = ChordTable(schedule, Windows.uniform(count), kind, device=device, dtype=dtype)
        window = torch.arange(count, device=device).repeat(2)
        t = table.time(window, torch.linspace(0, 0.9, 2 * count, device=device, dtype=dtype))
        z, target = random(2 * count, 3, 4, 4, seed=1), random(2 * count, 3, 4, 4, seed=2)
        wrong = target + error * random(2 * count, 3, 4, 4, seed=3)
        m, n = (value.view(-1, 1, 1, 1) for value in table.output_target_coefficients(window, t))
        return m * z + n * wrong, wrong, target, z, table, window, t

    return make


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_item13_mse_is_magnitude_plus_direction(kind, case, close):
    output, wrong, target, z, table, window, t = case(kind)
    result = chord_loss(output, target, z, table, window, t)
    d, v, w = (wrong - target).double().flatten(1), target.double().flatten(1), wrong.double().flatten(1)
    size = d.shape[1]
    close(result.mse, d.square().mean(1))
    direction = 2 * w.norm(dim=1) * v.norm(dim=1) * (1 - result.cosine.double()) / size
    close(result.mse - result.magnitude, direction)
    close(result.cosine, torch.cosine_similarity(w, v))
    # the loss with a = direction_weight speed^2, and the components carry no weight
    a = table.speed[window].double()
    for options, factor in (({}, a**2), ({"direction_weight": 0.3}, 0.3 * a**2), ({"direction_scale": "none"}, 1.0)):
        result = chord_loss(output, target, z, table, window, t, **options)
        truth = d.square().mean(1) + factor * (1 - torch.cosine_similarity(w, v))
        close(result.loss, truth.mean())
    close(chord_loss(output, target, z, table, window, t, kind="mse").loss, d.square().mean())
    weight = torch.arange(1, 9).to(a)
    weighted = chord_loss(output, target, z, table, window, t, kind="mse", weight=weight.to(z))
    close(weighted.loss, (weight * d.square().mean(1)).mean())
    torch.testing.assert_close(weighted.mse, result.mse)


def test_item13_speed_scale_multiplies_direction_alike_in_every_window(sd):
    # a rotation of a target with the window's own speed: loss/mse = 1 + direction_weight/2 in every window
    table = ChordTable(sd, Windows.uniform(8), "velocity", dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    v = torch.randn(8, 4096, generator=g, dtype=torch.float64)
    v = v / v.square().mean(1, keepdim=True).sqrt() * table.speed[:, None]
    across = torch.randn(8, 4096, generator=g, dtype=torch.float64)
    across = across - (across * v).sum(1, keepdim=True) / v.square().sum(1, keepdim=True) * v
    across = across / across.norm(dim=1, keepdim=True) * v.norm(dim=1, keepdim=True)
    rotated = math.cos(0.3) * v + math.sin(0.3) * across
    # item 13's matched pair: |rotation - v| = 2 |v| sin(theta/2), the same as scaling by 1 + 2 sin(theta/2)
    torch.testing.assert_close((rotated - v).norm(dim=1), 2 * v.norm(dim=1) * math.sin(0.15), rtol=1e-12, atol=0)
    scaled = v * (1 + 2 * math.sin(0.15))
    for k in range(8):
        window, t = torch.tensor([k]), table.t_start[k : k + 1]
        row = slice(k, k + 1)
        result = chord_loss(rotated[row], v[row], v[row], table, window, t, direction_weight=0.8)
        assert float(result.loss / result.mse) == pytest.approx(1.4, rel=1e-9)
        assert float(result.magnitude) < 1e-20
        grown = chord_loss(scaled[row], v[row], v[row], table, window, t, direction_weight=0.8)
        torch.testing.assert_close(grown.mse, result.mse, rtol=1e-10, atol=0)
        torch.testing.assert_close(grown.loss, grown.mse[0], rtol=1e-10, atol=0)


def test_item13_direction_gradient_is_orthogonal(case, dtype, close):
    output, wrong, target, z, table, window, t = case("velocity")
    gradients = []
    for kind in ("aligned_v", "mse"):
        leaf = output.clone().requires_grad_()
        chord_loss(leaf, target, z, table, window, t, kind=kind, direction_scale="none").loss.backward()
        gradients.append(leaf.grad.double().flatten(1))
    direction = (gradients[0] - gradients[1]) * len(output)
    v, w = target.double().flatten(1), wrong.double().flatten(1)
    along = (direction * w).sum(1) / (direction.norm(dim=1) * w.norm(dim=1))
    assert float(along.abs().max()) < (1e-12 if dtype is torch.float64 else 1e-5)
    sine = torch.sqrt(1 - torch.cosine_similarity(v, w) ** 2)
    close(direction.norm(dim=1), sine / w.norm(dim=1))


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("loss", ["aligned_v", "mse", "pseudo_huber"])
@pytest.mark.parametrize("space", ["velocity", "eps"])
def test_gradients_are_those_of_the_written_formula(kind, loss, space, case, dtype, close):
    output, _, target, z, table, window, t = case(kind)
    leaf = output.clone().requires_grad_()
    result = chord_loss(leaf, target, z, table, window, t, kind=loss, space=space, huber_c=0.05)
    result.loss.backward()

    truth_leaf = output.double().requires_grad_()
    a, b = (value.double().view(-1, 1, 1, 1) for value in table.velocity_coefficients(window, t))
    v = a * z.double() + b * truth_leaf
    d = (v - target.double()).flatten(1)
    weight = table.eps_weight(window, t).double() if space == "eps" else torch.ones_like(t).double()
    if loss == "pseudo_huber":
        d = d * weight.sqrt()[:, None]
        truth = (torch.sqrt(d**2 + 0.05**2) - 0.05).mean()
    else:
        rows = d.square().mean(1)
        if loss == "aligned_v":
            cosine = torch.cosine_similarity(v.flatten(1), target.double().flatten(1))
            rows = rows + table.speed[window].double() ** 2 * (1 - cosine)
        truth = (weight * rows).mean()
    truth.backward()
    close(result.loss.detach(), truth.detach())
    close(leaf.grad, truth_leaf.grad)
    assert not result.mse.requires_grad and result.mse.shape == t.shape


@pytest.mark.parametrize("kind", ["ddim_eps", "diff_eps"])
def test_eps_space_is_the_noise_matching_loss(kind, case, close):
    # PeRFlow's own objective: the MSE between the network's noise and eps* of the window.
    output, _, target, z, table, window, t = case(kind)
    m, n = (value.double().view(-1, 1, 1, 1) for value in table.output_target_coefficients(window, t))
    eps_target = m * z.double() + n * target.double()
    truth = (output.double() - eps_target).square().mean()
    close(chord_loss(output, target, z, table, window, t, kind="mse", space="eps").loss, truth)


def test_weights_multiply_those_of_the_eps_space(case, close):
    output, _, target, z, table, window, t = case("ddim_eps")
    weight = torch.linspace(0.5, 2.0, len(t), device=t.device, dtype=z.dtype)
    both = chord_loss(output, target, z, table, window, t, kind="mse", space="eps", weight=weight)
    close(both.loss, (weight * table.eps_weight(window, t) * both.mse).mean())


def test_zero_snr_eps_space_is_finite(zero_snr, case):
    output, _, target, z, table, window, t = case("ddim_v", schedule=zero_snr)
    for loss in ("aligned_v", "pseudo_huber"):
        leaf = output.clone().requires_grad_()
        result = chord_loss(leaf, target, z, table, window, t, kind=loss, space="eps")
        result.loss.backward()
        assert bool(torch.isfinite(leaf.grad).all()) and bool(torch.isfinite(result.loss))
        assert float(leaf.grad[0].abs().max()) == 0.0


def test_pseudo_huber_norms(case, close, dtype):
    output, wrong, target, z, table, window, t = case("velocity", error=0.002)
    d = (wrong - target).double().flatten(1)
    size = d.shape[1]
    element = chord_loss(output, target, z, table, window, t, kind="pseudo_huber")
    close(element.loss, (torch.sqrt(d**2 + 1e-6) - 1e-3).mean())
    c = 5.4e-4 * size
    sample = chord_loss(output, target, z, table, window, t, kind="pseudo_huber", huber_norm="sample")
    close(sample.loss, ((torch.sqrt(d.square().sum(1) + c * c) - c) / size).mean())
    # and no cancellation where the error is far below c = 1: d^2/2 - d^4/8
    tiny = chord_loss(target + 1e-5, target, z, table, window, t, kind="pseudo_huber", huber_c=1.0).loss
    square = ((target + 1e-5) - target).double().square()
    close(tiny, (square / 2 - square**2 / 8).mean())
    for bad in ({"huber_c": 0.0}, {"huber_norm": "row"}):
        with pytest.raises(ValueError, match="huber"):
            chord_loss(output, target, z, table, window, t, kind="pseudo_huber", **bad)


def test_an_empty_batch_is_zero(sd):
    table = ChordTable(sd, Windows.uniform(4), "ddim_eps")
    none, window = torch.zeros(0, 3, 4, 4), torch.zeros(0, dtype=torch.long)
    for loss in ("aligned_v", "mse", "pseudo_huber"):
        result = chord_loss(none, none, none, table, window, torch.zeros(0), kind=loss)
        assert float(result.loss) == 0.0 and result.mse.shape == (0,)


@pytest.mark.parametrize("kind", ["ddim_eps", "velocity"])
@pytest.mark.parametrize("loss, norm", [("aligned_v", "element"), ("mse", "element"), ("pseudo_huber", "element"), ("pseudo_huber", "sample")])
@pytest.mark.parametrize("space", ["velocity", "eps"])
def test_a_normalized_loss_has_the_gradient_of_the_logarithm(kind, loss, norm, space, case, dtype, close):
    output, _, target, z, table, window, t = case(kind)
    weight = torch.linspace(0.5, 2.0, len(t), device=t.device, dtype=dtype)
    options = dict(kind=loss, huber_c=0.05, huber_norm=norm)
    leaf = output.clone().requires_grad_()
    result = chord_loss(leaf, target, z, table, window, t, space=space, normalize="loss", weight=weight, **options)
    result.loss.backward()
    # Each sample alone, not normalized: the gradient of its logarithm, which knows no eps space.
    for i in range(len(t)):
        alone = output[i:i + 1].clone().requires_grad_()
        own = chord_loss(alone, target[i:i + 1], z[i:i + 1], table, window[i:i + 1], t[i:i + 1], space=space if loss == "pseudo_huber" else "velocity", **options)
        (own.loss + NORMAL_FLOOR).log().backward()
        close(leaf.grad[i] * len(t), alone.grad[0] * weight[i])
    assert float(result.loss.detach()) == pytest.approx(float(weight.mean()), rel=1e-3)
    assert float(chord_loss(output, target, z, table, window, t, space=space, **options).mse[0]) == pytest.approx(float(result.mse[0]))


def test_a_normalized_loss_of_a_perfect_sample_is_finite(sd, random, device, dtype):
    table = ChordTable(sd, Windows.uniform(4), "velocity", device=device)
    v = random(2, 4, 8, 8)
    leaf = v.clone().requires_grad_()
    window, t = torch.tensor([0, 1], device=device), torch.tensor([0.9, 0.6], device=device)
    chord_loss(leaf, v, v, table, window, t, normalize="loss").loss.backward()
    assert bool((leaf.grad == 0).all())


def test_window_weights_make_relative_errors_count_alike(sd, device):
    table, window = ChordTable(sd, Windows.uniform(4), "ddim_eps", device=device), torch.tensor([0, 1, 2, 3], device=device)
    assert window_weight("none", table, window) is None
    weights = window_weight("speed", table, window)
    shares = weights * table.speed**2
    assert shares.tolist() == pytest.approx([float((table.speed**2).mean())] * 4)
    assert float(weights[0] / weights[3]) > 5  # noisy windows move least
    with pytest.raises(ValueError, match="window_weight"):
        window_weight("size", table, window)


def test_unknown_choices_are_named(case):
    arguments = case("ddim_eps")
    output, rest = arguments[0], arguments[2:]
    for options in ({"kind": "l1"}, {"space": "x0"}, {"direction_scale": "auto"}, {"normalize": "batch"}):
        with pytest.raises(ValueError, match=f'"{next(iter(options.values()))}" is not known'):
            chord_loss(output, *rest, **options)


def test_time_weights(sd, device):
    table = ChordTable(sd, Windows.uniform(4), "ddim_eps", device=device)
    window, t = torch.tensor([0, 0, 2, 3], device=device), torch.tensor([1.0, 0.8, 0.5, 0.2], device=device)
    assert time_weight("none", table, window, t) is None
    reciprocal = time_weight("reciprocal", table, window, t).tolist()
    assert reciprocal == pytest.approx([10 / 2.3, 5 / 2.3, 2 / 2.3, 1.25 / 2.3])
    assert time_weight("rcp_win", table, window, t).tolist() == pytest.approx([s / 0.625 for s in (1, 1, 0.5, 0.25)])
    with pytest.raises(ValueError, match="time_weight"):
        time_weight("snr", table, window, t)


@pytest.mark.parametrize("kind", ["ddim_eps", "ddim_v"])
def test_item12_phased_rectified_diffusion(sd, kind, random, dtype, close, device):
    windows = Windows.uniform(4)
    table = ChordTable(sd, windows, kind, device=device, dtype=dtype)
    window = torch.arange(4, device=device).repeat(3)
    tau = torch.tensor([0.0, 0.35, 0.8], device=device, dtype=dtype).repeat_interleave(4)
    t = table.time(window, tau)
    z_s, z_e = random(12, 8, seed=1), random(12, 8, seed=2)

    ends = torch.tensor(windows.boundaries, dtype=torch.float64, device=device)
    a, s = sd.alpha_sigma(ends)
    a_s, s_s, a_e, s_e = (v[window, None] for v in (a[:-1], s[:-1], a[1:], s[1:]))
    now_a, now_s = (v[:, None] for v in sd.alpha_sigma(t.double()))
    start, end = z_s.double(), z_e.double()
    eps = (end / a_e - start / a_s) / (s_e / a_e - s_s / a_s)
    point = now_a * (start / a_s + (now_s / now_a - s_s / a_s) * eps)
    got = schedule_point(table, z_s, z_e, window, t)
    close(got, point)
    # eps* is PeRFlow's ddim_eps target of the same pair
    if kind == "ddim_eps":
        velocity = ((z_e - z_s) / table.dt[window, None]).to(dtype)
        m, n = table.output_target_coefficients(window, table.t_start[window])
        close(m[:, None] * z_s + n[:, None] * velocity, eps)
    # its prediction of the end, with the right output: exactly z_end
    p, q = schedule_end_coefficients(table, window, t)
    output = eps if kind == "ddim_eps" else now_a * eps - now_s * (point - now_s * eps) / now_a
    if kind == "ddim_eps":
        truth = a_e * (point / now_a + (s_e / a_e - now_s / now_a) * 0.7)
        close(p[:, None] * point.to(dtype) + q[:, None] * torch.full_like(z_s, 0.7), truth)
    close(p[:, None] * point.to(dtype) + q[:, None] * output.to(dtype), end)
    exact = schedule_loss(output.to(dtype), z_e, point.to(dtype), table, window, t, huber_c=1.0)
    assert float(exact.loss) < (1e-20 if dtype is torch.float64 else 1e-9)
    wrong = (output + 0.1).to(dtype).requires_grad_()
    off = schedule_loss(wrong, z_e, point.to(dtype), table, window, t)
    error = q.double().abs() * 0.1
    close(off.loss.detach(), (torch.sqrt(error**2 + 1e-6) - 1e-3).mean())
    off.loss.backward()
    assert bool((wrong.grad != 0).all())
    mse = schedule_loss(wrong.detach(), z_e, point.to(dtype), table, window, t, kind="mse")
    close(mse.loss, (error**2).mean())
    close(mse.mse, error**2)


def test_schedule_points_at_zero_snr_and_for_chord_only_students(sd, zero_snr, random, device, dtype, close):
    table = ChordTable(zero_snr, Windows.uniform(4), "ddim_v", device=device, dtype=dtype)
    x0, eps, window = random(4, 8, seed=1), random(4, 8, seed=2), torch.arange(4, device=device)
    t = table.time(window, torch.full((4,), 0.5, device=device, dtype=dtype))
    z_s = table.start(x0, eps, window)
    z_e = table.add_noise(x0, eps, window, table.t_end[window])
    alpha, sigma = zero_snr.alpha_sigma(t.double())
    close(schedule_point(table, z_s, z_e, window, t), alpha[:, None] * x0.double() + sigma[:, None] * eps.double())
    for kind in ("velocity", "diff_eps"):
        with pytest.raises(ValueError, match='"ddim_eps" or "ddim_v"'):
            schedule_end_coefficients(ChordTable(sd, Windows.uniform(4), kind, device=device), window, t)


@pytest.mark.parametrize("loss, norm", [("mse", "element"), ("pseudo_huber", "element"), ("pseudo_huber", "sample")])
def test_schedule_loss_multiplies_every_samples_part_by_its_weight(sd, loss, norm, random, device, dtype, close):
    table = ChordTable(sd, Windows.uniform(4), "ddim_eps", device=device, dtype=dtype)
    window = torch.arange(4, device=device)
    t = table.time(window, torch.full((4,), 0.25, device=device, dtype=dtype))
    z_t, output, z_end = random(4, 8, seed=1), random(4, 8, seed=2), random(4, 8, seed=3)
    p, q = (value.double()[:, None] for value in schedule_end_coefficients(table, window, t))
    d = p * z_t.double() + q * output.double() - z_end.double()
    rows = {
        ("mse", "element"): d.square().mean(1),
        ("pseudo_huber", "element"): (torch.sqrt(d**2 + 0.01) - 0.1).mean(1),
        ("pseudo_huber", "sample"): (torch.sqrt(d.square().sum(1) + 0.64) - 0.8) / 8,
    }[loss, norm]
    a, b, c, e = rows
    options = {"kind": loss, "huber_c": 0.1, "huber_norm": norm}
    weight = torch.tensor([0.25, 3.0, 1.0, 0.0], device=device, dtype=dtype)
    leaf = output.clone().requires_grad_()
    got = schedule_loss(leaf, z_end, z_t, table, window, t, weight=weight, **options)
    close(got.loss.detach(), (a / 4 + 3 * b + c) / 4)
    close(schedule_loss(output, z_end, z_t, table, window, t, **options).loss, (a + b + c + e) / 4)
    close(got.mse, d.square().mean(1))  # of z_end, without any weight
    # the gradient of each sample carries its weight too
    got.loss.backward()
    plain = output.clone().requires_grad_()
    schedule_loss(plain, z_end, z_t, table, window, t, **options).loss.backward()
    close(leaf.grad, weight.double()[:, None] * plain.grad.double())
