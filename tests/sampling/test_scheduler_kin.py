"""What diffusers asks of every scheduler in its common tests, asked of ours: configs go round, kin read each other's, outputs keep their form."""

import inspect

import pytest
import torch

from reflow.sampling import PiecewiseFlowScheduler

CONFIG = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
SAMPLE = torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)


def stepped(scheduler, count=8, place=3):
    scheduler.set_timesteps(count)
    return scheduler.step(0.1 * SAMPLE, scheduler.timesteps[place], SAMPLE).prev_sample


@pytest.mark.parametrize("prediction_type", ["ddim_eps", "ddim_v", "diff_eps", "velocity"])
def test_a_saved_config_steps_the_same(tmp_path, prediction_type):
    one = PiecewiseFlowScheduler(**CONFIG, prediction_type=prediction_type)
    one.save_pretrained(tmp_path)
    again = PiecewiseFlowScheduler.from_pretrained(tmp_path)
    assert {key: value for key, value in one.config.items() if key != "_use_default_values"} == dict(again.config)
    torch.testing.assert_close(stepped(one), stepped(again), rtol=0, atol=0)


def test_steps_keep_the_shape_in_both_forms():
    scheduler = PiecewiseFlowScheduler(**CONFIG)
    for place in (0, 5, 7):
        named = stepped(scheduler, place=place)
        scheduler.set_timesteps(8)
        plain = scheduler.step(0.1 * SAMPLE, scheduler.timesteps[place], SAMPLE, return_dict=False)
        assert isinstance(plain, tuple) and named.shape == SAMPLE.shape and torch.equal(plain[0], named)


def test_its_kin_read_its_config_and_it_reads_theirs():
    ours = PiecewiseFlowScheduler(**CONFIG)
    for kin in ours.compatibles:
        try:
            theirs = kin.from_config(ours.config)
        except ImportError:  # one of them needs a package that few have
            continue
        back = PiecewiseFlowScheduler.from_config(theirs.config)
        shared = {key: value for key, value in back.config.items() if key in ours.config}
        assert shared == dict(ours.config), kin.__name__
    assert len(ours.compatibles) > 5


def test_the_public_names_of_a_scheduler():
    scheduler = PiecewiseFlowScheduler(**CONFIG)
    assert scheduler.init_noise_sigma is not None and isinstance(scheduler.order, int)
    assert torch.equal(scheduler.scale_model_input(SAMPLE, 3), SAMPLE)
    assert {"model_output", "timestep", "sample", "return_dict"} <= set(inspect.signature(scheduler.step).parameters)
    assert len(scheduler.timesteps) == 1000 and len(scheduler.betas) == len(scheduler.alphas) == 1000
    with pytest.raises(AttributeError, match="no_such_name"):
        scheduler.no_such_name  # noqa: B018
    scheduler.set_timesteps(8)
    noisy = scheduler.add_noise(SAMPLE, torch.ones_like(SAMPLE), scheduler.timesteps[2:4])
    assert noisy.shape == SAMPLE.shape and noisy.device == SAMPLE.device


def test_betas_of_a_users_own_go_round(tmp_path):
    betas = torch.linspace(0.01, 0.3, 12).tolist()
    scheduler = PiecewiseFlowScheduler(num_train_timesteps=12, trained_betas=betas)
    scheduler.save_pretrained(tmp_path)
    again = PiecewiseFlowScheduler.from_pretrained(tmp_path)
    assert scheduler.betas.tolist() == again.betas.tolist() == pytest.approx(betas)
    # A table too short for its windows cannot be sampled with, and says so when it is made.
    with pytest.raises(ValueError, match="same noise level at both ends"):
        PiecewiseFlowScheduler(trained_betas=[0.1, 0.3])
