"""The Fréchet distance against its closed form, scipy and torchmetrics."""

import pytest
import torch

from reflow.errors import UserError
from reflow.evaluation.measures.frechet import distance_of_moments, equal_sized, frechet_distance, moments


def features(count, width, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix * scale + shift


def test_gaussians_with_commuting_covariances():
    """Diagonal covariances: the sum over axes of (mean difference)^2 + (standard deviation difference)^2."""
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 0.0]).double()
    mean = torch.tensor([0.0, 1.0, 2.0]).double()
    got = distance_of_moments(mean, torch.diag(a), mean + 1, torch.diag(b))
    assert got == pytest.approx(3 + 1 + 0 + 9, abs=1e-12)


def test_against_scipy():
    import numpy as np
    from scipy.linalg import sqrtm

    a, b = features(300, 12, 0), features(400, 12, 1, scale=1.3, shift=0.4)
    (mean_a, cov_a), (mean_b, cov_b) = moments(a), moments(b)
    root = sqrtm((cov_a @ cov_b).numpy())
    want = (mean_a - mean_b).square().sum().item() + np.trace(cov_a.numpy() + cov_b.numpy() - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-8)


def test_against_torchmetrics():
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import _compute_fid

    a, b = features(300, 12, 2), features(300, 12, 3)
    (mean_a, cov_a), (mean_b, cov_b) = moments(a), moments(b)
    assert frechet_distance(a, b) == pytest.approx(_compute_fid(mean_a, cov_a, mean_b, cov_b).item(), rel=1e-8)


def test_same_set_gives_zero_and_order_does_not_matter():
    a, b = features(200, 8, 4), features(200, 8, 5)
    assert abs(frechet_distance(a, a)) < 1e-9
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_constant_features_do_not_break_it():
    a = torch.cat([features(50, 3, 6), torch.zeros(50, 2)], 1)
    assert frechet_distance(a, a + 1) == pytest.approx(5, abs=1e-8)


def test_equal_sized_sets():
    a, b = equal_sized(torch.arange(10.0)[:, None], torch.arange(4.0)[:, None], seed=1)
    assert len(a) == len(b) == 4 and sorted(b[:, 0].tolist()) == [0, 1, 2, 3]
    assert len(set(a[:, 0].tolist())) == 4
    again, _ = equal_sized(torch.arange(10.0)[:, None], torch.arange(4.0)[:, None], seed=1)
    assert torch.equal(a, again)


def test_bad_shapes():
    with pytest.raises(ValueError, match="differ in width"):
        frechet_distance(torch.zeros(4, 2), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="N of 2 or more"):
        frechet_distance(torch.zeros(1, 2), torch.zeros(1, 2))


def test_features_that_are_not_finite_are_a_sentence():
    bad = torch.zeros(4, 2)
    bad[2, 1] = torch.nan
    for pair in ((bad, torch.zeros(4, 2)), (torch.zeros(4, 2), bad)):
        with pytest.raises(UserError, match="1 of 4 images are not finite, the first is number 2"):
            frechet_distance(*pair)
