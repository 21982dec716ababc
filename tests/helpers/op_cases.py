"""Random arguments for the fused ops, the error rule, and one decorator that runs a property in both profiles."""

import dataclasses
import os
import pathlib

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

hypothesis.settings.register_profile(
    "ci", derandomize=True, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.register_profile(
    "deep",
    max_examples=200,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ("torch", "triton")
HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)
SHAPES = ((1,), (63,), (129,), (3, 5, 7), (4, 8, 8), (1, 9, 1), (2, 3, 4, 5))
LAYOUTS = ("contiguous", "contiguous", "channels_last", "sliced", "channels", "expanded", "offset", "transposed")


def for_all(strategy, examples=12, always=()):
    """Run ``check(case, device, backend)`` over a strategy: few fixed examples, and many more under ``--all``; and over ``always``."""

    def decorate(check):
        @pytest.mark.parametrize("backend", BACKENDS)
        @pytest.mark.parametrize("profile", ["ci", pytest.param("deep", marks=pytest.mark.slow)])
        def test(profile, backend, device):
            def example(case):
                check(case, device, backend)

            chosen = hypothesis.settings.get_profile(profile)
            if profile == "ci":
                chosen = hypothesis.settings(chosen, max_examples=examples)
            for case in always:
                check(case, device, backend)
            chosen(hypothesis.given(strategy)(example))()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


@dataclasses.dataclass(frozen=True)
class Operand:
    """A recipe for a tensor, so that failing examples print short."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    scale: float
    seed: int

    def build(self, device) -> torch.Tensor:
        shape, layout = self.shape, self.layout
        rows = {"sliced": 2 * shape[0], "expanded": 1}.get(layout, shape[0])
        if layout == "expanded" and shape[0] == 0:
            rows = 0
        full = [rows, *shape[1:]]
        if layout == "channels":
            full[1] += 2
        values = self._values(full)
        if layout == "channels_last" and len(shape) == 4:
            values = values.contiguous(memory_format=torch.channels_last)
        if layout == "transposed":
            values = values.permute(*reversed(range(values.dim()))).contiguous().permute(*reversed(range(values.dim())))
        if layout == "offset":
            store = values.new_empty(values.numel() + 1)
            values = store[1:].view(values.shape).copy_(values)
        values = values.to(device)
        if layout == "sliced":
            return values[::2]
        if layout == "channels":
            return values[:, : shape[1]]
        return values.expand(shape) if layout == "expanded" else values

    def _values(self, shape) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * self.scale).to(self.dtype)


def scales(dtype):
    """Magnitudes of elements: usual, tiny and huge for the dtype."""
    if dtype is torch.float16:
        return st.sampled_from((1.0, 1.0, 1e-3, 1e3))
    return st.sampled_from((1.0, 1.0, 1e-4, 1e3, 1e-30, 1e15))


@st.composite
def operand(draw, shape, dtype, scale=None):
    layout = draw(st.sampled_from(LAYOUTS))
    drawn = draw(scales(dtype)) if scale is None else scale
    return Operand(tuple(shape), dtype, layout, drawn, draw(st.integers(0, 2**31)))


@dataclasses.dataclass(frozen=True)
class Coefficient:
    """A float or a [B] tensor, dense, a column of a table, or expanded."""

    kind: str
    values: tuple[float, ...]
    dtype: torch.dtype

    def build(self, device):
        if self.kind == "float":
            return self.values[0]
        dense = torch.tensor(self.values, dtype=self.dtype, device=device)
        if self.kind == "column":
            return torch.stack([dense, dense + 1, dense - 1], dim=1)[:, 0]
        if self.kind == "expanded" and self.values:
            return dense[:1].expand(len(self.values))
        return dense


VALUES = (0.0, 1.0, -1.0, 0.3, -3.5, 7.5, 1e4)


@st.composite
def coefficient(draw, batch, dtype, values=VALUES):
    kind = draw(st.sampled_from(("float", "dense", "column", "expanded")))
    count = max(batch, 1) if kind == "float" else batch
    drawn = draw(st.lists(st.sampled_from(values), min_size=count, max_size=count))
    return Coefficient(kind, tuple(drawn), dtype)


batches = st.sampled_from((0, 1, 2, 3, 5))
shapes = st.sampled_from(SHAPES)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic and coefficients."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def double(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def relative(dtype: torch.dtype) -> float:
    """A few roundings of fp32; in fp64 the reference is no more exact than the kernels, and the bound is looser."""
    return 1e-11 if dtype is torch.float64 else 16 * torch.finfo(torch.float32).eps


def assert_no_worse(name, actual, plain, exact, terms=None):
    """``actual`` is at most twice as far from the fp64 ``exact`` as plain PyTorch, plus a few fp32 (or fp64) roundings
    of what was added up: ``terms``, by default the result.

    The interpreter truncates to bf16 where hardware rounds: one more rounding there.
    """
    assert actual.shape == plain.shape == exact.shape, name
    assert actual.dtype == plain.dtype, name
    if not exact.numel():
        return
    terms = exact if terms is None else terms
    dtype, actual, plain = actual.dtype, actual.double(), plain.double()
    finite = plain.isfinite() & exact.isfinite()
    assert torch.equal(actual[~finite].nan_to_num(), plain[~finite].nan_to_num()), f"{name}: {actual} against {plain}"
    actual, plain, exact, terms = actual[finite], plain[finite], exact[finite], terms.expand_as(finite)[finite]
    if not exact.numel():
        return
    bound = 2 * (plain - exact).abs().max() + relative(dtype) * terms.abs().max()
    if INTERPRETED and dtype is torch.bfloat16:
        bound = bound + exact.abs() * 2**-7
    error = (actual - exact).abs()
    assert bool((error <= bound).all()), f"{name}: error {error.max():.3e}, allowed {torch.as_tensor(bound).max():.3e}"
