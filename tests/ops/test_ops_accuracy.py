"""Every op in every dtype, shape, layout and magnitude is no worse than twice plain PyTorch, against fp64."""

import dataclasses

import pytest
import torch
from hypothesis import strategies as st

import op_cases as cases
import reflow_kernels
from op_cases import assert_no_worse, double
from reflow_kernels import reference

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's fp16 stores


def test_allocations_are_poisoned(device):
    assert torch.empty(3, device=device).isnan().all()
    assert torch.empty_strided((2, 2), (1, 2), device=device).isnan().all()
    assert torch.ones(1, device=device).new_empty(3).isnan().all()


@dataclasses.dataclass(frozen=True)
class LossCase:
    output: cases.Operand
    target: cases.Operand
    sample: cases.Operand | None
    relation: str
    coefficients: dict

    def build(self, device):
        output, target = self.output.build(device), self.target.build(device)
        if self.relation == "near":
            target = (output.double() * (1 + 1e-3 * target.double() / self.target.scale)).to(target.dtype)
        elif self.relation in ("equal", "opposite"):
            target = (output.double() * (1 if self.relation == "equal" else -1)).to(target.dtype)
        elif self.relation == "zero_output":
            output = torch.zeros_like(output)
        elif self.relation == "zero_target":
            target = torch.zeros_like(target)
        arguments = {name: value.build(device) for name, value in self.coefficients.items()}
        if self.sample is not None:
            arguments["sample"] = self.sample.build(device)
        return output, target, arguments


@st.composite
def losses(draw):
    shape = (draw(cases.batches), *draw(cases.shapes))
    dtype = draw(st.sampled_from(cases.DTYPES))
    other = draw(st.sampled_from((dtype, cases.wide(dtype))))
    coefficients = {"direction_weight": draw(cases.coefficient(shape[0], cases.wide(dtype), (0.0, 1.0, 0.3, 50.0)))}
    sample = None
    if draw(st.booleans()):
        coefficients["weight"] = draw(cases.coefficient(shape[0], cases.wide(dtype), (0.0, 1.0, 0.3, 20.0)))
    if draw(st.booleans()):
        sample = draw(cases.operand(shape, cases.wide(dtype), 1.0))
        coefficients["sample_coef"] = draw(cases.coefficient(shape[0], cases.wide(dtype), (0.0, 1.0, -0.3, 2.5)))
        coefficients["output_coef"] = draw(cases.coefficient(shape[0], cases.wide(dtype), (1.0, -0.3, -2.5)))
    relation = draw(st.sampled_from(("free", "free", "near", "equal", "opposite", "zero_output", "zero_target")))
    return LossCase(
        draw(cases.operand(shape, dtype)), draw(cases.operand(shape, other)), sample, relation, coefficients
    )


NEAR_FLOOR = LossCase(
    cases.Operand((1, 1), torch.float32, "contiguous", 1e-4, 0), cases.Operand((1, 1), torch.float32, "contiguous", 1.0, 0), None,
    "free", {"direction_weight": cases.Coefficient("float", (1.0,), torch.float32)},
)  # fmt: skip


@cases.for_all(losses(), examples=40, always=(NEAR_FLOOR,))
def test_aligned_v_loss(case, device, backend):
    output, target, arguments = case.build(device)

    def run(op, output, target, arguments, **options):
        output = output.detach().requires_grad_()
        result = op(output, target, **arguments, **options)
        return result, torch.autograd.grad(result.loss * 3, output)[0]  # a loss that is scaled afterwards

    actual, gradient = run(reflow_kernels.aligned_v_loss, output, target, arguments, backend=backend)
    plain, plain_gradient = run(reference.aligned_v_loss, output, target, arguments)
    exact, exact_gradient = run(
        reference.aligned_v_loss,
        double(output),
        double(target),
        {name: double(value) for name, value in arguments.items()},
    )
    # 1 - cosine is |v^/P - v/V|^2 / 2: the unit vectors' roundings, squared, are in it even where the two are parallel,
    # and each element's rounding meets the difference of the two, which averages out over many elements alone.
    weights = [torch.as_tensor(double(arguments.get(n, 1.0)), dtype=torch.float64, device=device).abs() for n in ("weight", "direction_weight")]
    apart = (2 * (1 - exact.cosine).clamp(min=0)).sqrt() / max(output[:1].numel(), 1) ** 0.5 / 16
    turned = (weights[0] * weights[1] * (torch.finfo(torch.float32).eps / 4 + apart)).mean() if output.numel() else 0.0
    terms = {"magnitude": exact.mse, "cosine": torch.ones((), device=device), "loss": exact.loss.abs() + turned}
    for name in actual._fields:
        assert_no_worse(name, getattr(actual, name), getattr(plain, name), getattr(exact, name), terms.get(name))
    assert not any(value.isnan().any() for value in (*actual, gradient))
    assert_no_worse(
        "gradient", gradient, plain_gradient, exact_gradient, exact_gradient.abs() + unit_rounding(output, target, arguments)
    )
    assert gradient.dtype == output.dtype and gradient.shape == output.shape


def unit_rounding(output, target, arguments):
    """Four roundings of the unit vectors whose difference, over |v^|, is the cosine part's gradient (times the loss' factor of 3).

    A sample of one element whose |v^| is near the floor has an exact gradient of 0 there, which plain PyTorch may hit by luck.
    """
    def column(name):
        value = torch.as_tensor(double(arguments.get(name, 1.0)), dtype=torch.float64, device=output.device)
        return value.expand(len(output)).reshape(-1, *[1] * (output.dim() - 1))

    prediction, velocity = column("output_coef") * output.double(), target.double()
    if "sample" in arguments:
        prediction = prediction + column("sample_coef") * arguments["sample"].double()
    floor = 1e-4 * max(output[:1].numel(), 1) ** 0.5
    p, v = (x.flatten(1).norm(dim=1).clamp_min(floor).view_as(column("weight")) for x in (prediction, velocity))
    units = prediction.abs() / p + velocity.abs() / v
    factor = 3 * column("weight") * column("direction_weight") * column("output_coef").abs() / (max(len(output), 1) * p)
    return factor * units / 4  # `relative` is 16 roundings: sum, root, quotient and product make four


@dataclasses.dataclass(frozen=True)
class StepCase:
    state: cases.Operand
    output: cases.Operand
    coefficients: dict
    input_dtype: torch.dtype | None

    def build(self, device):
        arguments = {name: value.build(device) for name, value in self.coefficients.items()}
        return self.state.build(device), self.output.build(device), arguments


@st.composite
def steps(draw):
    shape = (draw(cases.batches), *draw(cases.shapes))
    dtype = draw(st.sampled_from(cases.DTYPES))
    wide = cases.wide(dtype)
    names = ["state_coef", "output_coef"]
    guided = draw(st.booleans())
    names += ["guidance_scale"] if guided else []
    names += ["input_scale"] if draw(st.booleans()) else []
    rows = (2 * shape[0] if guided else shape[0], *shape[1:])
    scale = draw(st.sampled_from((1.0, 1.0, 1e-3, 1e3)))
    return StepCase(
        draw(cases.operand(shape, wide, scale)),
        draw(cases.operand(rows, dtype, scale)),
        {name: draw(cases.coefficient(shape[0], wide)) for name in names},
        draw(st.sampled_from((None, *cases.DTYPES))),
    )


@cases.for_all(steps(), examples=40)
def test_guided_step(case, device, backend):
    state, output, arguments = case.build(device)
    exact = reference.guided_step(
        double(state), double(output), **{name: double(value) for name, value in arguments.items()}
    )
    plain = reference.guided_step(state, output, **arguments, input_dtype=case.input_dtype)
    actual = reflow_kernels.guided_step(state, output, **arguments, input_dtype=case.input_dtype, backend=backend)
    assert_no_worse("state", actual[0], plain[0], exact[0])
    assert_no_worse("model_input", actual[1], plain[1], exact[1])

    out, input_out = (torch.empty(value.shape, dtype=value.dtype, device=device) for value in plain)
    again = reflow_kernels.guided_step(state, output, **arguments, out=out, input_out=input_out, backend=backend)
    assert again[0] is out and again[1] is input_out
    assert torch.equal(out, actual[0]) and torch.equal(input_out, actual[1])


@dataclasses.dataclass(frozen=True)
class ChordCase:
    start: cases.Operand
    end: cases.Operand
    tau: cases.Coefficient
    points: int
    dt: cases.Coefficient
    input_dtype: torch.dtype | None

    def build(self, device):
        tau = self.tau.build(device)
        if self.points and isinstance(tau, torch.Tensor):
            tau = tau.expand(self.points, -1) * torch.linspace(0, 1, self.points, device=device)[:, None].to(tau)
        return self.start.build(device), self.end.build(device), tau, self.dt.build(device)


@st.composite
def chords(draw):
    shape = (draw(cases.batches), *draw(cases.shapes))
    wide = draw(st.sampled_from((torch.float32, torch.float64)))
    scale = draw(st.sampled_from((1.0, 1e-4, 1e3)))
    return ChordCase(
        draw(cases.operand(shape, wide, scale)),
        draw(cases.operand(shape, wide, scale)),
        draw(cases.coefficient(shape[0], wide, (0.0, 1.0, 0.25, 0.7))),
        draw(st.sampled_from((0, 1, 3))),
        draw(cases.coefficient(shape[0], wide, (-0.25, -1.0, -0.01))),
        draw(st.sampled_from((None, *cases.DTYPES))),
    )


@cases.for_all(chords(), examples=40)
def test_window_chord(case, device, backend):
    start, end, tau, dt = case.build(device)
    exact = reference.window_chord(*map(double, (start, end, tau, dt)))
    plain = reference.window_chord(start, end, tau, dt, input_dtype=case.input_dtype)
    actual = reflow_kernels.window_chord(start, end, tau, dt, input_dtype=case.input_dtype, backend=backend)
    for name, *values in zip(("z_t", "velocity", "model_input"), actual, plain, exact, strict=True):
        assert_no_worse(name, *values)


@dataclasses.dataclass(frozen=True)
class GuidanceCase:
    output: cases.Operand
    scale: cases.Coefficient
    rescale: cases.Coefficient | None


@st.composite
def guidances(draw):
    shape = (2 * draw(cases.batches), *draw(cases.shapes))
    dtype = draw(st.sampled_from(cases.DTYPES))
    batch = shape[0] // 2
    rescale = draw(cases.coefficient(batch, cases.wide(dtype), (0.0, 1.0, 0.7))) if draw(st.booleans()) else None
    return GuidanceCase(draw(cases.operand(shape, dtype)), draw(cases.coefficient(batch, cases.wide(dtype))), rescale)


@cases.for_all(guidances(), examples=40)
def test_cfg_combine(case, device, backend):
    output, scale = case.output.build(device), case.scale.build(device)
    rescale = 0.0 if case.rescale is None else case.rescale.build(device)
    exact = reference.cfg_combine(double(output), double(scale), rescale=double(rescale))
    plain = reference.cfg_combine(output, scale, rescale=rescale)
    actual = reflow_kernels.cfg_combine(output, scale, rescale=rescale, backend=backend)
    assert_no_worse("guided", actual, plain, exact)
