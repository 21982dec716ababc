"""Algebra that the ops must obey whatever the numbers: identities, linearity, permutations, and results that repeat."""

import dataclasses

import pytest
import torch
from hypothesis import strategies as st

import op_cases as cases
from reflow_kernels import aligned_v_loss, cfg_combine, guided_step, window_chord

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Standard normal fp32 operands of one shape."""

    shape: tuple[int, ...]
    seed: int

    def build(self, device, count=2, dtype=torch.float32):
        generator = torch.Generator().manual_seed(self.seed)
        return [torch.randn(self.shape, generator=generator).to(device, dtype) for _ in range(count)]

    def values(self, device, low=0.1, high=2.0):
        generator = torch.Generator().manual_seed(self.seed + 1)
        return (low + (high - low) * torch.rand(self.shape[0], generator=generator)).to(device)


@st.composite
def tensors(draw, smallest=1):
    shape = (
        draw(st.integers(1, 4)),
        *draw(st.sampled_from([shape for shape in cases.SHAPES if len(shape) > smallest - 1])),
    )
    return Tensors(shape, draw(st.integers(0, 2**31)))


def gradient(output, target, **arguments):
    output = output.detach().requires_grad_()
    return torch.autograd.grad(aligned_v_loss(output, target, **arguments).loss, output)[0]


@cases.for_all(tensors())
def test_loss_is_zero_exactly_where_prediction_equals_target(case, device, backend):
    output, other = case.build(device)
    equal = aligned_v_loss(output, output.clone(), direction_weight=1.0, backend=backend)
    assert equal.loss == 0 and bool((equal.cosine == 1).all()) and not equal.mse.any()
    assert not gradient(output, output.clone(), direction_weight=1.0, backend=backend).any()
    assert aligned_v_loss(output, other, direction_weight=1.0, backend=backend).loss > 0


@cases.for_all(tensors())
def test_prediction_is_built_inside(case, device, backend):
    output, target, sample = case.build(device, 3)
    a, b = case.values(device, -1, 1), case.values(device, -3, -1)
    column = (-1,) + (1,) * (output.dim() - 1)
    built = a.view(column) * sample + b.view(column) * output
    inside = aligned_v_loss(
        output, target, direction_weight=0.3, sample=sample, sample_coef=a, output_coef=b, backend=backend
    )
    for one, two in zip(inside, aligned_v_loss(built, target, direction_weight=0.3, backend=backend), strict=True):
        assert torch.equal(one, two)


@cases.for_all(st.tuples(tensors(2), st.sampled_from((0.1, 3.0, 1e4, 1e12))))
def test_cosine_ignores_positive_scaling(case, device, backend):
    tensors, factor = case
    output, target = tensors.build(device)
    plain = aligned_v_loss(output, target, direction_weight=1.0, backend=backend)
    scaled = aligned_v_loss(factor * output, target, direction_weight=1.0, backend=backend)
    assert torch.allclose(plain.cosine, scaled.cosine, rtol=0, atol=1e-6)
    parallel = aligned_v_loss(factor * target, target, direction_weight=1.0, backend=backend)
    assert bool(((1 - parallel.cosine).abs() <= 1e-7).all())
    assert torch.allclose(parallel.mse, parallel.magnitude, rtol=1e-5)


@cases.for_all(tensors(2))
def test_cosine_gradient_is_orthogonal_to_the_prediction(case, device, backend):
    output, target = case.build(device)
    weights = torch.full((output.shape[0],), 100.0, device=device)
    both = gradient(output, target, direction_weight=weights, backend=backend)
    squared = gradient(output, target, direction_weight=0.0, backend=backend)
    cosine = (both - squared).flatten(1).double()
    rows = output.flatten(1).double()
    along = (cosine * rows).sum(1).abs() / (cosine.norm(dim=1) * rows.norm(dim=1)).clamp_min(1e-30)
    alone = output[0].numel() == 1  # one element has no direction to turn to: the gradient is rounding
    assert alone or bool((along < 2e-5).all())


@cases.for_all(tensors())
def test_mse_is_magnitude_plus_direction(case, device, backend):
    output, target = case.build(device)
    result = aligned_v_loss(output, target, direction_weight=1.0, backend=backend)
    p, v = output.flatten(1).norm(dim=1), target.flatten(1).norm(dim=1)
    direction = 2 * p * v * (1 - result.cosine) / output[0].numel()
    assert torch.allclose(result.mse, result.magnitude + direction, rtol=1e-4, atol=1e-5)


@cases.for_all(tensors())
def test_permuting_the_batch_permutes_the_result(case, device, backend):
    output, target = case.build(device)
    order = torch.randperm(output.shape[0], generator=torch.Generator().manual_seed(case.seed)).to(device)
    weights = case.values(device)
    plain = aligned_v_loss(output, target, direction_weight=weights, backend=backend)
    moved = aligned_v_loss(output[order], target[order], direction_weight=weights[order], backend=backend)
    # PyTorch's own reductions on a GPU may take a row in another order at another place; the kernels never do.
    same = torch.allclose if backend == "torch" and device.type == "cuda" else torch.equal
    for name in ("mse", "magnitude", "cosine"):
        assert same(getattr(plain, name)[order], getattr(moved, name))
    assert torch.allclose(plain.loss, moved.loss, rtol=1e-6)
    step = guided_step(output, target, weights, -weights, backend=backend)
    step_moved = guided_step(output[order], target[order], weights[order], -weights[order], backend=backend)
    assert torch.equal(step[0][order], step_moved[0])
    chord = window_chord(output, target, weights, -weights, backend=backend)
    chord_moved = window_chord(output[order], target[order], weights[order], -weights[order], backend=backend)
    assert all(torch.equal(one[order], two) for one, two in zip(chord, chord_moved, strict=True))


@cases.for_all(st.tuples(tensors(), st.sampled_from(cases.DTYPES)))
def test_two_runs_are_bit_equal(case, device, backend):
    tensors, dtype = case
    output, target, doubled = tensors.build(device, 2) + [torch.cat(tensors.build(device, 2, dtype))]
    values = tensors.values(device)

    def run():
        loss = aligned_v_loss(output.to(dtype), target, direction_weight=values, backend=backend)
        slope = gradient(output.to(dtype), target, direction_weight=values, backend=backend)
        step = guided_step(output, doubled, values, values, guidance_scale=values, backend=backend)
        chord = window_chord(output, target, values, -values, backend=backend)
        return *loss, slope, *step, *chord, cfg_combine(doubled, values, rescale=0.7, backend=backend)

    assert all(torch.equal(one, two) for one, two in zip(run(), run(), strict=True))


@cases.for_all(st.tuples(tensors(), st.sampled_from(cases.DTYPES)))
def test_guidance_at_one_is_the_conditional_and_at_zero_the_unconditional(case, device, backend):
    tensors, dtype = case
    uncond, cond = tensors.build(device, 2, dtype)
    doubled = torch.cat([uncond, cond])
    state = tensors.build(device, 1, cases.wide(dtype))[0]
    for scale, half in ((0.0, uncond), (1.0, cond)):
        assert torch.equal(cfg_combine(doubled, scale, backend=backend), half)
        rescaled = cfg_combine(doubled, scale, rescale=1.0, backend=backend)
        if scale == 1.0:
            assert torch.equal(rescaled, half)
        with_guidance = guided_step(state, doubled, 0.5, 2.0, guidance_scale=scale, backend=backend)
        without = guided_step(state, half, 0.5, 2.0, backend=backend)
        assert torch.equal(with_guidance[0], without[0])
        assert torch.equal(with_guidance[1], torch.cat([without[1], without[1]]))


@cases.for_all(tensors())
def test_guidance_is_affine_in_the_scale(case, device, backend):
    uncond, cond = case.build(device, 2, torch.float64)
    doubled = torch.cat([uncond, cond])
    at = {scale: cfg_combine(doubled, scale, backend=backend) for scale in (-2.0, 0.25, 3.0, 8.0)}
    slope = (at[8.0] - at[3.0]) / 5
    assert torch.allclose(at[-2.0], at[3.0] - 5 * slope) and torch.allclose(at[0.25], at[3.0] - 2.75 * slope)


@cases.for_all(tensors(2))
def test_full_rescale_restores_the_conditional_deviation(case, device, backend):
    uncond, cond = case.build(device, 2, torch.float64)
    guided = cfg_combine(torch.cat([uncond, cond]), 7.5, rescale=1.0, backend=backend)
    if cond[0].numel() > 1:
        assert torch.allclose(guided.flatten(1).std(1), cond.flatten(1).std(1))
    half = cfg_combine(torch.cat([uncond, cond]), 7.5, rescale=0.5, backend=backend)
    plain = cfg_combine(torch.cat([uncond, cond]), 7.5, backend=backend)
    assert torch.allclose(half, (guided + plain) / 2)


@cases.for_all(tensors())
def test_two_steps_compose(case, device, backend):
    state, output = case.build(device, 2, torch.float64)
    a, b, c, d = (0.9, -0.3, 1.1, 0.2)
    once = guided_step(state, output, a, b, backend=backend)[0]
    twice = guided_step(once, output, c, d, backend=backend)[0]
    both = guided_step(state, output, a * c, b * c + d, backend=backend)[0]
    assert torch.allclose(twice, both)


@cases.for_all(tensors())
def test_chord_ends_are_exact_and_its_velocity_leads_along_it(case, device, backend):
    start, end = case.build(device)
    batch, dt = start.shape[0], -0.25
    tau = torch.tensor([[0.0], [1.0], [0.3]], device=device).expand(3, batch)
    z_t, velocity, model_input = window_chord(start, end, tau, dt, input_dtype=torch.float16, backend=backend)
    assert torch.equal(z_t[0], start) and torch.equal(z_t[1], end)
    assert torch.allclose(start + velocity * dt * 0.3, z_t[2], atol=1e-5)
    assert torch.equal(model_input, z_t.half())
    for number in range(3):  # several points a chord are as many calls
        alone = window_chord(start, end, tau[number], dt, input_dtype=torch.float16, backend=backend)
        assert torch.equal(alone[0], z_t[number]) and torch.equal(alone[1], velocity)
