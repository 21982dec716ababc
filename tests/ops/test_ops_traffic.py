"""Bytes moved, counted from the loads and stores of an interpreter run, against the table in kernels/README.md."""

import re
from pathlib import Path

import pytest
import torch

import op_cases as cases
from reflow_kernels import aligned_v_loss, cfg_combine, fused_adamw, fused_adamw8bit, guided_step, launch, reference, window_chord

README = Path(__file__).resolve().parents[2] / "kernels" / "README.md"
BESIDE = 0.08  # per-sample values and partial sums, as a share of the tensors' bytes

pytestmark = pytest.mark.skipif(not cases.INTERPRETED, reason="counts accesses of the interpreter")


def stated(call):
    """(launches, {tensor: passes}) of a row of the README's table."""
    row = re.search(rf"^\| {re.escape(call)} \| (\d+) \| (.+) \|$", README.read_text(), re.MULTILINE)
    return int(row[1]), {name: int(count) for name, count in re.findall(r"(\w+) (\d+)", row[2])}


class Meter:
    """Bytes read and written at every address range, and launches."""

    def __init__(self, monkeypatch):
        from triton.runtime import interpreter

        self.accesses, self.launches = [], 0
        builder = interpreter.interpreter_builder
        for name in ("create_masked_load", "create_masked_store"):
            monkeypatch.setattr(builder, name, self._watch(getattr(builder, name), "load" in name))
        start = launch.start

        def counted(*args, **constants):
            self.launches += 1
            start(*args, **constants)

        monkeypatch.setattr(launch, "start", counted)

    def _watch(self, access, is_load):
        def watched(pointers, *rest):
            mask = rest[0] if is_load else rest[1]
            size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
            addresses = pointers.data[mask.data.astype(bool)].ravel()
            self.accesses.append((addresses, size))
            return access(pointers, *rest)

        return watched

    def bytes_of(self, tensor):
        begin = tensor.data_ptr()
        end = begin + tensor.numel() * tensor.element_size()
        return sum(int(((at >= begin) & (at < end)).sum()) * size for at, size in self.accesses)

    def total(self):
        return sum(len(at) * size for at, size in self.accesses)


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def check(meter, call, tensors):
    launches, passes = stated(call)
    assert meter.launches == launches
    assert set(tensors) == set(passes), f"the README's row names other tensors than {sorted(tensors)}"
    allowed = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        assert meter.bytes_of(tensor) == passes[name] * size, name
        allowed += passes[name] * size
    beside = meter.total() - allowed
    assert beside <= BESIDE * allowed, f"{beside} bytes beside {allowed}"


@pytest.mark.parametrize("size", [16384, 65536, 20000])
def test_loss(monkeypatch, size):
    output, target, sample = (normal(1, size, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float32))
    output.requires_grad_()
    ones = torch.ones(1)
    meter = Meter(monkeypatch)
    loss = aligned_v_loss(
        output,
        target,
        direction_weight=ones,
        sample=sample,
        sample_coef=ones,
        output_coef=ones,
        weight=ones,
        backend="triton",
    ).loss
    tensors = {"model_output": output, "target": target, "sample": sample}
    check(meter, "aligned_v_loss, forward", tensors)
    meter.accesses.clear()
    meter.launches = 0
    grad = torch.autograd.grad(loss, output)[0]
    check(meter, "aligned_v_loss, backward", tensors | {"grad": grad})


def test_loss_of_many_samples(monkeypatch):
    """Beyond what one program finishes the partial losses cost a launch; the operands are still read once."""
    output, target = normal(160, 2048, dtype=torch.bfloat16), normal(160, 2048)
    meter = Meter(monkeypatch)
    aligned_v_loss(output, target, direction_weight=torch.ones(160), backend="triton")
    check(meter, "aligned_v_loss, forward of many samples", {"model_output": output, "target": target})


@pytest.mark.parametrize("guided", [False, True])
def test_step(monkeypatch, guided):
    state, output = normal(1, 16384), normal(2 if guided else 1, 16384, dtype=torch.bfloat16)
    ones = torch.ones(1)
    meter = Meter(monkeypatch)
    result = guided_step(state, output, ones, ones, guidance_scale=ones if guided else None, backend="triton")
    check(meter, "guided_step", {"state": state, "model_output": output, "out": result[0], "input_out": result[1]})


@pytest.mark.parametrize("points", [1, 3])
def test_chord(monkeypatch, points):
    start, end = normal(1, 16384), normal(1, 16384)
    meter = Meter(monkeypatch)
    z_t, velocity, model_input = window_chord(
        start, end, torch.rand(points, 1), -torch.ones(1), input_dtype=torch.bfloat16, backend="triton"
    )
    tensors = {"z_start": start, "z_end": end, "z_t": z_t, "velocity": velocity, "model_input": model_input}
    check(meter, "window_chord", tensors)


CASES = {
    "cfg_combine": (0.0, 16384),
    "cfg_combine with rescale, N <= 16384": (0.7, 16384),
    "cfg_combine with rescale, N > 16384": (0.7, 65536),
}


@pytest.mark.parametrize("call", CASES)
def test_guidance(monkeypatch, call):
    rescale, size = CASES[call]
    output = normal(2, size, dtype=torch.bfloat16)
    meter = Meter(monkeypatch)
    guided = cfg_combine(output, torch.ones(1), rescale=torch.ones(1) * rescale if rescale else 0.0, backend="triton")
    check(meter, call, {"model_output": output, "guided": guided})


STEP = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("size", [4096, 3001])
@pytest.mark.parametrize("eight", [False, True])
def test_optimizer(monkeypatch, eight, size):
    named = {"param": normal(size), "grad": normal(size, dtype=torch.bfloat16)}
    rest = {"average": normal(size), "copy": normal(size, dtype=torch.bfloat16)}
    scalars = STEP | {"step": torch.tensor(2.0), "decay": torch.tensor(0.99), "grad_scale": torch.tensor(0.5)}
    maps = {}
    if eight:
        maps = {"qmap1": reference.dynamic_map(True), "qmap2": reference.dynamic_map(False)}
        first, second = (reference.quantize(m, q) for m, q in zip((normal(size), normal(size).square()), maps.values()))
        named |= {"state1": first[0], "state2": second[0], "absmax1": first[1], "absmax2": second[1]}
    else:
        named |= {"exp_avg": normal(size), "exp_avg_sq": normal(size).square()}
    meter = Meter(monkeypatch)
    (fused_adamw8bit if eight else fused_adamw)(**named, **maps, **rest, **scalars, backend="triton")
    # The maps, of 1 KB each, stay in the cache: eleven entries for every value of whole programs.
    block = 1024 if size % 16 == 0 else 512
    tables = sum(meter.bytes_of(qmap) for qmap in maps.values())
    assert tables == (2 * 4 * 11 * block * -(-size // block) if eight else 0)
    total = meter.total()
    meter.total = lambda: total - tables
    check(meter, "fused_adamw8bit" if eight else "fused_adamw", named | rest)


def test_a_redundant_read_is_seen(monkeypatch):
    """The meter itself: reading an operand twice is more than the table allows."""
    state = normal(1, 1024)
    meter = Meter(monkeypatch)
    guided_step(state, state, 1.0, 1.0, backend="triton")  # one tensor in two roles
    assert meter.bytes_of(state) == 2 * state.numel() * 4
