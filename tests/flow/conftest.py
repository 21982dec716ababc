"""The SD schedule and the precision every oracle is held to: 1e-12 relative in fp64, 1e-5 in fp32.

Oracles are numbered: test_item7_... is oracle 7, and so on.
"""

import pytest
import torch

from reflow.flow import DiscreteVP

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@pytest.fixture(scope="session")
def sd_config():
    return dict(SD)


@pytest.fixture(scope="session")
def sd():
    return DiscreteVP.from_config(SD)


@pytest.fixture(scope="session")
def zero_snr():
    return DiscreteVP.from_config({**SD, "rescale_betas_zero_snr": True})


@pytest.fixture(params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def dtype(request):
    return request.param


@pytest.fixture
def close(dtype):
    """close(a, b): the relative difference of a to the fp64 truth b, in the norm, is inside this dtype's bound."""

    def check(value, truth):
        value, truth = torch.as_tensor(value).double().cpu(), torch.as_tensor(truth).double().cpu()
        bound = 1e-12 if dtype is torch.float64 else 1e-5
        error = float((value - truth).norm() / truth.norm())
        assert error < bound, f"relative error {error:.2e}, bound {bound:.0e}"

    return check


@pytest.fixture
def random(dtype, device):
    """random(*shape, seed=0): the same normal draws in every dtype, rounded to it."""

    def draw(*shape, seed=0):
        noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return noise.float().to(device=device, dtype=dtype)

    return draw


def toy(weight):
    """A smooth network of bounded output that looks at every element and at the time."""

    def call(z, t):
        mixed = (z.flatten(1).double() @ weight).view(z.shape)
        return torch.tanh(mixed + t.double().view(-1, 1, 1, 1) / 1000).to(z.dtype)

    return call


@pytest.fixture
def model(device):
    """A toy network on samples of 32 elements."""
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 0.2
    return toy(weight.to(device))
