"""The ops as torch.library sees them: schema, fake kernels, autograd registration; torch.compile without a break."""

import pytest
import torch

import op_cases as cases
from reflow_kernels import aligned_v_loss, cfg_combine, guided_step, window_chord

pytestmark = pytest.mark.parametrize("backend", cases.BACKENDS)
ops = torch.ops.reflow_kernels


def normal(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", [torch.Tensor.clone, channels_last])
def test_opcheck_of_the_loss(backend, device, grad, layout):
    output = layout(normal(2, 3, 4, 5, device=device)).requires_grad_(grad)
    target, sample = normal(2, 3, 4, 5, seed=1, device=device), normal(2, 3, 4, 5, seed=2, device=device)
    coef = torch.tensor([0.5, 2.0], device=device)
    arguments = (output, layout(target), coef, coef, layout(sample), coef, coef, 1e-4, backend, False)
    torch.library.opcheck(ops.aligned_v_loss.default, arguments)
    plain = (output, layout(target), coef, None, None, None, None, 1e-4, backend, False)
    torch.library.opcheck(ops.aligned_v_loss.default, plain)


def test_opcheck_of_the_gradient(backend, device):
    output, target = normal(2, 3, 4, 5, device=device), normal(2, 3, 4, 5, seed=1, device=device)
    coef = torch.tensor([0.5, 2.0], device=device)
    stats = ops.aligned_v_loss(output, target, coef, None, None, None, None, 1e-4, backend, False)[2]
    arguments = (
        torch.ones((), device=device),
        output,
        target,
        coef,
        None,
        None,
        None,
        None,
        stats,
        1e-4,
        backend,
        False,
    )
    torch.library.opcheck(ops.aligned_v_loss_backward.default, arguments)


@pytest.mark.parametrize("layout", [torch.Tensor.clone, channels_last, lambda tensor: tensor[:, ::2]])
def test_opcheck_of_the_others(backend, device, layout):
    state, end = layout(normal(2, 4, 4, 5, device=device)), layout(normal(2, 4, 4, 5, seed=1, device=device))
    doubled = layout(normal(4, 4, 4, 5, seed=2, dtype=torch.bfloat16, device=device))
    coef = torch.tensor([0.5, -2.0], device=device)
    torch.library.opcheck(
        ops.guided_step.default, (state, doubled, coef, coef, coef, coef, torch.float16, backend, False)
    )
    torch.library.opcheck(
        ops.guided_step.default, (state, doubled[:2], coef, coef, None, None, torch.bfloat16, backend, False)
    )
    buffers = torch.empty(2, *state.shape[1:], device=device), torch.empty(4, *state.shape[1:], device=device)
    buffers = tuple(buffer.zero_() for buffer in buffers)
    torch.library.opcheck(
        ops.guided_step_out.default, (state, doubled, coef, coef, coef, None, *buffers, backend, False)
    )
    for tau in (coef.abs(), coef.abs().expand(3, 2)):
        torch.library.opcheck(ops.window_chord.default, (state, end, tau, -coef.abs(), torch.bfloat16, backend, False))
    for rescale in (None, coef):
        torch.library.opcheck(ops.cfg_combine.default, (doubled, coef, rescale, backend, False))


def test_empty_batches_pass_opcheck(backend, device):
    nothing, coef = torch.zeros(0, 3, 4, device=device), torch.zeros(0, device=device)
    torch.library.opcheck(
        ops.aligned_v_loss.default, (nothing, nothing.clone(), coef, None, None, None, None, 1e-4, backend, False)
    )
    torch.library.opcheck(ops.cfg_combine.default, (nothing, coef, coef, backend, False))


def everything(backend):
    """A function that uses all ops the way a training step does."""

    def run(output, target, sample, doubled, coef):
        loss, *parts = aligned_v_loss(
            output * 2,
            target,
            direction_weight=0.3,
            sample=sample,
            sample_coef=coef,
            output_coef=-coef,
            weight=coef,
            backend=backend,
        )
        state, model_input = guided_step(sample, doubled, coef, -0.5, guidance_scale=7.5, backend=backend)
        static = torch.zeros_like(sample)
        guided_step(sample, doubled, coef, 0.5, guidance_scale=coef, out=static, backend=backend)
        chord = window_chord(sample, target, coef, -0.25, input_dtype=torch.float16, backend=backend)
        guided = cfg_combine(doubled, coef, rescale=0.7, backend=backend)
        return loss * 3, *parts, state, model_input, static, *chord, guided

    return run


@pytest.mark.parametrize("layout", [torch.Tensor.clone, channels_last])
def test_compile_has_no_graph_break_and_changes_nothing(backend, device, layout):
    output = layout(normal(2, 3, 4, 5, device=device)).requires_grad_()
    target, sample = (
        layout(normal(2, 3, 4, 5, seed=1, device=device)),
        layout(normal(2, 3, 4, 5, seed=2, device=device)),
    )
    doubled = layout(normal(4, 3, 4, 5, seed=3, device=device))
    arguments = (output, target, sample, doubled, torch.tensor([0.5, 2.0], device=device))
    eager = everything(backend)(*arguments)
    torch._dynamo.reset()
    compiled = torch.compile(everything(backend), fullgraph=True, backend="aot_eager")(*arguments)
    for one, two in zip(eager, compiled, strict=True):
        assert torch.equal(one, two)
    first, second = (torch.autograd.grad(result[0], output)[0] for result in (eager, compiled))
    assert torch.equal(first, second)


@pytest.mark.slow
def test_inductor_gives_the_same(backend, device):
    output = normal(2, 3, 4, 5, device=device).requires_grad_()
    rest = [normal(2, 3, 4, 5, seed=seed, device=device) for seed in (1, 2)]
    arguments = (output, *rest, normal(4, 3, 4, 5, seed=3, device=device), torch.tensor([0.5, 2.0], device=device))
    eager = everything(backend)(*arguments)
    torch._dynamo.reset()
    compiled = torch.compile(everything(backend), fullgraph=True)(*arguments)
    for one, two in zip(eager, compiled, strict=True):
        assert torch.allclose(one, two, rtol=1e-6)
    first, second = (torch.autograd.grad(result[0], output)[0] for result in (eager, compiled))
    assert torch.allclose(first, second, rtol=1e-6)


def test_compile_with_a_changing_batch(backend, device):
    torch._dynamo.reset()
    run = torch.compile(
        lambda output, target: aligned_v_loss(output, target, direction_weight=1.0, backend=backend).loss,
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for batch in (2, 3, 5):
        output, target = normal(batch, 3, 8, device=device), normal(batch, 3, 8, seed=1, device=device)
        assert torch.equal(
            run(output, target), aligned_v_loss(output, target, direction_weight=1.0, backend=backend).loss
        )


def test_autocast_leaves_the_ops_alone(backend, device):
    output, target = normal(2, 8, device=device, dtype=torch.bfloat16), normal(2, 8, seed=1, device=device)
    plain = aligned_v_loss(output, target, direction_weight=1.0, backend=backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = aligned_v_loss(output, target, direction_weight=1.0, backend=backend)
    assert inside.loss.dtype is torch.float32 and torch.equal(plain.loss, inside.loss)
