"""The specification against its formulas, written once more for one sample at a time in numpy's fp64."""

import itertools
import math

import numpy as np
import pytest
import torch

from reflow_kernels import dispatch, reference

SHAPE = (3, 2, 5)


def drawn(count, shape=SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def of(value, row):
    """The value of a sample: a float, or a row of [B]."""
    return float(value[row]) if isinstance(value, torch.Tensor) else value


def loss_of(outputs, targets, weight, direction, eps, samples=None, a=None, b=None):
    """(loss, mse, magnitude, cosine), the last three by sample."""
    rows = []
    for row in range(len(outputs)):
        predicted, target = outputs[row].numpy().ravel(), targets[row].numpy().ravel()
        if samples is not None:
            predicted = of(a, row) * samples[row].numpy().ravel() + of(b, row) * predicted
        n = predicted.size
        length, other, floor = np.linalg.norm(predicted), np.linalg.norm(target), eps * math.sqrt(n)
        apart = predicted / max(length, floor) - target / max(other, floor)
        rows.append((np.sum((predicted - target) ** 2) / n, (length - other) ** 2 / n, 1 - np.sum(apart**2) / 2))
    losses = [(1 if weight is None else of(weight, r)) * (mse + of(direction, r) * (1 - cosine)) for r, (mse, _, cosine) in enumerate(rows)]
    return (sum(losses) / len(losses), *(torch.tensor(part) for part in zip(*rows)))


WEIGHTS = [None, 0.7, torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)]
DIRECTIONS = [1.5, torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)]
COEFFICIENTS = [None, (0.4, -1.3), (torch.tensor([0.2, 0.9, -1.1], dtype=torch.float64), torch.tensor([-0.8, 1.7, 0.6], dtype=torch.float64))]


@pytest.mark.parametrize("weight, direction, ab, eps", itertools.product(WEIGHTS, DIRECTIONS, COEFFICIENTS, [1e-4, 1.5]))
def test_the_loss_and_its_gradient(weight, direction, ab, eps):
    """eps 1.5: some norms are under the floor and some over it."""
    output, target, sample = drawn(3)
    output[1] *= 3
    target[0] *= 4
    more = {} if ab is None else {"sample": sample, "sample_coef": ab[0], "output_coef": ab[1]}
    output.requires_grad_()
    said = reference.aligned_v_loss(output, target, direction_weight=direction, weight=weight, eps=eps, **more)
    want = loss_of(output.detach(), target, weight, direction, eps, *((sample, *ab) if ab else ()))
    assert said.loss.item() == pytest.approx(want[0], rel=1e-12)
    for got, truth in zip(said[1:], want[1:], strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-13)
        assert not got.requires_grad
    (gradient,) = torch.autograd.grad(said.loss, output, torch.tensor(1.7, dtype=torch.float64))
    closed = reference.aligned_v_loss_backward(torch.tensor(1.7, dtype=torch.float64), output.detach(), target, direction_weight=direction,
                                               weight=weight, eps=eps, **more)  # fmt: skip
    torch.testing.assert_close(closed, gradient, rtol=1e-11, atol=1e-14)


def test_defaults_and_the_ends_of_the_range():
    output, target = drawn(2)
    assert reference.aligned_v_loss(output, target, direction_weight=1.0).loss == reference.aligned_v_loss(output, target, direction_weight=1.0, eps=1e-4).loss
    # A target of zeros has a direction part, by the floor, and no gradient of it.
    still = torch.zeros_like(target)
    given = {"direction_weight": 5.0, "eps": 1e-4}
    one = torch.tensor(1.0, dtype=torch.float64)
    plain = reference.aligned_v_loss_backward(one, output, still, direction_weight=0.0)
    assert torch.equal(reference.aligned_v_loss_backward(one, output, still, **given), plain)
    leaf = output.clone().requires_grad_()
    said = reference.aligned_v_loss(leaf, still, **given)
    assert said.cosine.allclose(torch.tensor(0.5, dtype=torch.float64))  # |v^/P|^2 / 2
    torch.testing.assert_close(torch.autograd.grad(said.loss, leaf)[0], plain)
    torch.testing.assert_close(plain, 2 * output / output.numel())


@pytest.mark.parametrize("shape", [(0, 2, 5), (3, 0), (3,)])
def test_empty_samples_batches_and_single_numbers(shape):
    output, target = drawn(2, shape)
    leaf = output.clone().requires_grad_()
    said = reference.aligned_v_loss(leaf, target, direction_weight=1.0)
    assert [tuple(part.shape) for part in said] == [(), *[(shape[0],)] * 3]
    closed = reference.aligned_v_loss_backward(torch.tensor(1.0, dtype=torch.float64), output, target, direction_weight=1.0)
    torch.testing.assert_close(torch.autograd.grad(said.loss, leaf)[0], closed, rtol=1e-11, atol=1e-13)
    if not output.numel():
        assert said.loss == 0 and not said.mse.any() and not said.magnitude.any() and closed.shape == shape
    else:
        assert said.loss.item() == pytest.approx(loss_of(output[:, None], target[:, None], None, 1.0, 1e-4)[0])


@pytest.mark.parametrize("dtype, large", [(torch.float32, 1e25), (torch.float64, 1e170)])
def test_squares_of_huge_numbers_do_not_overflow(dtype, large):
    output, target = (value.to(dtype) for value in drawn(2))
    want = loss_of(output.double(), target.double(), None, 1.0, 1e-4)[3]
    for left, right in ((large, large), (large, 1.0), (1.0, large)):
        said = reference.aligned_v_loss(left * output, right * target, direction_weight=1.0)
        torch.testing.assert_close(said.cosine.double(), want, rtol=0, atol=1e-5)
    values = torch.tensor([[1.0], [2.0**39], [large]], dtype=dtype)
    for scales in (reference._shrink(values, values)[0], reference._shrink(values.new_ones(3, 1), values)[1]):
        assert scales[:2].tolist() == [[1.0], [1.0]] and 0 < scales[2] < 1 and math.log2(scales[2]).is_integer()


def test_the_gradient_of_rows_that_are_scaled_is_that_of_twice_the_precision():
    """A weight at which the direction's part of the gradient is as large as the rest; twice the precision scales no row of this size."""
    output, target = (2.0**41 * value.float() for value in drawn(2))
    given = {"direction_weight": 1e25}
    found, want = (reference.aligned_v_loss_backward(torch.tensor(1.0), a, b, **given) for a, b in ((output, target), (output.double(), target.double())))
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=float(1e-5 * want.abs().max()))
    rest = reference.aligned_v_loss_backward(torch.tensor(1.0), output.double(), target.double(), direction_weight=0.0)
    assert (want - rest).norm() > 0.3 * want.norm()


@pytest.mark.parametrize("dtype, large", [(torch.float32, 1e25), (torch.float64, 1e170)])
@pytest.mark.parametrize("parts", [{}, {"sample": 0.5, "sample_coef": 0.3, "output_coef": -1.5}, {"weight": 0.7}])
def test_rows_that_are_known_to_be_small_are_not_scaled_and_give_the_same_bits(monkeypatch, dtype, large, parts):
    output, target = (value.to(dtype) for value in drawn(2))
    given = {name: value * output if name == "sample" else value for name, value in parts.items()} | {"direction_weight": 0.3}
    one = torch.tensor(0.7, dtype=dtype)
    for rows, goal in ((output, target), (large * output, target), (output, 0.0 * target), (output * float("nan"), target)):
        said = []
        for asked in (True, False):
            monkeypatch.setattr(dispatch, "eager_on_cpu", lambda *_, asked=asked: asked)
            result = reference.aligned_v_loss(rows, goal, **given)
            said.append([*result, reference.aligned_v_loss_backward(one, rows, goal, **given)])
        for quick, whole in zip(*said, strict=True):
            assert torch.equal(quick, whole) or (quick.isnan() == whole.isnan()).all() and torch.equal(quick.nan_to_num(), whole.nan_to_num())


@pytest.mark.parametrize("guidance, scale, dtype", itertools.product([None, 0.0, 1.0, 2.5, torch.tensor([0.5, 1.0, 7.0])],
                                                                     [None, 0.3, torch.tensor([2.0, 0.1, 1.0])], [None, torch.float32, torch.bfloat16]))
def test_a_guided_step(guidance, scale, dtype):
    state, first, second = (value.float() for value in drawn(3))
    a, b = torch.tensor([0.9, 0.5, 1.1]), -0.25
    output = second if guidance is None else torch.cat([first, second])
    new, model_input = reference.guided_step(state, output, a, b, guidance_scale=guidance, input_scale=scale, input_dtype=dtype)
    rows = []
    for row in range(3):
        guided = second[row] if guidance is None else first[row] + of(guidance, row) * (second[row] - first[row])
        rows.append(of(a, row) * state[row] + b * guided)
    torch.testing.assert_close(new, torch.stack(rows))
    inputs = torch.stack([(1 if scale is None else of(scale, r)) * value for r, value in enumerate(rows)]).to(dtype or torch.float32)
    torch.testing.assert_close(model_input, inputs if guidance is None else torch.cat([inputs, inputs]))
    assert model_input.dtype == (dtype or torch.float32) and model_input.data_ptr() != new.data_ptr()


def test_a_step_in_half_precision_keeps_the_input_in_the_networks_dtype():
    state, output = drawn(2)
    new, model_input = reference.guided_step(state.float(), output.bfloat16(), 1.0, 0.5)
    assert new.dtype == torch.float32 and model_input.dtype == torch.bfloat16


@pytest.mark.parametrize("tau", [0.0, 0.25, 1.0, torch.tensor([0.0, 0.4, 1.0]), torch.tensor([[0.0, 0.4, 1.0], [0.3, 0.2, 0.9]])])
@pytest.mark.parametrize("dt, dtype", [(-0.25, None), (torch.tensor([-0.1, -0.5, -1.0]), torch.bfloat16)])
def test_a_chord(tau, dt, dtype):
    start, end = (value.float() for value in drawn(2))
    z, velocity, model_input = reference.window_chord(start, end, tau, dt, input_dtype=dtype)
    several = tau if isinstance(tau, torch.Tensor) and tau.dim() == 2 else [tau]
    want = torch.stack([torch.stack([start[r] + of(one, r) * (end[r] - start[r]) for r in range(3)]) for one in several])
    torch.testing.assert_close(z, want if len(several) > 1 else want[0])
    torch.testing.assert_close(velocity, torch.stack([(end[r] - start[r]) / of(dt, r) for r in range(3)]))
    assert model_input.dtype == (dtype or torch.float32) and torch.equal(model_input, z.to(model_input.dtype)) and model_input.data_ptr() != z.data_ptr()


@pytest.mark.parametrize("shape", [(6, 2, 5), (6,)])
@pytest.mark.parametrize("scale, rescale", itertools.product([0.0, 1.0, 3.0, torch.tensor([0.5, 1.0, 7.0])], [0.0, 0.7, torch.tensor([0.0, 1.0, 0.4])]))
def test_guidance(shape, scale, rescale):
    (output,) = drawn(1, shape)
    output = output.float()
    output[2] = output[5] = 1.5  # a constant sample has no spread to restore
    rows = []
    for row in range(3):
        first, second = output[row], output[3 + row]
        guided = first + of(scale, row) * (second - first)
        spread = guided.std(unbiased=False) if guided.dim() else torch.tensor(0.0)
        if float(spread) > 1e-6:
            guided = guided * (1 + of(rescale, row) * (second.std(unbiased=False) / spread - 1))
        rows.append(guided)
    torch.testing.assert_close(reference.cfg_combine(output, scale, rescale=rescale), torch.stack(rows))
    half = reference.cfg_combine(output.bfloat16(), scale, rescale=rescale)
    assert half.dtype == torch.bfloat16


def test_arithmetic_is_in_fp32_or_where_one_operand_is_so_in_fp64():
    one = torch.zeros(1)
    assert reference.accumulate_dtype(one.half(), None, one.bfloat16()) is torch.float32
    assert reference.accumulate_dtype(one, None, one.double()) is torch.float64
