"""Calls that start their kernels without torch.library's dispatcher: the same results, and only where nothing wants to see the op."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import op_cases as cases
from reflow_kernels import aligned_v_loss, cfg_combine, dispatch, guided_step, plans, window_chord

pytestmark = pytest.mark.skipif(not cases.INTERPRETED and not torch.cuda.is_available(), reason="needs Triton")
COEF = (0.5, -2.0)


def calls(device, backend):
    """(name, a function of nothing that returns tensors), every op in each of its forms, on new tensors of equal values."""
    def normal(*shape, seed=0, dtype=torch.float32):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)

    coef = torch.tensor(COEF, device=device)
    state, end, doubled = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1), normal(4, 3, 4, 5, seed=2, dtype=torch.bfloat16)

    def loss(grad):
        output = normal(2, 3, 4, 5, seed=3).requires_grad_(grad)
        result = aligned_v_loss(output, end, direction_weight=0.3, sample=state, sample_coef=coef, output_coef=coef, backend=backend)
        return (*result, *(torch.autograd.grad(2 * result.loss, output) if grad else ()))

    def into():
        out = torch.zeros_like(state)
        before = out._version
        results = guided_step(state, doubled, coef, 0.5, guidance_scale=7.5, out=out, backend=backend)
        assert results[0] is out and out._version > before
        return results

    yield "loss", lambda: loss(False)
    yield "loss with gradient", lambda: loss(True)
    yield "step", lambda: guided_step(state, doubled, coef, coef, guidance_scale=coef, backend=backend)
    yield "step into buffers", into
    yield "chord", lambda: window_chord(state, end, coef.abs(), -0.25, input_dtype=torch.float16, backend=backend)
    yield "guidance", lambda: (cfg_combine(doubled, coef, rescale=0.7, backend=backend),)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_results_are_those_of_the_dispatcher(device, monkeypatch, backend):
    taken = []
    plain = dispatch.runs_directly
    monkeypatch.setattr(dispatch, "runs_directly", lambda *a: taken.append(plain(*a)) or taken[-1])
    direct = {name: call() for name, call in calls(device, backend)}
    assert len(taken) == 6 and all(taken) == (backend == "triton" or device.type == "cpu")
    monkeypatch.setattr(dispatch, "runs_directly", lambda *a: False)
    plans.forget()
    for name, call in calls(device, backend):
        for one, two in zip(direct[name], call(), strict=True):
            assert torch.equal(one, two) and one.stride() == two.stride() and one.requires_grad == two.requires_grad, name


def test_modes_transforms_and_subclasses_see_the_op(device):
    tensor = torch.ones(2, 3, device=device)
    assert dispatch.runs_directly("window_chord", "triton", False, tensor, tensor)
    assert dispatch.runs_directly("window_chord", "torch", False, tensor, tensor) == (device.type == "cpu")
    with FakeTensorMode() as mode:
        assert not dispatch.runs_directly("window_chord", "triton", False, tensor)
    assert not dispatch.runs_directly("window_chord", "triton", False, tensor, mode.from_tensor(tensor))
    seen = []
    torch.func.vmap(lambda x: seen.append(dispatch.runs_directly("window_chord", "triton", False, x)) or x)(tensor)
    assert seen == [False]
    graph = make_fx(lambda a, b: window_chord(a, b, 0.5, -0.25, backend="triton")[0])(tensor, tensor * 2)
    assert any("window_chord" in str(node.target) for node in graph.graph.nodes)


def test_a_second_derivative_is_refused(device):
    output = torch.ones(2, 3, device=device, requires_grad=True)
    result = aligned_v_loss(output * 2, torch.zeros(2, 3, device=device), direction_weight=1.0, backend="triton")
    (gradient,) = torch.autograd.grad(result.loss, output, create_graph=True)
    with pytest.raises(RuntimeError, match="aligned_v_loss_backward"):
        gradient.sum().backward()
