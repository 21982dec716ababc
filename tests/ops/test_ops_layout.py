"""Operands in any memory layout: read in place where samples share one dense order, else copied once and said once."""

import logging

import numpy
import pytest
import torch

import op_cases as cases
from reflow_kernels import aligned_v_loss, cfg_combine, dispatch, guided_step, layout, window_chord

triton_only = pytest.mark.parametrize("backend", ["triton"])


@pytest.fixture
def copies(monkeypatch):
    """The names of operands that were copied."""
    said = []
    in_order = layout.in_order

    def watched(op, name, tensor, order, strict):
        result = in_order(op, name, tensor, order, strict)
        if result is not tensor:
            said.append(name)
        return result

    monkeypatch.setattr(layout, "in_order", watched)
    return said


def normal(*shape, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def run_all(output, target, sample, backend, strict=False):
    """Results of all ops on operands [4, C, H, W], as fresh contiguous tensors."""
    leaf = output.detach().requires_grad_()
    loss = aligned_v_loss(
        leaf,
        target,
        direction_weight=1.0,
        sample=sample,
        sample_coef=0.5,
        output_coef=-2.0,
        backend=backend,
        strict=strict,
    )
    grad = torch.autograd.grad(loss.loss, leaf)[0]
    step = guided_step(sample[:2], output, 0.5, 2.0, guidance_scale=3.0, backend=backend, strict=strict)
    chord = window_chord(target, sample, 0.3, -0.5, backend=backend, strict=strict)
    return [result.contiguous() for result in (*loss, grad, *step, *chord)] + [
        cfg_combine(output, 3.0, rescale=0.5, backend=backend, strict=strict).contiguous()
    ]


IN_PLACE = {
    "contiguous": lambda x: x,
    "channels_last": channels_last,
    "every second sample": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
    "some channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "storage offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "transposed plane": lambda x: x.mT.contiguous().mT,
    "channels_last, every second": lambda x: channels_last(torch.stack([x, x + 1], 1).flatten(0, 1))[::2],
}


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_shared_dense_orders_are_read_in_place(device, backend, kind, copies):
    operands = [normal(4, 3, 4, 5, seed=seed, device=device) for seed in range(3)]
    plain = run_all(*operands, backend)
    moved = run_all(*map(IN_PLACE[kind], operands), backend, strict=True)
    assert not copies
    for one, two in zip(plain, moved, strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-6)


@triton_only
def test_an_expanded_batch_is_read_in_place(device, backend, copies):
    output, single = normal(4, 3, 4, 5, device=device), normal(1, 3, 4, 5, seed=1, device=device)
    one = aligned_v_loss(output, single.expand_as(output), direction_weight=1.0, backend=backend, strict=True)
    two = aligned_v_loss(output, single.repeat(4, 1, 1, 1), direction_weight=1.0, backend=backend, strict=True)
    assert torch.equal(one.mse, two.mse) and not copies


MIXED = {
    "channels_last target": lambda x, y, z: (x, channels_last(y), z),
    "channels_last output": lambda x, y, z: (channels_last(x), y, z),
    "strided sample": lambda x, y, z: (x, y, torch.cat([z, z], -1)[..., : z.shape[-1]]),
    "transposed target": lambda x, y, z: (x, y.mT.contiguous().mT, channels_last(z)),
    "expanded channels": lambda x, y, z: (x, y[:, :1].expand_as(y), z),
}


@pytest.mark.parametrize("kind", MIXED)
@triton_only
def test_mixed_orders_are_copied_and_never_mixed_up(device, backend, kind, copies):
    operands = [normal(4, 3, 4, 5, seed=seed, device=device) for seed in range(3)]
    moved = MIXED[kind](*operands)
    plain = run_all(*(tensor.contiguous() for tensor in moved), backend)
    result = run_all(*moved, backend)
    assert copies
    for one, two in zip(plain, result, strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-6)


@triton_only
def test_a_copy_is_said_once_and_refused_under_strict(device, backend, caplog):
    output, target = normal(2, 3, 4, 6, device=device), channels_last(normal(2, 3, 4, 6, seed=1, device=device))
    dispatch._said.clear()
    with caplog.at_level(logging.WARNING, logger="reflow_kernels"):
        for _ in range(3):
            aligned_v_loss(output, target, direction_weight=1.0, backend=backend)
    assert len(caplog.records) == 1 and "target has strides (72, 1, 18, 3)" in caplog.text
    with pytest.raises(ValueError, match="target has strides .* strict refuses the copy"):
        aligned_v_loss(output, target, direction_weight=1.0, backend=backend, strict=True)
    with pytest.raises(ValueError, match="model_output has strides .* strict refuses the copy"):
        guided_step(output, target, 1.0, 1.0, out=torch.empty_like(output), backend=backend, strict=True)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_results_follow_the_leading_operand(device, backend):
    output, target = channels_last(normal(2, 3, 4, 5, device=device)), normal(2, 3, 4, 5, seed=1, device=device)
    leaf = output.clone(memory_format=torch.preserve_format).requires_grad_()
    grad = torch.autograd.grad(aligned_v_loss(leaf, target, direction_weight=1.0, backend=backend).loss, leaf)[0]
    step = guided_step(target, output, 0.5, 0.5, backend=backend)
    chord = window_chord(output, target, 0.5, -1.0, backend=backend)
    for result in (grad, *step, *chord, cfg_combine(output, 2.0, backend=backend)):
        assert result.stride() == output.stride() or result.shape[0] == 1 and result.stride()[1:] == output.stride()[1:]
    several = window_chord(output, target, torch.rand(4, 2, device=device), -1.0, backend=backend)[0]
    assert several.shape == (4, *output.shape) and several.stride() == (120, *output.stride())


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_step_in_place_and_into_slices_of_static_buffers(device, backend):
    state, output = normal(2, 3, 4, 5, device=device), normal(4, 3, 4, 5, seed=1, device=device)
    expected = guided_step(state, output, 0.5, 2.0, guidance_scale=3.0, input_scale=0.1, backend=backend)
    buffers = torch.full((2, 5, 4, 5), 9.0, device=device), torch.full((9, 3, 4, 5), 9.0, device=device)
    result = guided_step(
        state, output, 0.5, 2.0, guidance_scale=3.0, input_scale=0.1,
        out=buffers[0][:, :3], input_out=buffers[1][1::2], backend=backend,
    )  # fmt: skip
    assert torch.equal(result[0], expected[0]) and torch.equal(buffers[1][1::2], expected[1])
    assert bool((buffers[0][:, 3:] == 9).all()) and bool((buffers[1][::2] == 9).all())  # nothing beside them
    again = guided_step(state, output, 0.5, 2.0, guidance_scale=3.0, out=state, backend=backend)
    assert again[0] is state and torch.equal(state, expected[0])


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_results_share_no_memory(device, backend):
    state, output = normal(2, 3, 5, device=device), normal(2, 3, 5, seed=1, device=device)
    results = [
        *guided_step(state, output, 1.0, 0.0, backend=backend),
        *window_chord(state, output, 0.0, -1.0, backend=backend),
    ]
    pointers = {tensor.data_ptr() for tensor in (state, output, *results)}
    assert len(pointers) == 2 + len(results)


@triton_only
def test_offsets_are_64_bit(device, backend):
    """Rows more than 2^31 elements apart: 32-bit arithmetic would read somewhere else."""
    stride = 2**31 + 32
    if device.type == "cpu":  # pages that nobody touches take no memory
        memory = torch.from_numpy(numpy.zeros(stride + 32, dtype=numpy.float16))
    else:
        memory = torch.zeros(stride + 32, dtype=torch.float16, device=device)
    rows = memory.as_strided((2, 32), (stride, 1))
    rows.copy_(normal(2, 32, device=device))
    near = rows.float()
    options = {"direction_weight": 1.0, "backend": backend, "strict": True}
    far = rows.detach().requires_grad_()
    grad = torch.autograd.grad(aligned_v_loss(far, near.flip(0), **options).loss, far)[0]
    leaf = near.half().requires_grad_()
    assert torch.equal(grad, torch.autograd.grad(aligned_v_loss(leaf, near.flip(0), **options).loss, leaf)[0])
    assert torch.equal(guided_step(near, rows, 1.0, 1.0, backend=backend)[0], near + near)
    assert torch.equal(cfg_combine(rows, 1.0, rescale=1.0, backend=backend), rows[1:])
    guided_step(near, near, 1.0, 1.0, input_out=rows, backend=backend)
    assert torch.equal(rows.float(), (near + near).half().float())
