"""Every network switch computes what the plain network computes, keeps its weights' names, and says where it cannot run."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import tiny_pipelines
from reflow.errors import UserError
from reflow.models import Conditioning, denoise, switches
from reflow.models.lora import STUDENT, Adapters, Student, View
from reflow.models.switches import prepare
from reflow.recipes import reading
from reflow.recipes.sections import Model


def network(kind="sdxl"):
    torch.manual_seed(0)
    return getattr(tiny_pipelines, f"{kind}_unet")()


def inputs(kind="sdxl", batch=2):
    g = torch.Generator().manual_seed(1)
    sample, hidden = torch.randn(batch, 4, 8, 8, generator=g), torch.randn(batch, 5, 80 if kind == "sdxl" else 32, generator=g)
    pooled = (torch.randn(batch, 40, generator=g), torch.full((batch, 6), 64.0)) if kind == "sdxl" else (None, None)
    return sample, torch.tensor([999.0, 20.0])[:batch], Conditioning(hidden, *pooled)


def run(unet, kind="sdxl"):
    """Output, and the gradient of every weight."""
    sample, t, c = inputs(kind)
    output = denoise(unet, sample, t, c)
    output.square().mean().backward()
    return output.detach(), {name: p.grad for name, p in unet.named_parameters()}


def same(a, b, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(a[0], b[0], rtol=rtol, atol=atol)
    assert a[1].keys() == b[1].keys() and all(g is not None for g in a[1].values())
    # Some gradients vanish by symmetry (a bias before a softmax), so each is measured by the largest of all.
    largest = max(float(g.abs().max()) for g in a[1].values())
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], rtol=10 * rtol, atol=atol * largest, msg=name)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_checkpointed_backward_is_the_plain_one(kind):
    plain = run(network(kind).train(), kind)
    unet = prepare(network(kind).train(), Model(gradient_checkpointing=True), trains=True)
    assert unet.is_gradient_checkpointing
    again = run(unet, kind)
    torch.testing.assert_close(plain[0], again[0], rtol=1e-5, atol=1e-5)
    largest = max(float(g.abs().max()) for g in plain[1].values())
    for name, g in plain[1].items():
        torch.testing.assert_close(again[1][name], g, rtol=1e-4, atol=1e-5 * largest, msg=name)
    assert not prepare(network(kind), Model(gradient_checkpointing=True), trains=False).is_gradient_checkpointing


@pytest.mark.parametrize("settings", [
    {"attention": "sdpa"}, {"attention": "flash"}, {"attention": "flash", "gradient_checkpointing": True},
    {"channels_last": True}, {"channels_last": True, "gradient_checkpointing": True},
])  # fmt: skip
def test_output_and_gradients_are_those_of_the_plain_network(settings):
    plain = run(network())
    unet = prepare(network(), Model(**settings), trains=True)
    same(plain, run(unet))
    assert unet.state_dict().keys() == network().state_dict().keys()


def test_the_pinned_kernel_is_the_one_that_runs(monkeypatch):
    from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

    seen, stock = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *a, **k: (seen.append(_cur_sdpa_kernel_backends()), stock(*a, **k))[1])  # fmt: skip
    run(prepare(network(), Model(attention="flash", gradient_checkpointing=True), trains=True))
    assert seen and all(kernels == [SDPBackend.FLASH_ATTENTION] for kernels in seen)


@pytest.mark.parametrize("checkpointing, attention", [(True, "flash"), pytest.param(False, "auto", marks=pytest.mark.slow)])
def test_compiled_blocks_compute_the_same_under_the_same_names(checkpointing, attention):
    torch._dynamo.reset()
    plain = run(network())
    settings = Model(compile=True, gradient_checkpointing=checkpointing, attention=attention)
    unet = prepare(network(), settings, trains=True, backend="aot_eager")
    blocks = [m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert blocks and all(m._compiled_call_impl is not None for m in blocks)
    assert list(unet.state_dict()) == list(network().state_dict())
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    same(plain, run(unet))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    with torch.no_grad():
        sample, t, c = inputs()
        torch.testing.assert_close(denoise(unet.eval(), sample, t, c), plain[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_lora_compiles_and_checkpoints_with_its_adapter_on_and_off():
    torch._dynamo.reset()

    def build(settings):
        adapters = Adapters(network(), 2, ["to_q", "to_v"])
        for name, tensor in adapters.get(STUDENT).items():
            with torch.no_grad():
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
        prepare(adapters.unet, settings, trains=True, backend="aot_eager")
        student = Student(adapters)
        return View(adapters), student, run(student)

    root, _, plain = build(Model())
    compiled_root, student, compiled = build(Model(compile=True, gradient_checkpointing=True, channels_last=True))
    same(plain, compiled, rtol=1e-4, atol=2e-5)
    with torch.no_grad():
        sample, t, c = inputs()
        want = denoise(root, sample, t, c)
        torch.testing.assert_close(denoise(compiled_root, sample, t, c), want, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(want, plain[0], atol=1e-3) and list(student.state_dict())


@pytest.mark.slow
def test_inductor_compiles_training_on_this_machine():
    torch._dynamo.reset()
    settings = Model(compile=True, gradient_checkpointing=True, channels_last=True)
    same(run(network()), run(prepare(network(), settings, trains=True)), rtol=1e-4, atol=1e-5)


def test_what_cannot_run_is_refused_with_its_reason(monkeypatch):
    with pytest.raises(UserError, match="model.attention = 'cudnn' cannot run here, on cpu in float32 with heads of"):
        prepare(network(), Model(attention="cudnn"), trains=True)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(UserError, match="needs the package xformers"):
        prepare(network(), Model(attention="xformers"), trains=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs a C.. compiler"):
        prepare(network(), Model(compile=True), trains=False)


def test_compilation_and_partitioned_weights_are_refused_together():
    with pytest.raises(UserError, match="model.compile = true cannot be used with train.zero_stage = 3"):
        reading.load("digits", ["model.compile=true", "train.zero_stage=3"])
    assert reading.load("digits", ["model.compile=true", "train.zero_stage=2"]).model.compile


def test_the_defaults_touch_nothing():
    unet = network()
    processors = {name: type(p) for name, p in unet.attn_processors.items()}
    prepare(unet, Model(), trains=True)
    assert {name: type(p) for name, p in unet.attn_processors.items()} == processors
    assert not unet.is_gradient_checkpointing and not unet._forward_hooks and not unet._forward_pre_hooks
    assert all(m._compiled_call_impl is None for m in unet.modules())


def test_frozen_weights_are_stored_channels_last_and_the_output_is_not():
    unet = prepare(network().requires_grad_(False), Model(channels_last=True), trains=False)
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not unet.conv_in.weight.is_contiguous()
    sample, t, c = inputs()
    assert denoise(unet, sample, t, c).is_contiguous()
    assert prepare(network(), Model(channels_last=True), trains=True).conv_in.weight.is_contiguous()
    assert switches.head_sizes(unet) == [8, 12]
