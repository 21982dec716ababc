"""What only a GPU can show: CUDA graph capture, no host synchronisation, the tensors' own device, launches."""

import pytest
import torch

from reflow_kernels import aligned_v_loss, cfg_combine, fused_adamw, fused_adamw8bit, guided_step, reference, window_chord

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SHAPES = [(4, 4, 64, 64), (2, 4, 128, 128), (3, 3, 33, 35)]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def operands(shape, dtype):
    """Static inputs of one training step; values are filled in before each replay."""
    batch = shape[0]
    tensors = {
        "output": normal(*shape, dtype=dtype),
        "target": normal(*shape, seed=1),
        "sample": normal(*shape, seed=2),
        "doubled": normal(2 * batch, *shape[1:], seed=3, dtype=dtype),
        "coef": normal(batch, seed=4),
    }
    tensors["output"].requires_grad_()
    return tensors


def step(output, target, sample, doubled, coef):
    """All four ops and the loss's gradient."""
    state, model_input = guided_step(sample, doubled, coef, coef, guidance_scale=coef, strict=True)
    chord = window_chord(sample, state, coef.abs(), -coef.abs() - 1, input_dtype=doubled.dtype, strict=True)
    result = aligned_v_loss(
        output,
        target,
        direction_weight=coef,
        sample=chord[0],
        sample_coef=coef,
        output_coef=coef,
        weight=coef,
        strict=True,
    )
    grad = torch.autograd.grad(result.loss * 2, output)[0]
    return *result, grad, state, model_input, *chord, cfg_combine(doubled, coef, rescale=coef, strict=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_replay_of_a_captured_step_equals_the_eager_one(shape, dtype):
    static = operands(shape, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(**static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(**static)
    for seed in range(3):
        with torch.no_grad():
            for number, tensor in enumerate(static.values()):
                tensor.copy_(normal(*tensor.shape, seed=10 * seed + number))
        graph.replay()
        for one, two in zip(captured, step(**static), strict=True):
            assert torch.equal(one, two)


def test_static_buffers_of_a_captured_loop():
    state, model_input, coef = normal(2, 4, 64, 64), normal(4, 4, 64, 64, dtype=torch.bfloat16), normal(2, seed=1)
    layer = torch.nn.Conv2d(4, 4, 3, padding=1, device="cuda", dtype=torch.bfloat16)

    @torch.no_grad()
    def loop(state, model_input):
        for _ in range(4):
            guided_step(state, layer(model_input), coef, coef, guidance_scale=coef, out=state, input_out=model_input)

    eager = state.clone(), model_input.clone()
    loop(*eager)
    warm = state.clone(), model_input.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loop(*warm)
    torch.cuda.current_stream().wait_stream(stream)
    static = state.clone(), model_input.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop(*static)
    static[0].copy_(state)
    static[1].copy_(model_input)
    graph.replay()
    assert torch.equal(static[0], eager[0]) and torch.equal(static[1], eager[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_waits_for_the_device(shape):
    static = operands(shape, torch.bfloat16)
    step(**static)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(**static)
        aligned_v_loss(static["output"], static["target"], direction_weight=1.0, weight=0.5).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def optimizer_operands(size, eight, seed=0):
    """Operands of an optimizer's pass with everything that changes from step to step on the device."""
    param, grad, first, average = (normal(size, seed=seed + n) for n in range(4))
    held = {"param": param, "grad": grad.bfloat16(), "average": average, "copy": torch.zeros(size, dtype=torch.bfloat16, device="cuda")}
    second = first.square()
    if eight:
        for order, moment in ((1, first), (2, second)):
            qmap = reference.dynamic_map(order == 1).cuda()
            held |= dict(zip((f"state{order}", f"absmax{order}"), reference.quantize(moment, qmap))) | {f"qmap{order}": qmap}
    else:
        held |= {"exp_avg": first, "exp_avg_sq": second}
    values = {"learning_rate": 1e-3, "step": 1.0, "decay": 0.9, "grad_scale": 0.5}
    return held, {name: torch.full((), value, device="cuda") for name, value in values.items()}


@pytest.mark.parametrize("size", [4096, 100_001])
@pytest.mark.parametrize("eight", [False, True])
def test_a_captured_optimizer_step_reads_its_scalars_anew(size, eight):
    op = fused_adamw8bit if eight else fused_adamw
    settings = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "strict": True}
    held, scalars = optimizer_operands(size, eight)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        op(**held, **scalars, **settings)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op(**held, **scalars, **settings)
    fresh, now = optimizer_operands(size, eight, seed=7)
    for name, tensor in held.items():
        tensor.copy_(fresh[name])
    for step in (1, 2, 3):
        for name, value in {"learning_rate": 1e-3 / step, "step": step, "decay": 1 - 0.1 / step, "grad_scale": 0.5 * step}.items():
            scalars[name].fill_(value), now[name].fill_(value)
        graph.replay()
        torch.cuda.set_sync_debug_mode("error")
        try:
            op(**fresh, **now, **settings)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(held[name], fresh[name]) for name in held)


def test_launch_counts(monkeypatch):
    from torch.profiler import ProfilerActivity, profile

    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # poisoning launches kernels
    static = operands((4, 4, 64, 64), torch.bfloat16)
    step(**static)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        guided_step(static["sample"], static["doubled"], static["coef"], static["coef"], guidance_scale=static["coef"])
        loss = aligned_v_loss(static["output"], static["target"], direction_weight=static["coef"]).loss
        torch.autograd.grad(loss, static["output"], torch.ones_like(loss))
        torch.cuda.synchronize()
    names = [event.name for event in trace.events() if "kernel" in event.name]
    wanted = ["_step_kernel", "_sums_kernel", "_finish_kernel", "_gradient_kernel"]
    assert [name for name in names if any(part in name for part in wanted)] == wanted
    assert len(names) <= len(wanted) + 1  # and the fill of the upstream gradient


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_tensors_device():
    static = {name: tensor.detach().to("cuda:1") for name, tensor in operands((2, 4, 64, 64), torch.bfloat16).items()}
    static["output"].requires_grad_()
    assert torch.cuda.current_device() == 0
    there = step(**static)
    with torch.cuda.device(1):
        here = step(**static)
    assert all(torch.equal(one, two) and one.device.index == 1 for one, two in zip(there, here, strict=True))
