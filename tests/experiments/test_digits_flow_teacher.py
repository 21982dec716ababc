"""The script that trains the digits flow model: its loss, its times, its checkpoints, and that every part is in place."""

import json
import sys

import pytest
import torch

from reflow.data import digits as data
from reflow.experiments import digits_flow_quality, digits_flow_teacher, digits_training
from reflow.models import digits_flow


@pytest.fixture
def settings():
    return dict(batch=16, rate=2e-3, drop=0.1, ema_decay=0.9, seed=1)


def latents(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 0.1 * torch.randn(count, 4, 8, 8, generator=generator) + 0.5, torch.arange(count) % 10


def test_a_few_steps_lower_the_loss(settings):
    parts = digits_flow.new_parts(1)
    before = [p.clone() for p in parts["text_encoder"].parameters()]
    done = digits_flow_teacher.train_teacher(parts, *latents(32), steps=21, **settings)
    # The curve is a running mean: of its first twenty-one steps the first still weighs two thirds.
    assert done.curve[1] < 0.96 * done.curve[0]
    assert any((a != b).any() for a, b in zip(before, parts["text_encoder"].parameters(), strict=True))
    assert {type(p).__name__ for p in parts["transformer"].attn_processors.values()} == {"JointAttnProcessor2_0"}


def test_a_training_goes_on_from_its_state(tmp_path, settings):
    states = [None, tmp_path / "training.pt"]
    ends = []
    for state in states:
        parts = digits_flow.new_parts(1)
        if state is not None:
            stopped = digits_flow.new_parts(1)
            digits_flow_teacher.train_teacher(
                stopped, *latents(32), steps=4, checkpoint_every=2, on_checkpoint=lambda step, ema: None, state=state, **settings
            )
            # What it wrote stands at two steps of the four.
        digits_flow_teacher.train_teacher(parts, *latents(32), steps=4, state=state, **settings)
        ends.append(torch.cat([p.flatten() for p in parts["transformer"].parameters()]))
    torch.testing.assert_close(ends[1], ends[0], atol=1e-6, rtol=1e-6)


def test_times_cover_both_ends_and_are_shifted():
    generator = torch.Generator().manual_seed(0)
    times = torch.stack([digits_flow_teacher.draw_times(64, 2.0, generator) for _ in range(200)])
    assert times.min() > 0 and times.max() < 1
    # The median of both laws is 1/2, which a shift of 2 moves to 2/3.
    assert times.median().item() == pytest.approx(2 / 3, abs=0.01)
    assert (times < 0.02).float().mean() > 0.003 and (times > 0.98).float().mean() > 0.015


def test_the_prior_of_the_latents_may_stand_elsewhere():
    """Of a VAE without 1x1 convolutions the mean is measured as `shift_factor`, and its function stays."""
    images = data.images()[0][:64]
    moved, still = (digits_flow.new_parts(3)["vae"] for _ in range(2))
    digits_training.train_vae(moved, images, steps=0, batch=8, rate=0.0, kl_weight=0.0, seed=0, prior_mean=0.5)
    digits_training.train_vae(still, images, steps=0, batch=8, rate=0.0, kl_weight=0.0, seed=0)
    assert moved.config.shift_factor - still.config.shift_factor == pytest.approx(0.5, abs=2e-5)
    assert moved.config.scaling_factor == pytest.approx(still.config.scaling_factor, abs=2e-5)
    z = digits_flow_teacher.standardised(moved, images)
    assert abs(z.mean().item()) < 1e-4 and z.std().item() == pytest.approx(1, abs=1e-4)


def test_divergence_from_a_prior_elsewhere():
    """One training step from equal weights: the latents' mean goes towards the prior's."""
    images = data.images()[0][:64]
    means = []
    for steps in (0, 12):
        vae = digits_flow.new_parts(3)["vae"]
        with torch.no_grad():
            vae.encoder.conv_out.bias[:4] -= 0.5  # where train_vae starts it, undone
        digits_training.train_vae(vae, images, steps=steps, batch=16, rate=2e-3, kl_weight=100.0, seed=0, prior_mean=0.5)
        means.append(digits_training.encode(vae, images).mean().item())
    assert abs(means[1] - 0.5) < abs(means[0] - 0.5)


@pytest.mark.slow
def test_script_writes_a_folder_that_loads(tmp_path, monkeypatch, capsys):
    out = tmp_path / "flow"
    words = ["--out", str(out), "--vae-steps", "2", "--steps", "4", "--batch", "8", "--samples", "20", "--checkpoint-every", "2"]
    monkeypatch.setattr(sys, "argv", ["digits_flow_teacher", *words])
    for _ in range(2):  # the second time from the state that the first one left
        digits_flow_teacher.main()
        report = json.loads((out / "training.json").read_text())
        assert report["evaluation"]["samples"] == 20 and set(report["evaluation"]["paired_error"]) == {"8", "4", "2"}
        assert json.loads(capsys.readouterr().out)["samples"] == 20
    for folder in (out, tmp_path / "flow-2"):
        parts = digits_flow_quality.load(folder)
        assert abs(digits_flow_teacher.standardised(parts["vae"], data.images()[0]).std().item() - 1) < 0.02
