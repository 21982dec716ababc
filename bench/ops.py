"""``python -m bench ops``: the four ops against everything one would use instead, in one process.

Loss: forward, backward, full and without gradients; the others have no gradient. SD1.5 (4x64x64) and SDXL (4x128x128)
latents, batch 1, 4, 16 and 64 in bf16, batch 4 in fp16 and fp32 (--full: all of them), and one shape of 1 GiB an
operand for the share of the copy bandwidth. Every peer as a plain call and inside a CUDA graph, with a warm and a cold
L2, after it has passed the fp64 oracle.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import peers
from bench.session import CACHES, MODES, Peer, Session, add_options
from reflow_kernels import reference

OPS = ("aligned_v_loss", "guided_step", "window_chord", "cfg_combine")
FAMILIES = {"sd15": (4, 64, 64), "sdxl": (4, 128, 128)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BATCHES = (4, 1, 16, 64)
DIRECTIONS = ("full", "forward", "backward", "no-grad")
GIB_BATCH = 8192  # SDXL latents in bf16: 1 GiB an operand
TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-4}
EXACT = 1e-5  # fp32 results of peers that compute in fp32
CHUNK = 256  # rows of the oracle at a time
PUBLISHED = 0.1  # what half-precision alphas and states may be off by; the row says by how much they are


@dataclasses.dataclass(frozen=True)
class Spec:
    """A group of cells that share operands and compiled functions."""

    op: str
    family: str
    batch: int
    dtype: str
    sample: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, *self.sample)

    @property
    def gib(self) -> bool:
        return self.batch >= GIB_BATCH


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser)
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--full", action="store_true", help="every batch in every dtype")


def main(arguments: argparse.Namespace) -> int:
    session = Session("ops", arguments)
    specs = list(_specs(arguments))
    bandwidth = copy_bandwidth(session)
    for spec in specs:
        measure(session, spec, bandwidth)
    return session.exit_code()


def _specs(arguments: argparse.Namespace) -> Iterator[Spec]:
    """The most telling ones first: SDXL batch 4 in bf16, its other batches, 1 GiB, other dtypes, then SD1.5."""
    if arguments.quick:
        yield from (Spec(op, "quick", 2, "bf16", (4, 8, 8)) for op in arguments.op)
        yield from (Spec(op, "quick", 1, "fp32", (4, 4, 4)) for op in arguments.op if op == "guided_step")
        return
    for family in sorted(arguments.family, reverse=True):
        sample = FAMILIES[family]
        plain = [(batch, "bf16") for batch in BATCHES]
        other = [(batch, dtype) for dtype in ("fp16", "fp32") for batch in (BATCHES if arguments.full else (4,))]
        for batch, dtype in plain:
            yield from (Spec(op, family, batch, dtype, sample) for op in arguments.op)
        if family == "sdxl":
            yield from (Spec(op, family, GIB_BATCH, "bf16", sample) for op in arguments.op)
        for batch, dtype in other:
            yield from (Spec(op, family, batch, dtype, sample) for op in arguments.op)


def copy_bandwidth(session: Session) -> float:
    """Bytes a second (read and written) of a copy of 1 GiB on this device, measured once a run."""
    size = 2**20 if session.quick else (2**30 if session.device.type == "cuda" else 2**26)
    cell = {"case": "copy", "dtype": "uint8", "shape": [size]}
    row = session.recorder.get(session.key(**cell, peer="copy"))
    if row is None:
        source = torch.zeros(size, dtype=torch.uint8, device=session.device)
        target = torch.empty_like(source)
        made = {"copy": Peer(lambda: target.copy_(source))}
        session.measure(cell, lambda: made, ["copy"], modes=MODES[:1], caches=CACHES[:1])
        row = session.recorder.get(session.key(**cell, peer="copy"))
    return 2 * size / (row["median_us"] * 1e-6) if row else float("nan")


def measure(session: Session, spec: Spec, bandwidth: float) -> None:
    """Every cell of a group that is not recorded yet."""
    generator = torch.Generator(session.device)
    generator.manual_seed(session.seed)
    make = functools.cache(lambda: BUILD[spec.op](spec, session.device, generator))
    for case in cases(spec):
        moved = traffic(spec, case)
        session.measure(
            {"case": case, "dtype": spec.dtype, "shape": list(spec.shape)},
            lambda case=case: _chosen(make(), spec, case, session.device),
            names(spec, case),
            modes=MODES,
            caches=CACHES[:1] if spec.gib else CACHES,
            roofline_us=moved / bandwidth * 1e6 if bandwidth == bandwidth else None,
            extra={"bytes": moved, "copy_bytes_per_s": bandwidth, "family": spec.family},
        )


def cases(spec: Spec) -> list[str]:
    if spec.op == "aligned_v_loss":
        return [f"aligned_v_loss/{direction}" for direction in DIRECTIONS]
    return ["cfg_combine", "cfg_combine/rescale"] if spec.op == "cfg_combine" else [spec.op]


def names(spec: Spec, case: str) -> list[str]:
    """The peers of a case. Only reductions can be cooperative; at 1 GiB published code measures its temporaries."""
    if spec.gib:
        return ["copy", "compile", "ours"]
    reduces = case.startswith("aligned_v_loss") or case.endswith("rescale")
    extra = ["compile-cooperative"] if reduces else []
    row = ["row"] if case.startswith("aligned_v_loss") else []
    return ["published", "eager", "compile", *extra, *row, "ours", "empty"]


def traffic(spec: Spec, case: str) -> int:
    """Bytes that the op's definition reads and writes, each once (kernels/README.md)."""
    size = DTYPES[spec.dtype].itemsize
    elements = spec.batch * spec.sample[0] * spec.sample[1] * spec.sample[2]
    per_element = {
        "aligned_v_loss/no-grad": 2 * size,
        "aligned_v_loss/forward": 2 * size,
        "aligned_v_loss/backward": 3 * size,
        "aligned_v_loss/full": 3 * size,
        "guided_step": 8 + 4 * size,
        "window_chord": 16 + size,
        "cfg_combine": 3 * size,
        "cfg_combine/rescale": 3 * size,
    }
    return elements * per_element[case]


def _chosen(made: dict[str, dict[str, Peer]], spec: Spec, case: str, device: torch.device) -> dict[str, Peer]:
    """The peers of a case out of what was built, with the two that every case has."""
    found = {name: peer for name, peer in made[case].items() if name in names(spec, case)}
    if "empty" in names(spec, case):
        found["empty"] = _triton_peer(device, lambda: _empty(), note="the floor")
    if "copy" in names(spec, case):
        half = torch.zeros(traffic(spec, case) // 2, dtype=torch.uint8, device=device)
        other = torch.empty_like(half)
        found["copy"] = Peer(lambda: other.copy_(half), note="a copy of as many bytes")
    return found


def _empty() -> None:
    from bench import row_kernels

    row_kernels.empty()


def _triton_peer(device: torch.device, run: Callable[[], Any], **rest: Any) -> Peer:
    backend, why = peers.ours_backend(device)
    if backend != "triton":
        return Peer(run, why_absent="a Triton kernel needs a GPU, or TRITON_INTERPRET=1")
    if device.type != "cuda":
        rest["note"] = "; ".join(text for text in (rest.get("note"), why) if text)
        rest["launches"] = False  # the interpreter's own calls would be counted
    return Peer(run, **rest)


# ---- the peers of each op: case -> name -> Peer --------------------------------------------------------------------


def _loss(spec: Spec, device: torch.device, generator: torch.Generator) -> dict[str, dict[str, Peer]]:
    _fresh_compiler()
    dtype = DTYPES[spec.dtype]
    target = torch.randn(spec.shape, generator=generator, device=device).to(dtype)
    output = (target + 0.3 * torch.randn(spec.shape, generator=generator, device=device).to(dtype)).requires_grad_()
    weight = torch.full((spec.batch,), peers.DIRECTION_WEIGHT, device=device)
    # A loss scale, as fp16 training has one: unscaled gradients of this size are subnormal there.
    incoming = torch.tensor(2.0**16 if spec.dtype == "fp16" else 1.0, device=device)
    loss, grad = _loss_oracle(output.detach(), target, weight, incoming)
    backend, note = peers.ours_backend(device)
    functions: dict[str, tuple[Callable, str]] = {"ours": (peers.loss_ours(backend), note)}
    if not spec.gib:
        functions |= {
            "published": (peers.loss_published, "reads the loss on the host"),
            "eager": (peers.loss_eager, ""),
            "row": (peers.loss_row, ""),
            "compile-cooperative": peers.compiled(peers.loss_function, "compile-cooperative", device),
        }
    functions["compile"] = peers.compiled(peers.loss_function, "compile", device)
    made: dict[str, dict[str, Peer]] = {case: {} for case in cases(spec)}
    for name, (function, note) in functions.items():
        scalar = EXACT if name == "ours" else 1e-3  # others take 1 - cosine from a plain dot product
        oracles = {
            "no-grad": (loss, scalar),
            "forward": (loss, scalar),
            "backward": (grad, TOLERANCE[spec.dtype]),
            "full": ((loss, grad), (scalar, TOLERANCE[spec.dtype])),
        }
        for direction, (oracle, tolerance) in oracles.items():
            run, setup = _directed(function, output, target, weight, incoming, direction)
            rest = {
                "oracle": oracle,
                "tolerance": tolerance,
                "note": note,
                "setup": setup,
                "capturable": name != "published" or direction == "backward",
            }
            peer = _triton_peer(device, run, **rest) if name == "row" else Peer(run, **rest)
            if name == "row" and spec.dtype == "fp16" and direction in ("backward", "full"):
                peer = Peer(run, why_absent="it stores its gradient in fp16 before the loss scale: subnormal there")
            made[f"aligned_v_loss/{direction}"][name] = peer
    return made


def _directed(
    function: Callable, output: Tensor, target: Tensor, weight: Tensor, incoming: Tensor, direction: str
) -> tuple[Callable[[], Any], Callable[[], Any] | None]:
    """(call, setup) of one direction of a loss."""
    held: list[Tensor] = []  # a leaf of the backward's own, and its loss

    def no_grad() -> Tensor:
        with torch.no_grad():
            return function(output.detach(), target, weight)

    def forward() -> Tensor:
        return function(output, target, weight)

    def setup() -> None:
        # A leaf's gradient node stays on the stream that used it first, and a capture on another stream breaks on that.
        leaf = output.detach().requires_grad_()
        held[:] = [leaf, function(leaf, target, weight)]

    def backward() -> Tensor:
        if not held:
            setup()
        leaf, loss = held
        return torch.autograd.grad(loss, leaf, incoming.to(loss.dtype), retain_graph=True)[0]

    def full() -> tuple[Tensor, Tensor]:
        loss = function(output, target, weight)
        return loss.detach(), torch.autograd.grad(loss, output, incoming.to(loss.dtype))[0]

    call = {"no-grad": no_grad, "forward": forward, "backward": backward, "full": full}[direction]
    return call, setup if direction == "backward" else None


def _loss_oracle(output: Tensor, target: Tensor, weight: Tensor, incoming: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, gradient) in fp64, some rows at a time."""
    batch, loss, grads = output.shape[0], 0.0, []
    for start in range(0, batch, CHUNK):
        rows = slice(start, min(start + CHUNK, batch))
        share = (rows.stop - rows.start) / batch
        arguments = output[rows].double(), target[rows].double()
        weights = weight[rows].double()
        loss = loss + share * reference.aligned_v_loss(*arguments, direction_weight=weights).loss
        factor = share * incoming.double()
        grad = reference.aligned_v_loss_backward(factor, *arguments, direction_weight=weights)
        grads.append(grad.float() if batch > CHUNK else grad)
    return loss, torch.cat(grads)


def _step(spec: Spec, device: torch.device, generator: torch.Generator) -> dict[str, dict[str, Peer]]:
    _fresh_compiler()
    case = peers.Step.make(spec.shape, DTYPES[spec.dtype], device, generator)
    a, b = case.coefficients(torch.float64)
    oracle = _rows(
        lambda rows, double: reference.guided_step(
            case.state[rows].double(), double.double(), a[rows], b[rows], guidance_scale=peers.GUIDANCE
        ),
        case.output,
    )
    tolerance = (EXACT, max(TOLERANCE[spec.dtype], EXACT))
    backend, note = peers.ours_backend(device)
    made = {"ours": Peer(peers.step_ours(case, backend), oracle, tolerance, note=note)}
    run, why = peers.step_compiled(case, "compile")
    made["compile"] = Peer(run, oracle, tolerance, note=why)
    if not spec.gib:
        kept = f"state and alphas in {spec.dtype}" if spec.dtype != "fp32" else "alphas in fp32"
        made["published"] = Peer(peers.step_published(case), oracle, PUBLISHED, capturable=False, note=kept)
        made["eager"] = Peer(peers.step_eager(case), oracle, tolerance)
    return {"guided_step": made}


def _rows(function: Callable, doubled: Tensor) -> tuple[Tensor, Tensor]:
    """An oracle of a doubled batch, some rows at a time: (state, model input)."""
    batch = doubled.shape[0] // 2
    states, inputs = [], ([], [])
    for start in range(0, batch, CHUNK):
        rows = slice(start, min(start + CHUNK, batch))
        state, model_input = function(rows, torch.cat([doubled[:batch][rows], doubled[batch:][rows]]))
        states.append(state.float() if batch > CHUNK else state)
        for half, part in zip(inputs, model_input.chunk(2), strict=True):
            half.append(part.float() if batch > CHUNK else part)
    return torch.cat(states), torch.cat([*inputs[0], *inputs[1]])


def _chord(spec: Spec, device: torch.device, generator: torch.Generator) -> dict[str, dict[str, Peer]]:
    import reflow_kernels

    _fresh_compiler()
    dtype = DTYPES[spec.dtype]
    start = torch.randn(spec.shape, generator=generator, device=device)
    end = start + 0.2 * torch.randn(spec.shape, generator=generator, device=device)
    tau, dt = torch.linspace(0.1, 0.9, spec.batch, device=device), torch.full((spec.batch,), -0.25, device=device)
    parts = [
        reference.window_chord(*(value[rows].double() for value in (start, end, tau, dt)))
        for rows in (slice(i, i + CHUNK) for i in range(0, spec.batch, CHUNK))
    ]
    oracle = tuple(torch.cat([part[i].float() if spec.gib else part[i] for part in parts]) for i in range(3))
    tolerance = (EXACT, EXACT, TOLERANCE[spec.dtype])
    shape = (-1,) + (1,) * (start.dim() - 1)
    wide = tau.reshape(shape), dt.reshape(shape)
    backend, note = peers.ours_backend(device)
    made = {
        "ours": Peer(
            lambda: reflow_kernels.window_chord(start, end, tau, dt, input_dtype=dtype, backend=backend),
            oracle, tolerance, note=note,
        )
    }  # fmt: skip
    function, why = peers.compiled(peers.chord_function, "compile", device)
    made["compile"] = Peer(lambda: function(start, end, *wide, dtype), oracle, tolerance, note=why)
    if not spec.gib:
        published = (PUBLISHED,) * 3 if spec.dtype != "fp32" else (1e-4,) * 3
        kept = f"ends in {spec.dtype}" if spec.dtype != "fp32" else ""
        made["published"] = Peer(
            lambda: peers.chord_published(start, end, tau, dt, dtype), oracle, published, note=kept
        )
        made["eager"] = Peer(lambda: peers.chord_eager(start, end, *wide, dtype), oracle, tolerance)
    return {"window_chord": made}


def _guidance(spec: Spec, device: torch.device, generator: torch.Generator) -> dict[str, dict[str, Peer]]:
    import reflow_kernels

    _fresh_compiler()
    dtype = DTYPES[spec.dtype]
    half = torch.randn(spec.shape, generator=generator, device=device)
    output = torch.cat([half, half + 0.1 * torch.randn(spec.shape, generator=generator, device=device)]).to(dtype)
    weights, strengths = (torch.full((spec.batch,), value, device=device) for value in (peers.GUIDANCE, peers.RESCALE))
    column = weights.reshape((-1,) + (1,) * (half.dim() - 1))
    backend, note = peers.ours_backend(device)
    # Half-precision differences of the published form are multiplied by the guidance scale.
    loose = {"bf16": 0.1, "fp16": 0.02, "fp32": 1e-4}[spec.dtype]
    result = {}
    for case, rescale, strength in (("cfg_combine", 0.0, 0.0), ("cfg_combine/rescale", peers.RESCALE, strengths)):
        parts = []
        for i in range(0, spec.batch, CHUNK):
            rows = torch.cat([output[: spec.batch][i : i + CHUNK], output[spec.batch :][i : i + CHUNK]]).double()
            part = reference.cfg_combine(rows, peers.GUIDANCE, rescale=rescale)
            parts.append(part.float() if spec.gib else part)
        oracle, tolerance = torch.cat(parts), TOLERANCE[spec.dtype]
        function, why = peers.compiled(peers.guidance_function, "compile", device)
        made = {
            "ours": Peer(
                functools.partial(reflow_kernels.cfg_combine, output, weights, rescale=strength, backend=backend),
                oracle, tolerance, note=note,
            ),
            "compile": Peer(functools.partial(function, output, column, rescale), oracle, tolerance, note=why),
        }  # fmt: skip
        if not spec.gib:
            published = functools.partial(peers.guidance_published, output, peers.GUIDANCE, rescale)
            made["published"] = Peer(published, oracle, loose, note="guidance in the network's dtype")
            made["eager"] = Peer(functools.partial(peers.guidance_eager, output, column, rescale), oracle, tolerance)
            if rescale:
                function, why = peers.compiled(peers.guidance_function, "compile-cooperative", device)
                run = functools.partial(function, output, column, rescale)
                made["compile-cooperative"] = Peer(run, oracle, tolerance, note=why)
        result[case] = made
    return result


BUILD = {"aligned_v_loss": _loss, "guided_step": _step, "window_chord": _chord, "cfg_combine": _guidance}


def _fresh_compiler() -> None:
    """Compiled functions of earlier shapes are forgotten, so that guards stay short and the limit is never met."""
    import torch._dynamo

    torch._dynamo.reset()
