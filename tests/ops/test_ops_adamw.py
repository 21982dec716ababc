"""One pass of AdamW with scale, average and copy, in fp32 and with 8-bit states: against fp64, torch's own, and what it refuses."""

import dataclasses
import re

import pytest
import torch
from hypothesis import strategies as st

import op_cases as cases
from reflow_kernels import dispatch, fused_adamw, fused_adamw8bit, reference

SIZES = (0, 1, 63, 255, 256, 257, 1000, 1024, 1025, 2048, 4099)
SETTINGS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


@dataclasses.dataclass(frozen=True)
class Case:
    size: int
    grad: torch.dtype
    copy: torch.dtype | None
    average: bool
    scaled: bool
    on_device: bool
    offset: int  # elements from the start of a buffer
    step: int
    beta1: float
    scale: float
    seed: int

    def tensors(self, device):
        """New param, grad, moments, average and copy, and the call's keywords."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(dtype=torch.float32, scale=1.0):
            values = torch.randn(self.size + self.offset, generator=generator, dtype=torch.float64) * scale
            return values.to(device, dtype)[self.offset:]

        param, grad, first, second = normal(), normal(self.grad, self.scale), normal(scale=0.1 * self.scale), normal(scale=0.1 * self.scale).square()

        def one(value, dtype=torch.float64):
            return torch.tensor(value, dtype=dtype, device=device) if self.on_device else value

        rest = SETTINGS | {"beta1": self.beta1, "learning_rate": one(3e-3), "step": one(self.step, torch.int64), "decay": one(0.98)}
        rest["average"] = normal() if self.average else None
        rest["copy"] = normal(self.copy) if self.copy else None
        rest["grad_scale"] = torch.tensor(0.3, device=device) if self.scaled else None
        return [param, grad, first, second], rest


@st.composite
def built(draw, sizes=SIZES):
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    return Case(pick(*sizes), pick(*cases.DTYPES), pick(None, *cases.DTYPES), pick(True, False), pick(True, False), pick(True, False), pick(0, 0, 1),
                pick(1, 2, 7, 1000, 10**6), pick(0.9, 0.5, 0.0), pick(1.0, 1e-3, 1e-12), draw(st.integers(0, 2**31)))


def double(tensors, rest):
    """The same call in fp64, of tensors that are this one's own."""
    wide = [t.double().clone() for t in tensors]
    return wide, {k: v.double().clone() if isinstance(v, torch.Tensor) and k != "step" else v for k, v in rest.items()}


# Sizes at and beside a program's block, and one that starts at no multiple of 16 bytes.
ALWAYS = [Case(size, torch.bfloat16, torch.bfloat16, True, True, on, offset, 3, 0.9, 1.0, 5) for size, on, offset in (
    (0, False, 0), (1, True, 0), (1024, False, 0), (2048, True, 1), (1025, False, 0))]


@cases.for_all(built(), examples=14, always=ALWAYS)
def test_a_step_is_as_exact_as_plain_pytorch(case, device, backend):
    (tensors, rest), (plain, same) = case.tensors(device), case.tensors(device)
    exact, wide = double(tensors, rest)
    assert fused_adamw(*tensors, **rest, backend=backend) is None
    reference.fused_adamw(*plain, **same)
    reference.fused_adamw(*exact, **wide)
    assert torch.equal(tensors[1], case.tensors(device)[0][1])  # the gradient is read
    for name, mine, theirs, truth in zip(("param", "grad", "exp_avg", "exp_avg_sq"), tensors, plain, exact):
        if name != "grad":
            cases.assert_no_worse(name, mine, theirs, truth)
    for name in ("average", "copy"):
        if rest[name] is not None:
            cases.assert_no_worse(name, rest[name], same[name], wide[name])


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_steps_are_torchs_own(device, backend):
    """Thirty steps beside torch.optim.AdamW, with step and rate from the host and from the device."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1500, generator=generator).to(device)
    leaf = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([leaf], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    held = [[start.clone(), torch.zeros_like(start), torch.zeros_like(start)] for _ in range(2)]
    settings = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "backend": backend}
    for step in range(1, 31):
        leaf.grad = torch.randn(1500, generator=generator).to(device)
        optimizer.step()
        for on_device, (param, first, second) in zip((False, True), held):
            rate, number = 1e-2, step
            if on_device:
                rate, number = torch.tensor(1e-2, device=device), torch.tensor(float(step), device=device)
            fused_adamw(param, leaf.grad, first, second, learning_rate=rate, step=number, **settings)
    state = optimizer.state[leaf]
    for param, first, second in held:
        for mine, theirs in ((param, leaf), (first, state["exp_avg"]), (second, state["exp_avg_sq"])):
            torch.testing.assert_close(mine, theirs.detach(), rtol=2e-6, atol=1e-6)


def states(case, device, first, second):
    """8-bit states of given moments, at the case's offset from the start of their buffers."""
    maps = [reference.dynamic_map(signed).to(device) for signed in (True, False)]
    packed = [reference.quantize(moment, qmap) for moment, qmap in zip((first, second), maps)]

    def placed(values):
        buffer = torch.zeros(values.numel() + case.offset, dtype=values.dtype, device=device)
        return buffer[case.offset:].copy_(values)

    return [placed(codes) for codes, _ in packed] + [placed(scales) for _, scales in packed] + maps


@cases.for_all(built(), examples=10, always=ALWAYS)
def test_an_8_bit_step_is_the_references_and_its_codes_are_nearest(case, device, backend):
    (tensors, rest), (plain, same) = case.tensors(device), case.tensors(device)
    mine, theirs = states(case, device, *tensors[2:]), states(case, device, *plain[2:])
    moments = [reference.quantize(t, q) for t, q in zip(tensors[2:], mine[4:])]
    exact, wide = double(tensors, rest)
    exact[2:] = [(q[codes.long()] * scales.repeat_interleave(256)[: case.size]).double() for (codes, scales), q in zip(moments, mine[4:])]
    fused_adamw8bit(*tensors[:2], *mine, **rest, backend=backend)
    reference.fused_adamw8bit(*plain[:2], *theirs, **same)
    reference.fused_adamw(*exact, **wide)
    cases.assert_no_worse("param", tensors[0], plain[0], exact[0])
    for name in ("average", "copy"):
        if rest[name] is not None:
            cases.assert_no_worse(name, rest[name], same[name], wide[name])
    for order in (0, 1):
        codes, scales, qmap, truth = mine[order], mine[2 + order], mine[4 + order], exact[2 + order]
        torch.testing.assert_close(scales, theirs[2 + order], rtol=1e-6, atol=0)
        blocks = torch.nn.functional.pad(truth, (0, -case.size % 256)).view(-1, 256).abs().amax(1) if case.size else truth
        torch.testing.assert_close(scales.double(), blocks, rtol=1e-5, atol=0)
        # Nearest: no other entry of the map is nearer than rounding makes of it.
        share = truth / blocks.clamp(min=1e-300).repeat_interleave(256)[: case.size]
        best = (share.unsqueeze(1) - qmap.double()).abs().min(1).values if case.size else share
        found = (share - qmap.double()[codes.long()]).abs()
        assert bool((found <= best + 2e-6).all())


def test_a_block_of_zeros_stays_zero_and_the_next_is_its_own(device):
    case = Case(600, torch.float32, None, False, False, False, 0, 1, 0.9, 1.0, 0)
    for backend in cases.BACKENDS:
        tensors, rest = case.tensors(device)
        tensors[1][:256], tensors[2][:], tensors[3][:] = 0, 0, 0
        before, held = tensors[0].clone(), states(case, device, *tensors[2:])
        rest["weight_decay"] = 0.0
        fused_adamw8bit(*tensors[:2], *held, **rest, backend=backend)
        assert torch.equal(tensors[0][:256], before[:256]) and not (tensors[0][256:] == before[256:]).any()
        assert all(held[i][0] == 0 and held[i][1] > 0 for i in (2, 3))
        assert all((held[4 + i][held[i][:256].long()] == 0).all() for i in (0, 1))


def test_the_kernels_arguments_stand_as_they_are_given():
    """They are passed by position; one name out of place would be another number, and no error."""
    pytest.importorskip("triton")
    kernels = dispatch.triton_module("adamw")
    groups = (kernels.Moments._fields, ("average", "copy"), kernels.Scalars._fields, ("N",), kernels.Numbers._fields)
    expected = ("param", "grad", *(name for group in groups for name in group))
    assert tuple(kernels._adamw_kernel.arg_names[: len(expected)]) == expected


def plain_call(device, size=300):
    tensors, rest = Case(size, torch.float32, torch.bfloat16, True, True, False, 0, 2, 0.9, 1.0, 1).tensors(device)
    return dict(zip(("param", "grad", "exp_avg", "exp_avg_sq"), tensors)) | rest


def shared(call, one, other, by=0):
    """Two tensors of a call in one buffer, the second `by` elements on."""
    memory = torch.zeros(700, device=call["param"].device)
    call[one], call[other] = memory[:300], memory[by:by + 300]


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("change, kind, said", [
    (lambda c: c.update(param=c["param"].double()), TypeError, "param has dtype torch.float64; expected float32"),
    (lambda c: c.update(exp_avg=c["exp_avg"].bfloat16()), TypeError, "exp_avg has dtype torch.bfloat16"),
    (lambda c: c.update(grad=[1.0]), TypeError, "grad is a list; expected a tensor"),
    (lambda c: c.update(grad=c["grad"].view(2, 150)), ValueError, "grad has shape [2, 150]; expected [300], flat: pass grad.view(-1)"),
    (lambda c: c.update(exp_avg=c["exp_avg"][1:]), ValueError, "exp_avg has shape [299]; expected [300]"),
    (lambda c: c.update(grad=torch.zeros(600, device=c["param"].device)[::2]), ValueError, "grad has stride 2; expected 1"),
    (lambda c: c.update(average=c["average"].expand(300)[:1].expand(300)), ValueError, "average has stride 0; expected 1"),
    (lambda c: c.update(param=c["param"].requires_grad_()), ValueError, "param requires a gradient, but an optimizer's step has none"),
    (lambda c: c.update(average=c["param"]), ValueError, "share memory"),
    (lambda c: shared(c, "exp_avg", "exp_avg_sq", 299), ValueError, "exp_avg and exp_avg_sq share memory"),
    (lambda c: shared(c, "param", "grad"), ValueError, "share memory; give each a buffer of its own"),
    (lambda c: c.update(grad_scale=c["average"][7]), ValueError, "average and grad_scale share memory"),
    (lambda c: c.update(step=0), ValueError, "step is 0; expected the number of this step, from 1"),
    (lambda c: c.update(grad_scale=0.5), TypeError, "grad_scale is a float; expected None or a one-element tensor"),
    (lambda c: c.update(grad_scale=torch.ones(2, device=c["param"].device)), ValueError, "grad_scale has shape [2]; expected one element"),
    (lambda c: c.update(decay=torch.ones((), dtype=torch.bfloat16, device=c["param"].device)), TypeError, "decay has dtype torch.bfloat16"),
    (lambda c: c.update(learning_rate="fast"), TypeError, "learning_rate is a str; expected a number or a one-element tensor"),
])  # fmt: skip
def test_what_it_refuses(device, backend, change, kind, said):
    call = plain_call(device)
    change(call)
    before = {k: v.clone() for k, v in call.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(kind, match=re.escape(said)):
        fused_adamw(**call, backend=backend)
    assert all(torch.equal(v, call[k]) for k, v in before.items())


@pytest.mark.parametrize("change, said", [
    (lambda s: s.__setitem__(0, s[0].float()), "state1 has dtype torch.float32; expected uint8"),
    (lambda s: s.__setitem__(2, s[2][:1]), "absmax1 has shape [1]; expected [2]"),
    (lambda s: s.__setitem__(5, s[5][:16]), "qmap2 has shape [16]; expected [256]"),
    (lambda s: s.__setitem__(1, s[0]), "share memory"),
])  # fmt: skip
def test_what_the_8_bit_form_refuses(device, change, said):
    call = plain_call(device)
    held = states(Case(300, torch.float32, None, False, False, False, 0, 1, 0.9, 1.0, 0), device, call.pop("exp_avg"), call.pop("exp_avg_sq"))
    change(held)
    with pytest.raises((TypeError, ValueError), match=re.escape(said)):
        fused_adamw8bit(call.pop("param"), call.pop("grad"), *held, **call)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_opcheck_and_compile_without_a_break(backend, device):
    for on_device in (False, True):
        case = Case(300, torch.bfloat16, torch.bfloat16, True, True, on_device, 0, 2, 0.9, 1.0, 1)
        tensors, rest = case.tensors(device)
        scalars = [rest["grad_scale"], *(rest[k] if on_device else None for k in ("learning_rate", "step", "decay"))]
        settings = [3e-3, 2.0, 0.98, 0.9, 0.999, 1e-8, 0.1, backend, False]
        ops = torch.ops.reflow_kernels
        for average, copy in ((rest["average"], rest["copy"]), (None, None)):
            torch.library.opcheck(ops.fused_adamw.default, (*tensors, average, copy, *scalars, *settings))
            held = states(case, device, *tensors[2:])
            torch.library.opcheck(ops.fused_adamw8bit.default, (*tensors[:2], *held, average, copy, *scalars, *settings))
    eager, compiled = plain_call(device), plain_call(device)
    fused_adamw(**eager, backend=backend)
    torch._dynamo.reset()
    torch.compile(lambda: fused_adamw(**compiled, backend=backend), fullgraph=True, backend="aot_eager")()
    assert all(torch.equal(eager[k], compiled[k]) for k in ("param", "exp_avg", "exp_avg_sq", "average", "copy"))


@pytest.mark.skipif(not cases.INTERPRETED and not torch.cuda.is_available(), reason="needs Triton")
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_a_direct_call_gives_the_dispatchers_results(device, monkeypatch, backend):
    def results():
        call = plain_call(device)
        versions = {k: v._version for k, v in call.items() if isinstance(v, torch.Tensor)}
        fused_adamw(**call, backend=backend)
        moved = {k for k, v in versions.items() if call[k]._version > v}
        case = Case(300, torch.float32, None, False, False, False, 0, 1, 0.9, 1.0, 0)
        other = plain_call(device)
        held = states(case, device, other.pop("exp_avg"), other.pop("exp_avg_sq"))
        fused_adamw8bit(other.pop("param"), other.pop("grad"), *held, **other, backend=backend)
        return moved, [call[k] for k in ("param", "exp_avg", "exp_avg_sq", "average", "copy")] + held + [other["average"], other["copy"]]

    taken, plain = [], dispatch.runs_directly
    monkeypatch.setattr(dispatch, "runs_directly", lambda *a: taken.append(plain(*a)) or taken[-1])
    moved, direct = results()
    assert taken == [backend == "triton" or device.type == "cpu"] * 2
    monkeypatch.setattr(dispatch, "runs_directly", lambda *a: False)
    again, through = results()
    assert moved == again == {"param", "exp_avg", "exp_avg_sq", "average", "copy"}
    assert all(torch.equal(a, b) for a, b in zip(direct, through, strict=True))
