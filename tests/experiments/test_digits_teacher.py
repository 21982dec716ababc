"""The script that trains the digits model from scratch, at a size that only shows that every part is in place."""

import json
import sys

import pytest
import torch

from reflow.data import digits as data
from reflow.experiments import digits_quality, digits_teacher, digits_training
from reflow.models import digits, family


@pytest.mark.slow
def test_script_writes_a_folder_that_loads(tmp_path, monkeypatch, capsys):
    out = tmp_path / "teacher"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "digits_teacher",
            "--out",
            str(out),
            "--vae-steps",
            "2",
            "--unet-steps",
            "4",
            "--batch",
            "8",
            "--samples",
            "20",
            "--checkpoint-every",
            "2",
        ],
    )
    digits_teacher.main()
    report = json.loads((out / "training.json").read_text())
    assert report["evaluation"]["samples"] == 20 and set(report["evaluation"]["accuracy"]) == {"32", "8", "4", "2"}
    assert json.loads(capsys.readouterr().out)["samples"] == 20
    for folder in (out, tmp_path / "teacher-2"):
        base = family("digits").load(folder)
        assert abs(base.encode_images(data.images()[0]).std().item() - 1) < 0.02
    assert {path.name for path in (out / "tokenizer").iterdir()} >= {"vocab.json", "merges.txt", "tokenizer.json"}


def test_vae_centring_leaves_its_function_alone():
    """Latents are moved to mean zero inside the two 1x1 convolutions; what the VAE reconstructs stays."""
    images = data.images()[0][:64]
    (moved, still) = (digits.build(3)["vae"] for _ in range(2))
    digits_training.train_vae(moved, images, steps=0, batch=8, rate=0.0, kl_weight=0.0, seed=0)
    with torch.no_grad():
        before = still.decode(still.encode(images).latent_dist.mode()).sample
        latents = moved.encode(images).latent_dist.mode()
        torch.testing.assert_close(moved.decode(latents).sample, before, atol=1e-5, rtol=1e-5)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-5
    assert (latents.std() * moved.config.scaling_factor).item() == pytest.approx(1, abs=1e-3)


def test_loss_weights_are_those_of_v_prediction_up_to_the_cap():
    alphas = digits.build()["scheduler"].alphas_cumprod
    weights = digits_teacher.loss_weights(alphas, 1e9)
    torch.testing.assert_close(weights[500] / weights[10], alphas[10] / alphas[500])
    capped = digits_teacher.loss_weights(alphas, 5.0)
    assert capped.max() / capped[0] == pytest.approx(5 * alphas[0].item(), rel=1e-5)
    assert capped.mean().item() == pytest.approx(1, rel=1e-6)


def test_rate_warms_up_and_ends_at_zero():
    rates = [digits_training.cosine_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == 1 and rates[99] < 1e-3


def test_nearest_scan():
    scans = torch.zeros(3, 1, 16, 16)
    scans[1], scans[2] = 1, 3
    assert digits_quality.nearest(scans + 0.25, scans).tolist() == pytest.approx([0.25] * 3)
    assert digits_quality.nearest(scans, scans, exclude_self=True).tolist() == pytest.approx([1, 1, 2])
