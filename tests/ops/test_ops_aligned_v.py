"""The aligned-v loss where it is hard: near alignment, no norm, huge norms, large samples; and under autograd."""

import itertools

import pytest
import torch

import op_cases as cases
from op_cases import assert_no_worse
from reflow_kernels import aligned_v_loss, reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered"),
    pytest.mark.parametrize("backend", cases.BACKENDS),
]


def normal(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def gradient(output, target, **arguments):
    output = output.detach().requires_grad_()
    loss = aligned_v_loss(output, target, **arguments).loss
    return loss.detach(), torch.autograd.grad(loss, output)[0]


@pytest.mark.parametrize("error", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("ratio", [1.0, 1.001, 3.0, 1e4])
def test_one_minus_cosine_keeps_its_digits(backend, device, error, ratio):
    target = normal(2, 4, 16, 16, device=device)
    output = ratio * (target + error * normal(2, 4, 16, 16, seed=1, device=device))
    weight = 1e12  # the loss is the cosine part alone
    loss, grad = gradient(output, target, direction_weight=weight, backend=backend)
    exact = output.double().requires_grad_()
    truth = reference.aligned_v_loss(exact, target.double(), direction_weight=weight).loss
    expected = torch.autograd.grad(truth, exact)[0]
    assert abs(loss.double() / truth - 1) < max(2e-5, 2e-7 / error)
    assert (grad - expected).norm() < 1e-6 / min(error, 1) * expected.norm() * 4


VALUES = (0.0, 1e-42, 1e-30, 1e-7, 1.0, 1e10, 1e17, 1e30, 1.5e38)


@pytest.mark.parametrize("kind", ["parallel", "opposite", "free"])
def test_zero_tiny_and_huge_vectors(backend, device, kind):
    generator = torch.Generator().manual_seed(7)
    signs = torch.randint(0, 2, (1, 24), generator=generator).to(device) * 2.0 - 1
    turned = {"parallel": signs, "opposite": -signs, "free": signs.flip(1)}[kind]
    pairs = torch.tensor(list(itertools.product(VALUES, VALUES)), device=device)  # a row of the batch for every pair
    output, target = pairs[:, :1] * signs, pairs[:, 1:] * turned
    result = aligned_v_loss(output, target, direction_weight=0.5, backend=backend)
    grad = gradient(output, target, direction_weight=0.5, backend=backend)[1]
    exact = output.double().requires_grad_()
    truth = reference.aligned_v_loss(exact, target.double(), direction_weight=0.5)
    expected = torch.autograd.grad(truth.loss, exact)[0]
    assert not any(value.isnan().any() for value in (*result, grad))
    assert torch.allclose(result.cosine.double(), truth.cosine, rtol=0, atol=1e-6)
    for name in ("mse", "magnitude"):
        wanted = getattr(truth, name).float()  # inf beyond fp32
        assert torch.allclose(getattr(result, name), wanted, rtol=1e-5, atol=1e-38), name
    error, size = (grad.double() - expected).abs().amax(1), expected.abs().amax(1)
    assert bool((error <= 1e-5 * size + 1e-38).all())


def test_the_largest_opposites_give_infinity(backend, device):
    output = torch.full((1, 8), 3e38, device=device, requires_grad=True)
    result = aligned_v_loss(output, -output.detach(), direction_weight=1.0, backend=backend)
    assert result.loss.isinf() and result.cosine < -0.9999 and result.magnitude == 0
    assert not torch.autograd.grad(result.loss, output)[0].isnan().any()


def test_zero_target_leaves_the_squared_error_alone(backend, device):
    output, target = normal(3, 5, device=device), torch.zeros(3, 5, device=device)
    for scale in (1.0, 1e-6):  # a free and a floored norm
        with_cosine = gradient(scale * output, target, direction_weight=100.0, backend=backend)[1]
        without = gradient(scale * output, target, direction_weight=0.0, backend=backend)[1]
        assert torch.allclose(with_cosine, without, rtol=1e-5, atol=0)


def test_mixed_batches_keep_samples_apart(backend, device):
    rows = [normal(63, seed=number, device=device) for number in range(6)]
    output = torch.stack([rows[0], 1e30 * rows[1], 0 * rows[2], rows[3], -rows[4], 1e-20 * rows[5]])
    target = torch.stack([rows[1], 1e30 * rows[1], rows[2], 0 * rows[3], rows[4], 1e15 * rows[5]])
    together = aligned_v_loss(output, target, direction_weight=1.0, backend=backend)
    for number in range(6):
        one = slice(number, number + 1)
        alone = aligned_v_loss(output[one], target[one], direction_weight=1.0, backend=backend)
        for name in ("mse", "magnitude", "cosine"):
            assert torch.equal(getattr(alone, name), getattr(together, name)[one]), (number, name)


@pytest.mark.parametrize("size", [16384, 16385, 20000])
def test_samples_of_one_program_and_of_several(backend, device, size):
    output, target = normal(2, size, device=device), normal(2, size, seed=1, device=device)
    output[0, -4000:] *= 1e30  # one tile in its own scale
    output.requires_grad_()
    result = aligned_v_loss(output, target, direction_weight=1000.0, backend=backend)
    grad = torch.autograd.grad(result.loss, output)[0]
    exact = output.detach().double().requires_grad_()
    truth = reference.aligned_v_loss(exact, target.double(), direction_weight=1000.0)
    expected = torch.autograd.grad(truth.loss, exact)[0]
    assert torch.allclose(result.cosine.double(), truth.cosine, rtol=0, atol=1e-6)
    assert torch.allclose(result.mse[1].double(), truth.mse[1], rtol=1e-5)
    for row in range(2):
        assert (grad[row] - expected[row]).abs().max() < 1e-5 * expected[row].abs().max()


def test_more_tiles_and_samples_than_one_round_takes(backend, device, monkeypatch):
    from reflow_kernels import launch

    monkeypatch.setattr(launch, "SINGLE_PROGRAM", 128)
    monkeypatch.setattr(launch, "TILE", 128)
    monkeypatch.setattr(launch, "CHUNK", 4)
    output, target = normal(3, 1300, device=device), normal(3, 1300, seed=1, device=device)
    assert launch.reduction(1300).tiles == 21  # in chunks of 4, a round for each of the 3 samples
    plain = reference.aligned_v_loss(output, target, direction_weight=1.0)
    exact = reference.aligned_v_loss(output.double(), target.double(), direction_weight=1.0)
    actual = aligned_v_loss(output, target, direction_weight=1.0, backend=backend)
    for name in ("loss", "mse", "cosine"):
        terms = torch.ones_like(exact.cosine) if name == "cosine" else None  # 1 - (1 - cosine) rounds as 1 does
        assert_no_worse(name, getattr(actual, name), getattr(plain, name), getattr(exact, name), terms)


def test_more_samples_than_one_program_finishes(backend, device):
    """Three programs finish 300 samples and one more launch adds their losses up."""
    output, target = normal(300, 40, device=device).requires_grad_(), normal(300, 40, seed=1, device=device)
    weight = torch.linspace(0.5, 2.0, 300, device=device)
    exact = output.detach().double().requires_grad_()
    truth = reference.aligned_v_loss(exact, target.double(), direction_weight=0.3, weight=weight.double())
    found = aligned_v_loss(output, target, direction_weight=0.3, weight=weight, backend=backend)
    for one, two in zip(found, truth, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=2e-6, atol=5e-7)
    (grad,), (expected,) = torch.autograd.grad(found.loss, output), torch.autograd.grad(truth.loss, exact)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-8)


def test_empty_batch_is_zero(backend, device):
    output = torch.zeros(0, 4, 8, 8, device=device, requires_grad=True)
    result = aligned_v_loss(output, output.detach(), direction_weight=1.0, weight=2.0, backend=backend)
    assert result.loss == 0 and all(part.shape == (0,) for part in result[1:])
    assert torch.autograd.grad(result.loss, output)[0].shape == output.shape


def test_not_a_number_is_not_hidden(backend, device):
    output, target = normal(2, 40, device=device), normal(2, 40, seed=1, device=device)
    output[1, 3] = float("nan")
    result = aligned_v_loss(output, target, direction_weight=1.0, backend=backend)
    assert result.loss.isnan() and result.mse.isnan().tolist() == [False, True]
    target[0, 0] = float("inf")
    assert not aligned_v_loss(target, output, direction_weight=1.0, backend=backend).loss.isfinite()


def test_upstream_gradient_retained_graph_and_accumulation(backend, device):
    output, target = normal(3, 40, device=device), normal(3, 40, seed=1, device=device)
    grad = gradient(output, target, direction_weight=0.7, backend=backend)[1]

    leaf = output.clone().requires_grad_()
    loss = aligned_v_loss(leaf, target, direction_weight=0.7, backend=backend).loss
    (loss * 8 / 3).backward(retain_graph=True)  # a loss that is scaled afterwards
    assert torch.allclose(leaf.grad, grad * 8 / 3, rtol=1e-5, atol=1e-9)
    loss.backward(retain_graph=True)  # accumulates
    assert torch.allclose(leaf.grad, grad * 11 / 3, rtol=1e-5, atol=1e-9)
    first = leaf.grad.clone()
    loss.backward(torch.zeros((), device=device))
    assert torch.equal(leaf.grad, first)

    leaf = output.clone().requires_grad_()
    total = sum(
        aligned_v_loss(leaf[part], target[part], direction_weight=0.7, backend=backend).loss for part in ([0], [1, 2])
    )
    shares = torch.autograd.grad(total, leaf)[0] * torch.tensor([[1.0], [2.0], [2.0]], device=device) / 3
    assert torch.allclose(shares, grad, rtol=1e-5, atol=1e-9)


def test_logged_parts_carry_no_gradient(backend, device):
    output = normal(2, 8, device=device).requires_grad_()
    result = aligned_v_loss(output, output.detach() + 1, direction_weight=1.0, backend=backend)
    assert result.loss.requires_grad and not any(part.requires_grad for part in result[1:])


def test_network_before_the_loss_gets_its_gradient(backend, device):
    torch.manual_seed(0)
    layer = torch.nn.Linear(40, 40, device=device)
    inputs, target = normal(3, 40, device=device), normal(3, 40, seed=1, device=device)
    aligned_v_loss(layer(inputs), target, direction_weight=1.0, backend=backend).loss.backward()
    grads = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    reference.aligned_v_loss(layer(inputs), target, direction_weight=1.0).loss.backward()
    for grad, parameter in zip(grads, layer.parameters(), strict=True):
        assert torch.allclose(grad, parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("sample", [False, True])
def test_gradcheck_in_fp64(backend, device, sample):
    output, target, state = (normal(2, 2, 3, seed=seed, dtype=torch.float64, device=device) for seed in range(3))
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64, device=device)
    arguments = {"direction_weight": weights, "weight": weights.flip(0), "backend": backend}
    if sample:
        arguments |= {"sample": state, "sample_coef": weights, "output_coef": -weights}
    for scale in (1.0, 1e-5):  # free and floored
        output = (output * scale).requires_grad_()
        check = dict(eps=1e-6 * scale, atol=1e-6 / scale, rtol=1e-4)
        assert torch.autograd.gradcheck(lambda x: aligned_v_loss(x, target, **arguments).loss, (output,), **check)
        output = output.detach() / scale
