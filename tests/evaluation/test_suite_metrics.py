"""Measures against closed forms."""

import pytest
import torch

from reflow.evaluation.metrics import diversity, paired_error, straightness, window_straightness
from reflow.flow import Windows


def test_paired_error_of_identical_and_shifted_samples():
    x = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(paired_error(x, x), torch.zeros(4, dtype=torch.float64))
    shift = torch.tensor([0.0, 0.25, -0.5, 2.0])
    torch.testing.assert_close(paired_error(x + shift.view(-1, 1, 1, 1), x), shift.abs().double(), rtol=0, atol=1e-6)


def test_paired_error_is_a_mean_over_dimensions():
    assert float(paired_error(torch.tensor([[3.0, 0, 0, 4.0]]), torch.zeros(1, 4))) == pytest.approx(2.5)


def test_paired_error_refuses_other_shapes():
    with pytest.raises(ValueError, match="one shape"):
        paired_error(torch.zeros(2, 3), torch.zeros(3, 3))


def line(times, start, end):
    return torch.stack([start + (end - start) * (1 - t) for t in times])


def test_a_straight_path_is_straight_whatever_its_steps():
    generator = torch.Generator().manual_seed(0)
    start, end = (torch.randn(5, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    for times in ([1.0, 0.5, 0.0], [1.0, 0.9, 0.2, 0.0]):
        path = line(times, start, end)
        assert straightness(path, times).max() < 1e-28
        assert window_straightness(path, times, Windows((1.0, times[1], 0.0))).max() < 1e-28


def test_one_kink():
    """Velocities u and w over halves of time: the chord's is (u + w)/2, so the mean squared deviation is |u - w|^2 / 4 a dimension."""
    u, w = torch.tensor([[1.0, 3.0]]).double(), torch.tensor([[2.0, -1.0]]).double()
    start = torch.zeros(1, 2).double()
    middle = start - 0.5 * u
    path = torch.stack([start, middle, middle - 0.5 * w])
    want = float((u - w).square().mean()) / 4
    assert float(straightness(path, [1.0, 0.5, 0.0])) == pytest.approx(want, rel=1e-12)
    # The kink is a window's boundary, so each window's own piece is straight.
    assert window_straightness(path, [1.0, 0.5, 0.0], Windows((1.0, 0.5, 0.0))).max() < 1e-28


def test_unequal_steps_count_by_their_length():
    """Velocities 0 and 4 over times 1 to 0.25 and 0.25 to 0: mean 1, so 0.75 * 1 + 0.25 * 9."""
    path = torch.tensor([0.0, 0.0, -1.0]).double().view(3, 1, 1)
    assert float(straightness(path, [1.0, 0.25, 0.0])) == pytest.approx(3.0)


def test_a_parabola_in_many_steps():
    """z = t^2 has velocity 2t around 1: the variance of 2t over [0, 1] is 1/3."""
    times = [1 - i / 2000 for i in range(2001)]
    path = torch.tensor([t * t for t in times]).double().view(-1, 1, 1)
    assert float(straightness(path, times)) == pytest.approx(1 / 3, rel=1e-5)
    inside = window_straightness(path, times, Windows((1.0, 0.5, 0.0)))
    assert inside.flatten().tolist() == pytest.approx([1 / 12, 1 / 12], rel=1e-5)


def test_bad_paths():
    with pytest.raises(ValueError, match="descending times"):
        straightness(torch.zeros(3, 1, 1), [0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="no point at the window boundary t = 0.3"):
        window_straightness(torch.zeros(3, 1, 1), [1.0, 0.5, 0.0], Windows((1.0, 0.3, 0.0)))


def test_diversity_is_the_mean_over_classes():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [7.0, 7.0], [7.0, 7.0], [7.0, 7.0], [9.0, 9.0]])
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    assert diversity(features, labels) == pytest.approx((5 + 0) / 2)  # the third class has one member
    order = torch.tensor([4, 1, 5, 0, 2, 3])
    assert diversity(features[order], labels[order]) == pytest.approx(2.5)
    assert diversity(2 * features, labels) == pytest.approx(5)
    with pytest.raises(ValueError, match="two members"):
        diversity(features[:2], torch.tensor([0, 1]))
