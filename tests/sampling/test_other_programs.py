"""The sampler settings that reflow/sampling/README.md names for ComfyUI and AUTOMATIC1111, from their formulas.

Both count noise as s = sqrt((1 - abar) / abar) on the base's 1000 indices and step z / sqrt(abar) by Euler in s, from
s[0] to a last 0. What differs between their schedules is which s are taken; each is written here as indices. Derived:
the programs themselves are not run.
"""

import pathlib
import re

import pytest
import torch

import tiny_pipelines
from reflow.sampling import PiecewiseFlowScheduler

PAGE = pathlib.Path(__file__).resolve().parents[2] / "reflow" / "sampling" / "README.md"
LAST = 999


def table(**changes):
    """s at every index, [1000], growing with noise, fp64."""
    abar = tiny_pipelines.ddim(**changes).alphas_cumprod.double()
    return ((1 - abar) / abar).sqrt()


# The indices, noisiest first, at which each program's schedule of K steps takes s; fractions lie between two indices.
SCHEDULES = {
    "simple": lambda k: [float(LAST - int(i * 1000 / k)) for i in range(k)],
    "sgm_uniform": lambda k: [LAST - i * LAST / k for i in range(k)],
    "normal": lambda k: [LAST - i * LAST / (k - 1) for i in range(k)],
    "ddim_uniform": lambda k: [float(i) for i in range(1, 1000, 1000 // k)][::-1],
}


def levels(name, k, s):
    """s of every step and of the end, [K+1], with log s linear between indices."""
    at = torch.tensor(SCHEDULES[name](k), dtype=torch.float64)
    low, high = at.floor().long(), at.ceil().long()
    return torch.cat([torch.lerp(s.log()[low], s.log()[high], at - low).exp(), torch.zeros(1, dtype=torch.float64)])


def karras(k, s, rho=7.0):
    ramp = torch.linspace(0, 1, k, dtype=torch.float64)
    hot, cold = s[-1] ** (1 / rho), s[0] ** (1 / rho)
    return torch.cat([(hot + ramp * (cold - hot)) ** rho, torch.zeros(1, dtype=torch.float64)])


def nearest(level, s):
    """The index that the network is called with at this noise level: the nearest in log s."""
    return int((s.log() - level.log()).abs().argmin())


def network(prediction_type, index):
    """A deterministic stand-in for the UNet that depends on its input and on the index it is called with."""
    w = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 2
    return lambda z: torch.einsum("oc,bchw->bohw", w, torch.tanh(z)) * (1 + index / 2000)


def by_euler_in_s(where, s, noise, prediction_type="epsilon"):
    """Euler as both programs take it; result: latents at the end, which have no noise left. Pure noise starts at
    sqrt(1 + s^2) times itself."""
    x = noise * (1 + where[0] ** 2).sqrt()
    for now, then in zip(where, where[1:]):
        z = x / (1 + now**2).sqrt()
        output = network(prediction_type, nearest(now, s))(z)
        if prediction_type == "epsilon":
            denoised = x - now * output
        else:
            denoised = x / (1 + now**2) - output * now / (1 + now**2).sqrt()
        x = x + (x - denoised) / now * (then - now)
    return x


def by_ours(k, noise, prediction_type="epsilon", **changes):
    """(our end, at index 0; the clean latents and the noise that our last step predicts)."""
    base = tiny_pipelines.ddim(prediction_type, **changes)
    scheduler = PiecewiseFlowScheduler.from_config(base.config, num_time_windows=k)
    scheduler.set_timesteps(k)
    z = noise
    for timestep in scheduler.timesteps:
        output, before = network(prediction_type, int(timestep))(z), z
        z = scheduler.step(output, timestep, z).prev_sample
    alpha = base.alphas_cumprod[timestep].double().sqrt()
    sigma = (1 - alpha**2).sqrt()
    clean = (before - sigma * output) / alpha if prediction_type == "epsilon" else alpha * before - sigma * output
    return z, clean, (before - alpha * clean) / sigma


def off(a, b):
    return float((a - b).pow(2).mean().sqrt() / b.pow(2).mean().sqrt())


def noise():
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("k", [1, 2, 4, 5, 8, 10])
def test_euler_with_the_simple_schedule_is_the_student(prediction_type, k):
    s = table(prediction_type=prediction_type)
    where = levels("simple", k, s)
    scheduler = PiecewiseFlowScheduler(num_time_windows=k)
    scheduler.set_timesteps(k)
    assert [nearest(level, s) for level in where[:-1]] == scheduler.timesteps.tolist()
    ours, clean, noisy = by_ours(k, noise(), prediction_type)
    theirs = by_euler_in_s(where, s, noise(), prediction_type)
    # They go on to no noise at all, where our last step stops at index 0 (s = .0292).
    assert off(theirs, clean) < 1e-6
    assert off(ours, (clean + s[0] * noisy) / (1 + s[0] ** 2).sqrt()) < 1e-6


def test_the_other_schedules_miss():
    s, k = table(), 4
    called = {name: [nearest(level, s) for level in levels(name, k, s)[:-1]] for name in SCHEDULES}
    assert called["simple"] == [999, 749, 499, 249]
    assert called["sgm_uniform"] in ([999, 749, 499, 250], [999, 749, 500, 250])
    assert called["normal"] == [999, 666, 333, 0]
    assert called["ddim_uniform"] == [751, 501, 251, 1]
    assert [nearest(level, s) for level in karras(k, s)[:-1]][1:3] != [749, 499]
    _, clean, _ = by_ours(k, noise())
    miss = {name: off(by_euler_in_s(levels(name, k, s), s, noise()), clean) for name in SCHEDULES}
    miss["karras"] = off(by_euler_in_s(karras(k, s), s, noise()), clean)
    assert miss["simple"] < 1e-6 < miss["sgm_uniform"] < 1e-3
    assert all(miss[name] > 0.01 for name in ("normal", "ddim_uniform", "karras"))


def test_where_windows_do_not_divide_1000_the_simple_schedule_is_one_index_off():
    s = table()
    ours = PiecewiseFlowScheduler(num_time_windows=3)
    ours.set_timesteps(3)
    assert ours.timesteps.tolist() == [999, 666, 332]
    assert [nearest(level, s) for level in levels("simple", 3, s)[:-1]] == [999, 666, 333]


def test_image_to_image_by_denoise_is_our_strength():
    """ComfyUI makes a schedule of int(steps / denoise) steps and runs the last ones."""
    s = table()
    for windows, steps, denoise in [(4, 2, 0.5), (4, 3, 0.75), (4, 1, 0.25), (8, 4, 0.5), (2, 1, 0.5)]:
        where = levels("simple", int(steps / denoise), s)[-(steps + 1) :]
        ours = PiecewiseFlowScheduler(num_time_windows=windows)
        ours.set_timesteps(windows)
        assert [nearest(level, s) for level in where[:-1]] == ours.timesteps[-steps:].tolist()


def test_the_numbers_on_the_page():
    text, s = PAGE.read_text(), table()
    simple = ", ".join(f"{level:.4f}" for level in levels("simple", 4, s)[:-1])
    assert simple in text and f"{float(s[0]):.4f}" in text
    ratio = float(s[-1] / (1 + s[-1] ** 2).sqrt())
    assert f"{100 * (1 - ratio):.2f} %" in text  # the start without AUTOMATIC1111's SGM noise multiplier
    for name in ("sgm_uniform", "normal", "ddim_uniform"):
        called = [nearest(level, s) for level in levels(name, 4, s)[:-1]]
        row = re.search(rf"^\| `{name}` \|(.*)$", text, re.M)
        assert row, name
        for index in called:
            assert re.search(rf"\b{index}\b", row[1]), (name, called)
