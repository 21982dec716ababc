"""The scans, their captions and their split."""

import pytest
import torch

from reflow.data import digits


def test_scans_keep_their_range_and_their_8x8_content():
    from sklearn.datasets import load_digits

    images, labels = digits.images()
    assert images.shape == (1797, 1, 16, 16) and images.dtype == torch.float32
    assert images.min() == -1 and images.max() == 1
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    small = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    # Averaging 2x2 pixels gives the scan back, but for the smoothing of the interpolation.
    assert (torch.nn.functional.avg_pool2d(images, 2) - small).square().mean() < 0.02


def test_a_caller_cannot_spoil_the_scans():
    digits.images()[0].zero_()
    assert digits.images()[0].abs().sum() > 0


def test_captions():
    assert digits.caption(7) == "a handwritten seven" == digits.captions(7)[0]
    everything = [sentence for label in range(10) for sentence in digits.captions(label)]
    assert len(set(everything)) == 10 * len(digits.TEMPLATES)
    assert digits.prompts(torch.tensor([0, 9])) == ["a handwritten zero", "a handwritten nine"]
    with pytest.raises(ValueError, match="0 to 9"):
        digits.caption(10)


def test_split_is_stratified_disjoint_and_fixed():
    train, held_out = digits.split()
    assert sorted(torch.cat([train, held_out]).tolist()) == list(range(1797))
    labels = digits.images()[1]
    assert all(34 <= count <= 37 for count in torch.bincount(labels[held_out]).tolist())
    assert all(torch.equal(a, b) for a, b in zip((train, held_out), digits.split(), strict=True))
    assert not torch.equal(held_out, digits.split(seed=1)[1])
