"""The data with known answers against sums over their components and against draws, so that tests may lean on them."""

import math

import pytest
import torch

from reflow.flow.exact import GaussianData, MixtureData

MEANS = torch.tensor([[-2.0, 0.5], [1.0, 1.5], [0.0, -3.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
STD = 0.4


@pytest.mark.parametrize("by_sample", [False, True])
def test_a_mixtures_posterior_is_the_weighted_sum_over_its_parts(by_sample):
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, sigma = (torch.tensor([0.9, 0.5, 0.1, 0.7, 1.0]), torch.tensor([0.3, 0.8, 1.0, 0.6, 0.05])) if by_sample else (0.6, 0.7)
    alphas, sigmas = (value.double() if by_sample else torch.full((5,), value, dtype=torch.float64) for value in (alpha, sigma))
    x0, eps = MixtureData(MEANS, STD, WEIGHTS).x0_eps(z, alphas if by_sample else alpha, sigmas if by_sample else sigma)
    for row in range(5):
        a, s = float(alphas[row]), float(sigmas[row])
        var = (a * STD) ** 2 + s**2
        share = [float(w) * math.exp(-float((z[row] - a * mean).square().sum()) / (2 * var)) for w, mean in zip(WEIGHTS, MEANS)]
        parts = [mean + a * STD**2 * (z[row] - a * mean) / var for mean in MEANS]
        want = sum(part * weight for part, weight in zip(parts, share)) / sum(share)
        torch.testing.assert_close(x0[row], want, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(eps[row], (z[row] - a * want) / s, rtol=1e-9, atol=1e-10)


def test_draws_have_the_moments_that_are_said():
    generator = torch.Generator().manual_seed(1)
    drawn = MixtureData(MEANS, STD, WEIGHTS).sample(40_000, generator)
    mean = WEIGHTS @ MEANS
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(drawn.var(0), STD**2 + WEIGHTS @ (MEANS - mean).square(), rtol=0.03, atol=0)
    one = GaussianData(torch.tensor([1.0, -2.0]), torch.tensor([[0.5], [3.0]])).sample(40_000, generator)
    assert one.shape == (40_000, 2, 2)
    torch.testing.assert_close(one.mean(0), torch.tensor([[1.0, -2.0], [1.0, -2.0]]), rtol=0, atol=0.06)
    torch.testing.assert_close(one.std(0), torch.tensor([[0.5, 0.5], [3.0, 3.0]]), rtol=0.03, atol=0)


def test_images_of_several_times_are_those_of_each_time_alone():
    """Rows of images [B,C,h,w] with an alpha and sigma each."""
    data = MixtureData(torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 0.3, torch.tensor([0.2, 0.3, 0.5]))
    z = torch.randn(5, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sigmas = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    together = data.x0_eps(z, 1 - sigmas, sigmas)
    alone = [data.x0_eps(z[i:i + 1], 1 - float(s), float(s)) for i, s in enumerate(sigmas)]
    for a, b in zip(together, map(torch.cat, zip(*alone))):
        torch.testing.assert_close(a, b)
