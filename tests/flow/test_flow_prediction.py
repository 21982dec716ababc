"""Conversions, DDIM as Euler, re-reading of trained networks, guidance (oracles 1 to 6, 17, 18, 20, 21)."""

import math

import pytest
import torch

from reflow.flow import EDM, VE, ContinuousVP
from reflow.flow.prediction import (
    KINDS,
    anchored_step,
    convert,
    ddim_coefficients,
    ddim_step,
    edm_sigma,
    flow_coefficients,
    flow_time,
    from_x0_eps,
    mse_weight,
    to_x0_eps,
    vp_index,
    vp_time,
)
from reflow_kernels import cfg_combine


@pytest.fixture(params=["vp", "general"])
def point(request, random, dtype, device):
    """x0, eps [5, 3, 4, 4] and a point (alpha, sigma) [5] with z on it."""
    x0, eps = random(5, 3, 4, 4, seed=1), random(5, 3, 4, 4, seed=2)
    angle = torch.linspace(0.15, 1.4, 5, dtype=torch.float64)
    scale = 1.0 if request.param == "vp" else torch.linspace(0.5, 3.0, 5, dtype=torch.float64)
    alpha, sigma = (scale * torch.cos(angle)).to(device, dtype), (scale * torch.sin(angle)).to(device, dtype)
    z = alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * eps
    return x0, eps, alpha, sigma, z


@pytest.mark.parametrize("kind", KINDS)
def test_item3_each_kind_is_read_and_written_back(kind, point, close):
    x0, eps, alpha, sigma, z = point
    output = from_x0_eps(kind, x0, eps, alpha, sigma)
    for value, truth in zip(to_x0_eps(kind, output, z, alpha, sigma), (x0, eps)):
        close(value, truth)
    for other in KINDS:
        close(convert(kind, other, output, z, alpha, sigma), from_x0_eps(other, x0, eps, alpha, sigma))


def test_item3_formulas_as_printed(point, close):
    x0, eps, alpha, sigma, z = (value.double() for value in point)
    a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    output = torch.ones_like(z) * 0.3
    expected = {
        "epsilon": ((z - s * output) / a, output),
        "sample": (output, (z - a * output) / s),
        "velocity": ((z - s * output) / (a + s), (z + a * output) / (a + s)),
    }
    if float((alpha**2 + sigma**2 - 1).abs().max()) < 1e-5:
        expected["v_prediction"] = (a * z - s * output, s * z + a * output)
    _, _, alpha, sigma, z = point
    for kind, truth in expected.items():
        got = to_x0_eps(kind, torch.full_like(z, 0.3), z, alpha, sigma)
        for value, want in zip(got, truth):
            close(value, want)


def test_unknown_kind_is_named():
    z = torch.zeros(1, 1)
    with pytest.raises(ValueError, match='"flow".*"v_prediction"'):
        to_x0_eps("flow", z, z, 1.0, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_item4_mse_weights(kind, point, random, close):
    x0, eps, alpha, sigma, z = point
    wrong = eps + 0.1 * random(*eps.shape, seed=9)
    x_wrong = to_x0_eps("epsilon", wrong, z, alpha, sigma)[0]
    eps_mse = (wrong - eps).double().square().flatten(1).mean(1)
    output_error = from_x0_eps(kind, x_wrong, wrong, alpha, sigma) - from_x0_eps(kind, x0, eps, alpha, sigma)
    close(mse_weight(kind, alpha, sigma) * eps_mse.to(alpha), output_error.double().square().flatten(1).mean(1))


def test_item4_weights_in_log_snr(dtype, close):
    lam = torch.linspace(-6, 6, 13, dtype=torch.float64)
    alpha, sigma = torch.sigmoid(lam).sqrt(), torch.sigmoid(-lam).sqrt()
    a, s = alpha.to(dtype), sigma.to(dtype)
    close(mse_weight("sample", a, s), torch.exp(-lam))
    close(mse_weight("v_prediction", a, s), alpha**2 * (torch.exp(-lam) + 1) ** 2)
    close(mse_weight("velocity", a, s), (torch.exp(-lam / 2) + 1) ** 2)


def test_item1_ddim_is_euler_in_three_coordinates(point, close):
    x0, eps, alpha, sigma, z = point
    a, s = (value.double().view(-1, 1, 1, 1) for value in (alpha, sigma))
    a2, s2 = a * 1.3, s * 0.6
    truth = a2 * x0.double() + s2 * eps.double()
    zd, xd, ed = z.double(), x0.double(), eps.double()
    # the same step as three Euler steps, exactly; z of the narrow dtype is off the point by its rounding
    euler_x = s2 * (zd / s + (a2 / s2 - a / s) * xd)
    euler_eps = a2 * (zd / a + (s2 / a2 - s / a) * ed)
    euler_u = (a2 + s2) * (zd / (a + s) + (s2 / (a2 + s2) - s / (a + s)) * (ed - xd))
    for euler in (euler_x, euler_eps, euler_u):
        close(euler, truth)
    for kind in KINDS:
        output = from_x0_eps(kind, x0, eps, alpha, sigma)
        step = ddim_step(kind, output, z, alpha, sigma, alpha * 1.3, sigma * 0.6)
        close(step, truth)
        p, q = ddim_coefficients(kind, alpha, sigma, alpha * 1.3, sigma * 0.6)
        close(p.view(-1, 1, 1, 1) * z + q.view(-1, 1, 1, 1) * output, truth)
        m, n = flow_coefficients(kind, alpha, sigma)
        close(m.view(-1, 1, 1, 1) * z + n.view(-1, 1, 1, 1) * output, ed - xd)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "velocity"])
def test_item2_ddim_is_scale_invariant(kind, point, close):
    x0, eps, alpha, sigma, z = point
    output = from_x0_eps(kind, x0, eps, alpha, sigma)
    plain = ddim_step(kind, output, z, alpha, sigma, alpha * 1.2, sigma * 0.5)
    c, c2 = 2.5, 0.3
    scaled = ddim_step(kind, output, c * z, c * alpha, c * sigma, c2 * alpha * 1.2, c2 * sigma * 0.5)
    close(scaled / c2, plain.double())


def test_item5_edm_euler_is_flow_euler(random, dtype, close):
    # Any denoiser: v = (x_t - D)/t and Euler in t equals Euler in sigma on z = x_t (1 + sigma).
    weight = random(6, 6, seed=3) * 0.3

    def denoiser(z, sigma):
        return torch.tanh(z @ weight) / (1 + sigma)

    x_t, t, t_next = random(8, 6, seed=4), 0.8, 0.55
    flow, vertical = x_t, (t, 0.7, t_next)
    z = x_t * (1 + float(edm_sigma(torch.tensor(t, dtype=torch.float64))))
    for now, after in zip(vertical, vertical[1:]):
        sigma, sigma_next = now / (1 - now), after / (1 - after)
        v = (flow - denoiser(flow * (1 + sigma), sigma)) / now
        flow = flow + (after - now) * v
        z = z + (sigma_next - sigma) * (z - denoiser(z, sigma)) / sigma
    close(flow * (1 + t_next / (1 - t_next)), z.double())
    # and both are the DDIM step of alpha = 1
    ve = ddim_step("sample", denoiser(z, 1.0), z, 1.0, 1.0, 1.0, 0.5)
    close(ve, (z + (0.5 - 1.0) * (z - denoiser(z, 1.0))).double())


def test_edm_sigma_is_held_at_the_end_of_its_training_range():
    t = torch.tensor([0.5, 80 / 81, 1 - 1e-5, 1.0], dtype=torch.float64)
    assert edm_sigma(t).tolist() == pytest.approx([1, 80, 80, 80])
    free = edm_sigma(t, sigma_max=None)
    assert float(free[2]) == pytest.approx(1e5, rel=1e-4) and math.isinf(float(free[3]))
    back, scale = flow_time(torch.ones(2, dtype=torch.float64), free[:2])
    assert back.tolist() == pytest.approx(t[:2].tolist()) and scale.tolist() == pytest.approx([2, 81])
    assert VE().alpha_sigma(t)[1].tolist() == pytest.approx([1, 80, 80, 80]) and isinstance(EDM(), VE)


def test_item6_discrete_vp_input_scale(sd, random, dtype, close, device):
    x0, eps = random(4, 3, seed=5), random(4, 3, seed=6)
    found = torch.tensor([0, 100, 500, 999], device=device)
    alpha, sigma = (value.to(dtype) for value in sd.at(found))
    t, scale = flow_time(alpha, sigma)
    x_t = (1 - t)[:, None] * x0 + t[:, None] * eps
    close(scale[:, None] * x_t, (alpha[:, None] * x0 + sigma[:, None] * eps).double())
    again, again_scale = vp_index(t, sd.alphas_cumprod.to(device))
    assert torch.equal(again, found)
    close(again_scale, scale.double())
    nearest, _ = vp_index(torch.tensor([0.0, 1.0], dtype=torch.float64), sd.alphas_cumprod)
    assert nearest.tolist() == [0, 999]


def test_item18_continuous_vp_time_and_scale(dtype, close):
    t = torch.linspace(0.001, 0.999, 50, dtype=torch.float64).to(dtype)
    s, scale = vp_time(t)
    wide = t.double()
    log_alpha = torch.log((1 - wide) / torch.sqrt((1 - wide) ** 2 + wide**2))
    close(s, (-0.05 + torch.sqrt(0.0025 - 19.9 * log_alpha)) / 9.95)
    alpha, sigma = ContinuousVP().alpha_sigma(s.double())
    close(sigma / alpha, wide / (1 - wide))
    close(scale, alpha / (1 - wide))
    # other betas
    s, _ = vp_time(wide, 0.5, 5.0)
    alpha, sigma = ContinuousVP(0.5, 5.0).alpha_sigma(s)
    torch.testing.assert_close(sigma / alpha, wide / (1 - wide), rtol=1e-10, atol=0)


def test_item18_ends_are_finite():
    t = torch.tensor([0.0, 1e-5, 1.0], dtype=torch.float64)
    s, scale = vp_time(t)
    assert s[0] == 0 and 0 < s[1] < 1e-3 and scale.tolist() == pytest.approx([1, 1, 1], abs=2e-5)


def test_item17_anchored_step_is_euler_only_on_the_line(random, close):
    noise, x0 = random(3, 5, seed=7), random(3, 5, seed=8)
    t, t_next = 0.7, 0.2
    on_line = (1 - t) * x0 + t * noise
    euler = on_line + (t_next - t) * (on_line - x0) / t
    close(anchored_step(x0, noise, t_next), euler.double())
    off = on_line + 0.1
    euler = off + (t_next - t) * (off - x0) / t
    assert float((anchored_step(x0, noise, t_next) - euler).abs().min()) > 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_item20_guidance_commutes_with_conversion(kind, point, random, close):
    x0, eps, alpha, sigma, z = point
    uncond, cond = random(*z.shape, seed=11), random(*z.shape, seed=12)
    both = torch.cat([uncond, cond])
    guided = convert("epsilon", kind, cfg_combine(both, 7.5), z, alpha, sigma)
    halves = torch.cat([convert("epsilon", kind, half, z, alpha, sigma) for half in (uncond, cond)])
    close(cfg_combine(halves, 7.5), guided.double())


def test_item21_flow_u_and_cosine_v_weight_time_alike():
    # u-MSE with uniform flow time and v-MSE with uniform cosine time have the same w(lambda) p(lambda), e^{-lambda/2}.
    lam = torch.linspace(-5, 5, 21, dtype=torch.float64)
    alpha, sigma = torch.sigmoid(lam).sqrt(), torch.sigmoid(-lam).sqrt()
    t = torch.sigmoid(-lam / 2)
    flow = mse_weight("velocity", alpha, sigma) * t * (1 - t) / 2
    angle = torch.atan(torch.exp(-lam / 2))
    cosine = mse_weight("v_prediction", alpha, sigma) * torch.sin(2 * angle) / 4 / (math.pi / 2)
    for product in (flow, cosine):
        shape = product / torch.exp(-lam / 2)
        assert float(shape.std() / shape.mean()) < 1e-12
