"""Samples beyond the sizes where the launchers change their way: more tiles than the last stage reads at a time."""

import pytest
import torch

import op_cases as cases
from reflow_kernels import aligned_v_loss, launch

ELEMENTS = launch.TILE * launch.CHUNK + 4096 + 16  # two reads of partial sums, the second of two tiles, one of them not full


@pytest.fixture(scope="module")
def drawn(device):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(1, ELEMENTS, generator=generator)
    # Rows of several sizes and an offset, so that no tile is like another.
    target *= torch.linspace(0.1, 3.0, ELEMENTS)
    output = target + 0.3 * torch.randn(1, ELEMENTS, generator=generator) + 0.05
    return output.to(device), target.to(device)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_loss_and_gradient_of_a_sample_of_several_reads(drawn, backend):
    output, target = drawn
    found = aligned_v_loss(leaf := output.clone().requires_grad_(), target, direction_weight=0.7, backend=backend)
    (grad,) = torch.autograd.grad(found.loss, leaf)
    exact = output.double().requires_grad_()
    difference, cosine = exact - target.double(), torch.cosine_similarity(exact, target.double(), dim=1)
    mse = difference.square().mean(1)
    loss = (mse + 0.7 * (1 - cosine)).mean()
    truth = torch.autograd.grad(loss, exact)[0]
    magnitude = (exact.norm(dim=1) - target.double().norm(dim=1)).square() / ELEMENTS
    close = 1e-6 if backend == "triton" else 1e-5  # PyTorch's own sums over four million elements
    torch.testing.assert_close(found.loss.double(), loss, rtol=close, atol=0)
    torch.testing.assert_close(found.mse.double(), mse.detach(), rtol=close, atol=0)
    torch.testing.assert_close(found.magnitude.double(), magnitude.detach(), rtol=100 * close, atol=0)
    torch.testing.assert_close(1 - found.cosine.double(), 1 - cosine.detach(), rtol=1e-3, atol=2e-7)
    assert float((grad.double() - truth).norm() / truth.norm()) < close
