"""Plans: worked out once for calls that are alike, and for no others."""

import pytest
import torch

import op_cases as cases
from reflow_kernels import (
    adamw,
    aligned_v,
    aligned_v_loss,
    cfg_combine,
    chord,
    configure,
    dispatch,
    fused_adamw,
    fused_adamw8bit,
    guidance,
    guided_step,
    launch,
    plans,
    reference,
    window_chord,
)
from reflow_kernels import guided_step as step_function

pytestmark = pytest.mark.parametrize("backend", cases.BACKENDS)


def normal(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def calls(device, backend):
    """Op -> (module that makes its plans, a call)."""
    state, end, doubled = normal(2, 3, 4, device=device), normal(2, 3, 4, seed=1, device=device), normal(4, 3, 4, device=device)
    import sys

    return {
        "aligned_v_loss": (aligned_v, lambda: aligned_v_loss(state, end, direction_weight=0.3, backend=backend)),
        "guided_step": (sys.modules[step_function.__module__], lambda: guided_step(state, doubled, 0.5, 2.0, guidance_scale=3.0, backend=backend)),
        "window_chord": (chord, lambda: window_chord(state, end, 0.5, -0.25, backend=backend)),
        "cfg_combine": (guidance, lambda: (cfg_combine(doubled, 3.0, rescale=0.7, backend=backend),)),
    }


@pytest.mark.parametrize("op", ["aligned_v_loss", "guided_step", "window_chord", "cfg_combine"])
def test_the_second_call_is_not_checked_again_and_gives_the_same(backend, device, monkeypatch, op):
    module, call = calls(device, backend)[op]
    first = call()
    monkeypatch.setattr(module, "_plan", None)  # calling it would raise
    for one, two in zip(first, call(), strict=True):
        assert torch.equal(one, two) and one.data_ptr() != two.data_ptr()
    plans.forget()
    with pytest.raises(TypeError):
        call()


def changed(device):
    """What differs from a call with a state [2, 3, 4] in fp32 and floats: each must be worked out anew."""
    plain = normal(2, 3, 4, device=device)
    memory = normal(25, device=device)
    return {
        "dtype": (plain.double(), plain.double(), 0.5),
        "shape": (plain[:1], plain[:1], 0.5),
        "order": (plain.transpose(1, 2), plain.transpose(1, 2), 0.5),
        "dtype of another": (plain, plain.bfloat16(), 0.5),
        "alignment": (memory[1:].view(2, 3, 4), plain, 0.5),
        "a tensor for a float": (plain, plain, torch.full((2,), 0.5, device=device)),
    }


@pytest.mark.parametrize("what", changed("cpu"))
def test_what_changes_a_plan(backend, device, what):
    plain = normal(2, 3, 4, device=device)
    guided_step(plain, plain, 0.5, 2.0, backend=backend)
    before = len(plans._plans)
    state, output, coef = changed(device)[what]
    found, _ = guided_step(state, output, coef, 2.0, backend=backend)
    assert len(plans._plans) == before + 1
    torch.testing.assert_close(found, reference.guided_step(state, output, coef, 2.0)[0])


def test_settings_and_the_environment_change_a_plan(backend, device, monkeypatch):
    plain = normal(2, 3, 4, device=device)
    guided_step(plain, plain, 0.5, 2.0, backend=backend)
    monkeypatch.setenv(dispatch.ENVIRONMENT, "gpu")
    with pytest.raises(ValueError, match="REFLOW_KERNELS_BACKEND is 'gpu'"):
        guided_step(plain, plain, 0.5, 2.0, backend=backend)
    monkeypatch.delenv(dispatch.ENVIRONMENT)
    before = len(plans._plans)
    try:
        configure(strict=True)
        guided_step(plain, plain, 0.5, 2.0, backend=backend)
        assert len(plans._plans) == before + 1
    finally:
        configure(strict=False)
    guided_step(plain, plain, 0.5, 2.0, backend=backend)
    assert len(plans._plans) == before + 1


def test_values_are_not_part_of_a_plan(backend, device):
    doubled = normal(4, 3, 4, device=device)
    for scale in (1.0, 3.0, 7.5):
        uncond, cond = doubled.chunk(2)
        torch.testing.assert_close(cfg_combine(doubled, scale, backend=backend), torch.lerp(uncond, cond, scale))
    assert len(plans._plans) == 1


def test_faults_are_found_after_good_calls(backend, device):
    plain = normal(2, 3, 4, device=device)
    window_chord(plain, plain, 0.5, -0.25, backend=backend)
    with pytest.raises(ValueError, match="dt is 0.25"):
        window_chord(plain, plain, 0.5, 0.25, backend=backend)
    aligned_v_loss(plain, plain, direction_weight=1.0, backend=backend)
    with pytest.raises(ValueError, match="eps is 0"):
        aligned_v_loss(plain, plain, direction_weight=1.0, eps=0.0, backend=backend)
    with pytest.raises(ValueError, match="target requires a gradient"):
        aligned_v_loss(plain, plain.clone().requires_grad_(), direction_weight=1.0, backend=backend)
    with pytest.raises(TypeError, match="weight is a str"):
        aligned_v_loss(plain, plain, direction_weight=1.0, weight="1", backend=backend)


def test_buffers_that_overlap_are_refused_after_ones_that_do_not(backend, device):
    memory, output = torch.zeros(96, device=device), normal(2, 3, 4, device=device)
    state, apart, across = (memory[start : start + 24].view(2, 3, 4) for start in (0, 32, 8))
    for _ in range(2):
        guided_step(state, output, 0.5, 2.0, out=apart, backend=backend)
        with pytest.raises(ValueError, match="out overlaps state in part"):
            guided_step(state, output, 0.5, 2.0, out=across, backend=backend)


def test_plans_are_bounded(backend, device, monkeypatch):
    monkeypatch.setattr(plans, "KEPT", 3)
    for size in range(1, 9):
        cfg_combine(normal(2, size, device=device), 2.0, backend=backend)
        assert 1 <= len(plans._plans) <= 3


@pytest.mark.parametrize("bits", [32, 8])
def test_an_optimizers_step_is_checked_once_but_for_its_number_and_its_memory(backend, device, monkeypatch, bits):
    def tensors(seed):
        weights, gradient = normal(300, seed=seed, device=device), normal(300, seed=seed + 1, device=device)
        if bits == 32:
            return [weights, gradient, torch.zeros_like(weights), torch.zeros_like(weights)]
        maps = [reference.dynamic_map(signed).to(device) for signed in (True, False)]
        codes = [torch.full_like(weights, int(table.abs().argmin()), dtype=torch.uint8) for table in maps]
        return [weights, gradient, *codes, *(torch.zeros(2, device=device) for _ in range(2)), *maps]

    def step(given, number=1, **more):
        rest = dict(learning_rate=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, step=number, backend=backend)
        (fused_adamw if bits == 32 else fused_adamw8bit)(*given, **rest, **more)

    first, second = tensors(0), tensors(0)
    for number in (1, 2):
        step(first, number)
    step(second)
    monkeypatch.setattr(adamw, "_plan", None)  # calling it would raise
    version = second[0]._version
    step(second, 2)
    assert second[0]._version > version and all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    with pytest.raises(ValueError, match="step is 0; expected the number of this step, from 1"):
        step(second, 0)
    with pytest.raises(ValueError, match="param and grad share memory"):
        step([second[0], second[0], *second[2:]])
    with pytest.raises(TypeError):  # another signature is worked out anew
        step(second, copy=torch.empty(300, device=device))


class Handle:
    """What the JIT gives: a runner by grid, and what the runner calls."""

    def __init__(self, started):
        self.started, self.function, self.packed_metadata = started, "function", "packed"

    def __getitem__(self, grid):
        return lambda *arguments: self.started.append(("runner", grid, arguments))

    def run(self, *given):
        self.started.append(("launcher", given[:3], given[3:9], given[9:]))


def launched(started):
    """A launch whose kernel notes down how it is started."""

    class Kernel:
        arg_names = ("pointer", "N", "ACC", "BLOCK")

        def __getitem__(self, grid):
            def first(*arguments, **constants):
                started.append(("jit", grid, arguments, constants))
                return Handle(started)

            return first

    return launch.Launch(Kernel(), 5, 4, (16,), BLOCK=128, ACC="float")


class Driver:
    def get_current_device(self):
        return 3

    def get_current_stream(self, device):
        return ("stream of device", device)


@pytest.mark.parametrize("known", [True, False], ids=["a Triton that was read", "another"])
def test_a_compiled_kernel_is_kept_and_started_without_the_jit(backend, device, monkeypatch, known):
    """The JIT gives a handle; later launches of the same plan take it, with constants behind the numbers as the JIT orders them: its launcher
    where nobody set a hook, its runner where somebody did, and always where the version may call its launcher another way."""
    triton = pytest.importorskip("triton")
    from triton.runtime import driver

    monkeypatch.setattr(launch, "_KNOWN", known)
    monkeypatch.setattr(driver, "_active", Driver())
    started, pointer = [], torch.zeros(1, device=device)
    one = launched(started)
    launch.start(one, pointer)
    assert started == [("jit", (5,), (pointer, 16), {"num_warps": 4, "enable_fp_fusion": False, "BLOCK": 128, "ACC": "float"})]
    launch.start(one, pointer)
    arguments, runner = (pointer, 16, "float", 128), ("runner", (5, 1, 1), (pointer, 16, "float", 128))
    launcher = ("launcher", (5, 1, 1), (("stream of device", 3), "function", "packed", None, None, None), arguments)
    assert started[1:] == [launcher if known else runner]
    for hook in ("launch_enter_hook", "launch_exit_hook"):
        chain = triton.knobs.HookChain()
        chain.add(lambda metadata: None)
        with monkeypatch.context() as patch:
            patch.setattr(triton.knobs.runtime, hook, chain)
            launch.start(one, pointer)
        assert started[-1] == runner
