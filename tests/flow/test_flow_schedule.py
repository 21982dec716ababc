"""Schedules against diffusers' tables, closed forms and published numbers; index(t) as one function."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from reflow.flow import EDM, VE, ContinuousVP, DiscreteVP, Rectified, Schedule, index, network_time


def test_index_of_boundaries():
    times = [1.0, 0.75, 0.5, 0.25, 0.0, 0.125, 1 / 3, 0.0004]
    expected = [999, 749, 499, 249, 0, 124, 332, 0]
    assert [index(t) for t in times] == expected
    assert index(torch.tensor(times)).tolist() == expected
    assert index(torch.tensor(times, dtype=torch.float64)).tolist() == expected
    assert index(torch.tensor(times)).dtype == torch.int64


def test_index_is_the_plain_formula(device):
    times = (torch.arange(0, 8001, dtype=torch.float64) / 8000).to(device)  # CUDA divides by a product with 1/8000
    plain = [max(round(1000 * t) - 1, 0) for t in (k / 8000 for k in range(8001))]
    assert index(times).tolist() == plain
    assert [index(k / 8000) for k in range(8001)] == plain


def test_index_of_the_grid_is_one_value_in_both_precisions(device):
    times = torch.arange(0, 1001, dtype=torch.float64, device=device) / 1000
    assert index(times.float()).tolist() == index(times).tolist() == [0, *range(1000)]


def test_index_scales_with_the_table():
    assert index(1.0, 50) == 49 and index(0.5, 50) == 24 and index(torch.tensor([0.02, 0.0]), 50).tolist() == [0, 0]


def test_network_time(device):
    t = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], device=device)
    assert network_time(t).tolist() == [999, 749, 499, 249, 0]
    assert network_time(t, "perflow").tolist() == [1000, 750, 500, 250, 0]
    assert network_time(t).dtype == torch.float32
    with pytest.raises(ValueError, match="perflow"):
        network_time(t, "float")


def test_sd_schedule_has_its_published_ends(sd):
    alpha, sigma = sd.at(torch.tensor([999, 0]))
    assert alpha.dtype == torch.float64
    assert abs(alpha[0] - 0.06826) < 5e-6 and abs(sigma[0] - 0.99767) < 5e-6
    assert abs(sd.alphas_cumprod[999] - 0.004660) < 5e-7 and abs(sd.alphas_cumprod[0] - 0.999150) < 5e-7


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("rescale", [False, True])
def test_discrete_table_is_diffusers_own(sd_config, name, rescale):
    config = {**sd_config, "beta_schedule": name, "rescale_betas_zero_snr": rescale}
    table = DiscreteVP.from_config(config).alphas_cumprod
    assert table.dtype == torch.float64
    assert torch.equal(table, DDIMScheduler(**config).alphas_cumprod.double())
    assert (float(table[-1]) == 0.0) is rescale


def test_trained_betas_and_a_whole_diffusers_config(sd, sd_config):
    betas = DDIMScheduler(**sd_config).betas.tolist()
    assert torch.equal(DiscreteVP.from_config({"trained_betas": betas}).alphas_cumprod, sd.alphas_cumprod)
    assert torch.equal(DiscreteVP.from_config(DDIMScheduler(**sd_config).config).alphas_cumprod, sd.alphas_cumprod)


def test_discrete_refusals():
    with pytest.raises(ValueError, match="neither beta_start"):
        DiscreteVP.from_config({"shift": 3.0})
    with pytest.raises(ValueError, match="scaled_linear"):
        DiscreteVP.from_config({"beta_start": 0.1, "beta_end": 0.2, "beta_schedule": "sigmoid"})
    with pytest.raises(ValueError, match="must decrease"):
        DiscreteVP(torch.tensor([0.1, 0.5, 0.9]))


def test_discrete_times_read_the_index(sd, device):
    t = torch.tensor([1.0, 0.5, 0.0], device=device, dtype=torch.float64)
    alpha, sigma = sd.alpha_sigma(t)
    assert alpha.device.type == t.device.type
    torch.testing.assert_close(alpha.cpu() ** 2, sd.alphas_cumprod[[999, 499, 0]], rtol=1e-14, atol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=1e-14, atol=0)
    again = sd.at_timestep(sd.timestep(t))
    assert torch.equal(again[0], alpha) and torch.equal(again[1], sigma)


SCHEDULES = [ContinuousVP(), VE(), EDM(), Rectified()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_continuous_schedules(schedule, dtype, close, device):
    assert isinstance(schedule, Schedule)
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    assert bool(torch.isfinite(sigma).all()) and bool((sigma.diff() >= 0).all())
    if isinstance(schedule, ContinuousVP):
        torch.testing.assert_close(alpha, torch.exp(-0.5 * (9.95 * t**2 + 0.1 * t)), rtol=1e-14, atol=0)
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=1e-14, atol=0)
    elif isinstance(schedule, EDM):
        assert abs(sigma[-1] - 80) < 1e-10 and abs(sigma[0] - 0.002) < 1e-15
        assert abs(sigma[16] - (0.5 * (0.002 ** (1 / 7) + 80 ** (1 / 7))) ** 7) < 1e-12
    elif isinstance(schedule, VE):
        assert sigma[0] == 0 and sigma[-1] == 80 and abs(sigma[16] - 1.0) < 1e-15
        assert abs(schedule.alpha_sigma(torch.tensor(80 / 81, dtype=torch.float64))[1] - 80) < 1e-10
    else:
        torch.testing.assert_close(alpha + sigma, torch.ones_like(t))
    narrow = t.to(device=device, dtype=dtype)
    for value, truth in zip(schedule.alpha_sigma(narrow), schedule.alpha_sigma(narrow.double())):
        assert value.dtype == dtype
        close(value, truth)
    back = schedule.at_timestep(schedule.timestep(t))
    torch.testing.assert_close(back[1], sigma, rtol=1e-12, atol=1e-15)


def test_item16_sigma_follows_from_drift_and_diffusion():
    # sigma = alpha sqrt(int g^2/alpha^2): the printed form without the factor alpha gives 3.413 at t=.5
    t = torch.linspace(0, 0.5, 20001, dtype=torch.float64)
    alpha, sigma = ContinuousVP().alpha_sigma(t)
    beta = 0.1 + 19.9 * t
    integral = torch.trapezoid(beta / alpha**2, t)
    assert math.isclose(float(integral.sqrt()), 3.413, abs_tol=5e-4)
    assert math.isclose(float(alpha[-1] * integral.sqrt()), float(sigma[-1]), rel_tol=1e-6)
    assert math.isclose(float(sigma[-1]), 0.9597, abs_tol=5e-5)
