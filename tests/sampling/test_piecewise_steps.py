"""PiecewiseFlowScheduler: the numbers. Oracles: stock DDIM, PeRFlow's closed form, an exactly linear flow."""

import math

import pytest
import torch

import tiny_pipelines
from reflow.errors import UserError
from reflow.sampling import PiecewiseFlowScheduler


def rollout(scheduler, outputs, state):
    """Feed a fixed list of outputs, one a step."""
    for output, timestep in zip(outputs, scheduler.timesteps, strict=True):
        state = scheduler.step(output, timestep, state).prev_sample
    return state


def rms(x):
    return x.double().pow(2).mean().sqrt().item()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8, 10])
def test_k_steps_on_k_windows_are_trailing_ddim(device, prediction_type, steps):
    stock = tiny_pipelines.ddim(prediction_type, timestep_spacing="trailing")
    ours = PiecewiseFlowScheduler.from_config(stock.config, num_time_windows=steps)
    stock.set_timesteps(steps, device)
    ours.set_timesteps(steps, device)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    g = torch.Generator().manual_seed(steps)
    x0, noise = torch.randn(2, 4, 16, 16, generator=g).to(device), torch.randn(2, 4, 16, 16, generator=g).to(device)
    # One data point and its own noise: on that path the network's answer is exact and every state has unit size.
    abar = stock.alphas_cumprod.to(device)
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    outputs = [noise if prediction_type == "epsilon" else alpha[t] * noise - sigma[t] * x0 for t in stock.timesteps]
    start = alpha[-1] * x0 + sigma[-1] * noise
    assert rms(rollout(ours, outputs, start) - rollout(stock, outputs, start)) <= 1e-6
    # Arbitrary outputs: relative, since alpha[999] = .068 blows eps up to about 20.
    outputs = [torch.randn(start.shape, generator=g).to(device) for _ in range(steps)]
    want = rollout(stock, outputs, noise)
    assert rms(rollout(ours, outputs, noise) - want) <= 1e-6 * rms(want)


def perflow_eps_rollout(abar, windows, kind, times, outputs, z):
    """Methods 2.4 in fp64: D, lambda_t, eta_t, the window end, then Euler; times in thousandths, as published."""
    for i, (now, output) in enumerate(zip(times, outputs)):
        following = times[i + 1] if i + 1 < len(times) else 0
        t = now / 1000
        t_s, t_e = next(
            (1 - k / windows, 1 - (k + 1) / windows) for k in range(windows) if 1 - (k + 1) / windows < t - 1e-4
        )
        a_s, a_e = abar[max(round(1000 * t_s) - 1, 0)].item(), abar[max(round(1000 * t_e) - 1, 0)].item()
        lam = math.sqrt(a_e / a_s)
        if kind == "ddim_eps":
            eta = math.sqrt(1 - a_e) - math.sqrt(a_e * (1 - a_s) / a_s)
        else:
            g = math.sqrt(a_s / a_e)
            eta = -math.sqrt(1 - g * g) / g
        d = lam * (t - t_s) + (t_e - t)
        z_end = lam * (t_e - t_s) / d * z + eta * (t_e - t) / d * output
        z = z + (z_end - z) / (t_e - t) * (following - now) / 1000
    return z


@pytest.mark.parametrize("kind", ["ddim_eps", "diff_eps"])
@pytest.mark.parametrize("steps", [4, 5, 6, 8])
def test_equals_the_published_perflow_scheduler(kind, steps):
    scheduler = PiecewiseFlowScheduler.from_config(
        {"_class_name": "PeRFlowScheduler", "prediction_type": kind, "num_time_windows": 4, **tiny_pipelines.BETAS}
    )
    scheduler.set_timesteps(steps)
    grid = {
        4: [1000, 750, 500, 250],
        5: [1000, 875, 750, 500, 250],
        6: [1000, 875, 750, 625, 500, 250],
        8: [1000, 875, 750, 625, 500, 375, 250, 125],
    }[steps]
    assert scheduler.timesteps.tolist() == grid
    g = torch.Generator().manual_seed(0)
    z = torch.randn(1, 4, 8, 8, generator=g, dtype=torch.float64)
    outputs = [torch.randn(z.shape, generator=g, dtype=torch.float64) for _ in grid]
    want = perflow_eps_rollout(tiny_pipelines.ddim().alphas_cumprod.double(), 4, kind, grid, outputs, z)
    torch.testing.assert_close(rollout(scheduler, outputs, z), want, rtol=1e-10, atol=1e-10)
    single = rollout(scheduler, [o.float() for o in outputs], z.float())
    assert rms(single - want) <= 1e-6 * rms(want)


@pytest.mark.parametrize("steps", [1, 3, 7, 50])
def test_a_constant_velocity_is_followed_exactly(steps):
    scheduler = PiecewiseFlowScheduler(prediction_type="velocity", num_time_windows=1)
    scheduler.set_timesteps(steps)
    z, v = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(rollout(scheduler, [v] * steps, z), z - v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["ddim_eps", "ddim_v", "diff_eps"])
def test_more_steps_in_a_straight_window_change_nothing(kind):
    """A network that predicts the window's end consistently along the chord gives the same end for any number of
    steps."""
    results = []
    for steps in (2, 6, 11):
        scheduler = PiecewiseFlowScheduler(prediction_type=kind, num_time_windows=2)
        scheduler.set_timesteps(steps)
        g = torch.Generator().manual_seed(0)
        x0, noise = (
            torch.randn(1, 4, 8, 8, generator=g, dtype=torch.float64),
            torch.randn(1, 4, 8, 8, generator=g, dtype=torch.float64),
        )
        state = scheduler.add_noise(x0, noise, scheduler.timesteps[:1])
        for i, timestep in enumerate(scheduler.timesteps):
            torch.testing.assert_close(
                state, scheduler.add_noise(x0, noise, scheduler.timesteps[i : i + 1]), rtol=0, atol=1e-10
            )
            t, window = scheduler._times[i], scheduler._windows_of_steps[i : i + 1]
            alpha, sigma = scheduler._table.alpha_sigma(window, torch.tensor([t], dtype=torch.float64))
            r = torch.sqrt(alpha**2 + sigma**2)
            at = scheduler._table.rows(window)
            output = {"ddim_eps": noise, "diff_eps": noise / (at.eps_rate / at.cross_rate), "ddim_v": (alpha * noise - sigma * x0) / r}[
                kind
            ]
            state = scheduler.step(output, timestep, state).prev_sample
        results.append(state)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "windows,steps,counts",
    [(4, 4, [1, 1, 1, 1]), (4, 6, [2, 2, 1, 1]), (4, 5, [2, 1, 1, 1]), (3, 8, [3, 3, 2]), (1, 3, [3])],
)
def test_spare_steps_go_to_the_noisiest_windows(windows, steps, counts):
    scheduler = PiecewiseFlowScheduler(num_time_windows=windows)
    scheduler.set_timesteps(steps)
    assert torch.bincount(scheduler._windows_of_steps).tolist() == counts
    assert len(set(scheduler.timesteps.tolist())) == steps
    assert scheduler.timesteps.tolist() == sorted(scheduler.timesteps.tolist(), reverse=True)
    assert scheduler.timesteps[0] == 999


def test_network_time():
    index, perflow = PiecewiseFlowScheduler(), PiecewiseFlowScheduler(network_time="perflow")
    index.set_timesteps(8)
    perflow.set_timesteps(8)
    assert index.timesteps.dtype == torch.int64 and perflow.timesteps.dtype == torch.float32
    assert index.timesteps.tolist() == [999, 874, 749, 624, 499, 374, 249, 124]
    assert perflow.timesteps.tolist() == [1000, 875, 750, 625, 500, 375, 250, 125]


def test_windows_that_are_not_uniform(tmp_path):
    scheduler = PiecewiseFlowScheduler(window_boundaries=[1.0, 0.75, 0.5, 0.0], prediction_type="ddim_v")
    assert scheduler.config.num_time_windows == 3
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == [999, 749, 499]
    scheduler.save_pretrained(tmp_path)
    again = PiecewiseFlowScheduler.from_pretrained(tmp_path)
    again.set_timesteps(4)
    assert again.timesteps.tolist() == [999, 874, 749, 499] and again.windows == scheduler.windows
    assert PiecewiseFlowScheduler.from_config(scheduler.config, num_time_windows=2).windows.boundaries == (
        1.0,
        0.5,
        0.0,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_arithmetic_is_fp32_and_the_sample_keeps_its_dtype(dtype):
    scheduler = PiecewiseFlowScheduler(num_time_windows=1)
    scheduler.set_timesteps(1)
    g = torch.Generator().manual_seed(0)
    z, output = torch.randn(1, 4, 8, 8, generator=g).to(dtype), torch.randn(1, 4, 8, 8, generator=g).to(dtype)
    got = scheduler.step(output, scheduler.timesteps[0], z).prev_sample
    want = scheduler.step(output.double(), scheduler.timesteps[0], z.double()).prev_sample
    assert got.dtype == dtype
    # One rounding at the end; the step's two terms are 15 times larger than a half-precision sum could hold.
    assert ((got.double() - want).abs() <= 0.5 * torch.finfo(dtype).eps * want.abs() + 1e-5).all()
    # A half-precision output on an fp32 sample, as under autocast.
    assert scheduler.step(output, scheduler.timesteps[0], z.float()).prev_sample.dtype == torch.float32


def test_add_noise_follows_the_chord_inside_a_window():
    scheduler = PiecewiseFlowScheduler(num_time_windows=4)
    scheduler.set_timesteps(8)
    x0, noise = torch.zeros(2, 4, 2, 2), torch.ones(2, 4, 2, 2)
    sigma = (1 - scheduler.alphas_cumprod).sqrt()
    timesteps = torch.tensor([749, 124])  # the start of a window, and the middle of the last one (t = .125)
    noisy = scheduler.add_noise(x0, noise, timesteps)
    torch.testing.assert_close(noisy[0, 0, 0, 0], sigma[749], rtol=1e-6, atol=0)
    torch.testing.assert_close(noisy[1, 0, 0, 0], (sigma[249] + sigma[0]) / 2, rtol=1e-6, atol=0)
    # methods 2.6: at t = .125 the chord has (.911, .299), the schedule (.929, .370).
    assert abs(noisy[1, 0, 0, 0].item() - 0.299) < 1e-3
    assert abs(scheduler.add_noise(noise, x0, timesteps)[1, 0, 0, 0].item() - 0.911) < 1e-3
    one = scheduler.add_noise(
        x0.half(), noise.half(), torch.tensor([124])
    )  # one value for the batch, as inpainting passes it
    assert one.dtype == torch.float16 and one.shape == x0.shape


def test_a_step_is_found_by_its_timestep_however_it_is_passed():
    scheduler = PiecewiseFlowScheduler()
    scheduler.set_timesteps(8)
    for i, timestep in enumerate(scheduler.timesteps):
        assert scheduler.index_for_timestep(timestep) == i  # an element of the table
        assert scheduler.index_for_timestep(timestep.clone()) == i
        assert scheduler.index_for_timestep(int(timestep)) == i
    assert [scheduler.index_for_timestep(t) for t in scheduler.timesteps[5:]] == [5, 6, 7]
    z = torch.randn(1, 4, 4, 4)
    late = scheduler.step(z, scheduler.timesteps[6], z).prev_sample
    scheduler.step(z, scheduler.timesteps[0], z)
    assert torch.equal(scheduler.step(z, int(scheduler.timesteps[6]), z, return_dict=False)[0], late)
    assert scheduler.step_index == 7


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda s: s.set_timesteps(3), ["num_inference_steps=3", "4 windows", "num_inference_steps=4 or more"]),
        (lambda s: s.set_timesteps(3000), ["fewer steps"]),
        (lambda s: s.step(torch.zeros(1), 999, torch.zeros(1)), ["set_timesteps"]),
        (lambda s: (s.set_timesteps(4), s.step(torch.zeros(1), 998, torch.zeros(1))), ["998", "[999, 749, 499, 249]"]),
        (lambda s: (s.set_timesteps(4), s.step(torch.zeros(1), s.timesteps, torch.zeros(1))), ["one timestep"]),
        (lambda s: (s.set_timesteps(4), s.set_begin_index(4)), ["strength of at least 0.25"]),
        (
            lambda s: (s.set_timesteps(4), s.add_noise(torch.zeros(1), torch.zeros(1), s.timesteps[4:])),
            ["strength of at least 0.25"],
        ),
        (lambda s: PiecewiseFlowScheduler(prediction_type="sample"), ["sample", "ddim_eps"]),
        (lambda s: PiecewiseFlowScheduler(network_time="seconds"), ["seconds", "perflow"]),
        (lambda s: PiecewiseFlowScheduler(num_time_windows=0), ["0 windows"]),
        (lambda s: PiecewiseFlowScheduler(window_boundaries=[0.0, 1.0]), ["descend"]),
        (lambda s: PiecewiseFlowScheduler(rescale_betas_zero_snr=True), ["ddim_v", "zero terminal SNR"]),
    ],
)
def test_mistakes_are_sentences(call, words):
    with pytest.raises(UserError) as error:
        call(PiecewiseFlowScheduler())
    assert isinstance(error.value, ValueError)
    for word in words:
        assert word in str(error.value)


def test_zero_terminal_snr_works_for_v():
    scheduler = PiecewiseFlowScheduler(prediction_type="ddim_v", rescale_betas_zero_snr=True, num_time_windows=2)
    scheduler.set_timesteps(2)
    out = rollout(scheduler, [torch.randn(1, 4, 4, 4)] * 2, torch.randn(1, 4, 4, 4))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta_schedule": "linear", "num_train_timesteps": 500},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.01, 0.02, 0.05, 0.1, 0.2, 0.3], "num_train_timesteps": 6},
    ],
    ids=["scaled_linear", "linear", "cosine", "trained"],
)
def test_betas_and_alphas_are_those_of_ddim(changes, zero_snr):
    stock = tiny_pipelines.ddim("v_prediction", rescale_betas_zero_snr=zero_snr, **changes)
    ours = PiecewiseFlowScheduler.from_config(stock.config, num_time_windows=2)
    for name in ("betas", "alphas", "alphas_cumprod"):
        got, want = getattr(ours, name), getattr(stock, name)
        assert got.dtype == torch.float32 and got.shape == (stock.config.num_train_timesteps,)
        assert torch.equal(got, want), name
    assert (float(ours.alphas_cumprod[-1]) == 0.0) == zero_snr
