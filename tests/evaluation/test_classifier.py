"""The judge: its committed weights read scans it never saw, and training it again gives a judge as good."""

import pytest
import torch

from reflow.data import digits
from reflow.errors import UserError
from reflow.evaluation.classifier import FEATURES, accuracy, load_classifier, train_classifier


def test_committed_weights_read_held_out_scans(device):
    images, labels = digits.images()
    held_out = digits.split()[1]
    classifier = load_classifier(device)
    assert accuracy(classifier, images[held_out].to(device), labels[held_out]) >= 0.98
    features = classifier.features(images[:5].to(device))
    assert features.shape == (5, FEATURES)
    torch.testing.assert_close(classifier.head(features), classifier(images[:5].to(device)))


def test_training_is_a_function_of_the_seed():
    (first, a), (second, b) = (train_classifier(seed=3, epochs=2) for _ in range(2))
    # To rounding: the same sums over memory at another address may take another order on some processors.
    assert a == pytest.approx(b, abs=0.01)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-3)
    other, _ = train_classifier(seed=4, epochs=2)
    assert (next(first.parameters()) - next(other.parameters())).abs().max() > 0.05


@pytest.mark.slow
def test_training_gives_a_judge_as_good():
    assert train_classifier(seed=1)[1] >= 0.98


def test_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"\[B,1,16,16\]"):
        load_classifier()(torch.zeros(2, 3, 16, 16))


def test_missing_and_damaged_weights(tmp_path):
    with pytest.raises(UserError, match="is missing at"):
        load_classifier(path=tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678")
    with pytest.raises(UserError, match="cannot be read"):
        load_classifier(path=tmp_path / "bad.safetensors")
