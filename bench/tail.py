"""``python -m bench tail``: what stands between the gradients and the next step: clipping, the optimizer, the EMA.

Parameters have the shapes of the digits, SD1.5 and SDXL networks (from their configs, on the meta device) and are fp32
masters, as in mixed-precision training. Cases: each part alone, and the whole tail as plain PyTorch writes it, with the
fused optimizer and one flat lerp, with 8-bit states, Apex-style (one fused step over one flat shard), and in one pass
(reflow_kernels.fused_adamw) over a flat shard, as ZeRO 1 to 3 hold it, or a launch a parameter, as ZeRO 0 does. Each row
has the bytes that its own peer must move, and their roofline.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench import ops, scenes
from bench.session import Peer, Session, add_options
from reflow.training.fused import FusedAdamW, FusedAdamW8bit, clip_scale

FAMILIES = ("sdxl", "sd15", "digits")
ADAM = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
CLIP, DECAY = 1.0, 0.999
ALIGN = 64  # elements: every parameter starts on a multiple of it in the flat buffers
TRIAL = ((5, 7), (128, 64), (129,))
# Bytes a parameter: clip reads twice, writes once; Adam reads p, g, m, v, writes p, m, v; a lerp reads two, writes one.
BYTES = {"clip": 12, "optimizer": 28, "ema": 12, "tail": 52}
# Where a peer must move less: moments of 8 bits, and a tail that reads the gradient for its norm and passes once.
LESS = {
    "optimizer": {"adamw8bit": 16, "one pass 8-bit": 16},
    "tail": {"8-bit + flat lerp": 40, "one pass": 40, "one pass by parameter": 40, "one pass 8-bit": 28},
}
PASSES = ("one pass", "one pass by parameter", "one pass 8-bit")
PEERS = {
    "clip": ("loop", "foreach"),
    "optimizer": ("adamw foreach", "adamw fused", "adamw fused, flat", "adamw8bit", *PASSES),
    "ema": ("loop", "foreach", "foreach lerp", "flat lerp"),
    "tail": ("foreach + EMA loop", "fused + flat lerp", "fused, flat + flat lerp", "8-bit + flat lerp", *PASSES),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, help="default: all on a GPU, digits on a CPU")


def main(arguments: argparse.Namespace) -> int:
    session = Session("tail", arguments)
    families = arguments.families or (FAMILIES if session.device.type == "cuda" else ("digits",))
    bandwidth = ops.copy_bandwidth(session)
    for family in families:
        shapes = parameter_shapes(family)[: 24 if session.quick else None]
        count = sum(math.prod(shape) for shape in shapes)
        make = functools.cache(lambda shapes=shapes: Masters(shapes, session.device))
        for part, names in PEERS.items():
            moved = count * BYTES[part]
            try:
                session.measure(
                    {"case": f"{family}/{part}", "dtype": "fp32", "shape": [count]},
                    lambda part=part, make=make, count=count: peers(part, make(), count, bandwidth),
                    names,
                    modes=["plain"],
                    caches=["warm"],
                    roofline_us=moved / bandwidth * 1e6,
                    extra={"bytes": moved, "tensors": len(shapes), "family": family},
                )
            except torch.OutOfMemoryError:
                print(f"tail {family}/{part}: skipped, out of GPU memory")
    return session.exit_code()


def parameter_shapes(family: str) -> list[tuple[int, ...]]:
    """Shapes of a family's network, in its own order."""
    from diffusers import UNet2DConditionModel

    if family == "digits":
        from reflow.models.digits import UNET as config
    else:
        config = scenes.configs_of(family)["unet"]
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(dict(config))
    return [tuple(parameter.shape) for parameter in network.parameters()]


class Masters:
    """Parameters, gradients and an average in three flat fp32 buffers, and views of them by parameter. Padding is 0."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: torch.device, seed: int = 0):
        sizes = [-(-math.prod(shape) // ALIGN) * ALIGN for shape in shapes]
        generator = torch.Generator(device)
        generator.manual_seed(seed)
        self.flat, self.flat_grad, self.flat_average = (torch.zeros(sum(sizes), device=device) for _ in range(3))

        def views(flat: Tensor) -> list[Tensor]:
            parts = flat.split(sizes)
            return [part[: math.prod(shape)].view(shape) for part, shape in zip(parts, shapes, strict=True)]

        self.parameters = [torch.nn.Parameter(view) for view in views(self.flat)]
        self.average = views(self.flat_average)
        for parameter, grad, average in zip(self.parameters, views(self.flat_grad), self.average, strict=True):
            parameter.grad = grad
            for values, scale in ((parameter.data, 0.02), (grad, 0.1), (average, 0.02)):
                values.normal_(0.0, scale, generator=generator)

    def clip(self, foreach: bool) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP, foreach=foreach)

    def optimizer(self, kind: str) -> torch.optim.Optimizer:
        if kind in PASSES:
            settings = {**ADAM, "params": self.parameters if kind.endswith("parameter") else [self.whole()]}
            return (FusedAdamW8bit if kind.endswith("8-bit") else FusedAdamW)(**settings)
        if kind == "adamw fused, flat":
            return torch.optim.AdamW([self.whole()], fused=True, **ADAM)
        if kind == "adamw8bit":
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit(self.parameters, **ADAM)
        name = kind.split()[1]
        return torch.optim.AdamW(self.parameters, **{name: True}, **ADAM)

    def whole(self) -> torch.nn.Parameter:
        """All parameters as one, with their gradients."""
        flat = torch.nn.Parameter(self.flat)
        flat.grad = self.flat_grad
        return flat

    def one_pass(self, kind: str) -> Callable[[], None]:
        """The whole tail: the norm of the gradient, and one pass with its scale and the average."""
        optimizer = self.optimizer(kind)
        held = [master for group in optimizer.param_groups for master in group["params"]]
        averages = [self.flat_average] if len(held) == 1 else self.average
        optimizer.averages = {id(master): average for master, average in zip(held, averages, strict=True)}

        def whole() -> None:
            optimizer.scale = clip_scale(torch.nn.utils.get_total_norm([master.grad for master in held]), CLIP)
            optimizer.decay = DECAY
            optimizer.step()

        return whole

    @torch.no_grad()
    def ema(self, kind: str) -> None:
        weight = 1.0 - DECAY
        if kind == "loop":  # as diffusers' EMAModel does by default
            for average, parameter in zip(self.average, self.parameters, strict=True):
                average.sub_(weight * (average - parameter))
        elif kind == "foreach":  # its foreach=True
            torch._foreach_sub_(self.average, torch._foreach_sub(self.average, self.parameters), alpha=weight)
        elif kind == "foreach lerp":
            torch._foreach_lerp_(self.average, list(self.parameters), weight)
        else:
            self.flat_average.lerp_(self.flat, weight)


def peers(part: str, masters: Masters, count: int, bandwidth: float) -> dict[str, Peer]:
    """The peers of a part. They change their operands, so the gate tries them on small ones made afresh."""
    trial = functools.partial(Masters, TRIAL, masters.flat.device, 1)
    made = {}
    for name in PEERS[part]:
        work = functools.partial(_work, part, name)
        run: Callable[[], object] = _Later(functools.partial(work, masters))
        tolerance = 1e-5  # of the first step, which 8-bit states do not round yet
        why = _absent(name)
        truth = oracle(part, trial())
        if name in PASSES:  # which scales the gradient as it reads it
            truth[1] = trial().flat_grad.double()
        moved = count * LESS.get(part, {}).get(name, BYTES[part])
        facts = {"bytes": moved, "own_roofline_us": moved / bandwidth * 1e6}
        tried = functools.partial(_tried, work, trial)
        made[name] = Peer(run, truth, tolerance, trial=tried, why_absent=why, facts=lambda _, facts=facts: facts)
    return made


class _Later:
    """A call that is made ready at its first use: optimizer states of all peers need not fit beside the gate's."""

    def __init__(self, make: Callable[[], Callable[[], None]]):
        self._make, self._call = make, None

    def __call__(self) -> None:
        self._call = self._call or self._make()
        self._call()


def _work(part: str, name: str, masters: Masters) -> Callable[[], None]:
    """What a peer does in every step, on these masters."""
    if part == "clip":
        return functools.partial(masters.clip, name == "foreach")
    if part == "ema":
        return functools.partial(masters.ema, name)
    if part == "optimizer":
        return masters.optimizer(name).step
    if name in PASSES:
        return masters.one_pass(name)
    kinds = {"foreach": "adamw foreach", "fused": "adamw fused", "fused,": "adamw fused, flat", "8-bit": "adamw8bit"}
    kind = kinds[name.split()[0]]
    optimizer, average = masters.optimizer(kind), "loop" if name.endswith("loop") else "flat lerp"

    def whole() -> None:
        masters.clip(True)
        optimizer.step()
        masters.ema(average)

    return whole


def _tried(work: Callable[[Masters], Callable[[], None]], trial: Callable[[], Masters]) -> list[Tensor]:
    masters = trial()
    work(masters)()
    return [masters.flat, masters.flat_grad, masters.flat_average]


def _absent(name: str) -> str:
    if "8" not in name or name in PASSES:
        return ""
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # noqa: BLE001 - a wheel that does not fit the GPU fails in its own ways
        return f"bitsandbytes cannot be imported ({type(error).__name__})"
    return ""


def oracle(part: str, masters: Masters) -> list[Tensor]:
    """(parameters, gradients, average) after the first step of a part, in fp64."""
    p, g, average = (value.double() for value in (masters.flat, masters.flat_grad, masters.flat_average))
    if part in ("clip", "tail"):
        g = g * min(1.0, CLIP / (float(g.norm()) + 1e-6))
    if part in ("optimizer", "tail"):
        (beta1, beta2), rate = ADAM["betas"], ADAM["lr"]
        m, v = (1 - beta1) * g / (1 - beta1), (1 - beta2) * g * g / (1 - beta2)
        p = p * (1 - rate * ADAM["weight_decay"]) - rate * m / (v.sqrt() + ADAM["eps"])
    if part in ("ema", "tail"):
        average = average + (1 - DECAY) * (p - average)
    return [p, g, average]
