"""``python -m bench host``: what a call of an op costs the host, beside fair eager PyTorch, with no GPU.

Kernels are compiled for sm_90 and a driver that launches nothing takes them, so ours is everything but the launch itself:
checks, the plan's lookup, results made, autograd. The operands are small and lie on the CPU, where an eager call is
PyTorch's own host time and next to no arithmetic. Times are of this machine's CPU; compare peers of one run alone.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from typing import Any

import torch

from bench import peers
from bench.session import Peer, Session, add_options

SHAPE = (2, 4, 4, 4)
TARGET_US = {"guided_step": 15.0, "aligned_v_loss, forward and backward": 80.0}
NAMES = ("published", "eager", "ours")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser)


def main(arguments: argparse.Namespace) -> int:
    os.environ["TRITON_INTERPRET"] = "0"
    arguments.device = "cpu"
    session = Session("host", arguments)
    launch_nothing()
    for case, make in cases().items():
        session.measure(
            {"case": case, "dtype": "bf16", "shape": list(SHAPE)},
            lambda make=make: {name: Peer(run, launches=False) for name, run in make().items()},
            NAMES,
            modes=["plain"],
            caches=["warm"],
            extra={"target_us": TARGET_US.get(case)},
        )
    return session.exit_code()


def launch_nothing() -> None:
    """From here on this process's Triton compiles for sm_90 and starts no kernel; the ops take CPU tensors for a GPU's."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from reflow_kernels import dispatch

    class Utils:
        @staticmethod
        def load_binary(*given: Any) -> tuple[Any, ...]:
            return None, 0, 0, 0, 1024

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448}

    class Launcher:
        def __init__(self, src: Any, metadata: Any):
            pass

        def __call__(self, *given: Any) -> None:
            pass

    class Nothing:
        utils, launcher_cls = Utils, Launcher

        @staticmethod
        def get_current_device() -> int:
            return 0

        @staticmethod
        def get_current_stream(device: int) -> int:
            return 0

        @staticmethod
        def get_current_target() -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Nothing())
    dispatch._obstacle = lambda device_type, index: None
    dispatch._resolve.cache_clear()


def cases() -> dict[str, Callable[[], dict[str, Callable[[], Any]]]]:
    """Case -> what makes its calls by peer."""
    return {
        "guided_step": _step,
        "aligned_v_loss, forward": lambda: _loss(backward=False),
        "aligned_v_loss, forward and backward": lambda: _loss(backward=True),
        "window_chord": _chord,
        "cfg_combine": _guidance,
        "fused_adamw": _adamw,
    }


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _step() -> dict[str, Callable[[], Any]]:
    case = peers.Step.make(SHAPE, torch.bfloat16, torch.device("cpu"), _generator())
    return {
        "published": peers.step_published(case),
        "eager": peers.step_eager(case),
        "ours": peers.step_ours(case, "triton"),
    }


def _loss(backward: bool) -> dict[str, Callable[[], Any]]:
    generator = _generator()
    output = torch.randn(SHAPE, generator=generator).bfloat16().requires_grad_(backward)
    target, weight = torch.randn(SHAPE, generator=generator), torch.ones(SHAPE[0])

    def call(function: Callable[..., torch.Tensor]) -> Callable[[], Any]:
        def run() -> None:
            loss = function(output, target, weight)
            if backward:
                output.grad = None
                loss.backward()

        return run

    loss_ours = peers.loss_ours("triton")
    return {"published": call(peers.loss_published), "eager": call(peers.loss_eager), "ours": call(loss_ours)}


def _chord() -> dict[str, Callable[[], Any]]:
    import reflow_kernels

    generator = _generator()
    start, end = torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)
    tau, dt = torch.rand(SHAPE[0], generator=generator), torch.full((SHAPE[0],), -0.25)
    wide = [value.reshape(-1, 1, 1, 1) for value in (tau, dt)]
    half = torch.bfloat16
    return {
        "published": lambda: peers.chord_published(start, end, tau, dt, half),
        "eager": lambda: peers.chord_eager(start, end, *wide, half),
        "ours": lambda: reflow_kernels.window_chord(start, end, tau, dt, input_dtype=half, backend="triton"),
    }


def _adamw() -> dict[str, Callable[[], Any]]:
    """One parameter's step with the gradient's scale, the average and the copy; torch.optim's own loop over parameters is in its two."""
    import reflow_kernels

    generator, size = _generator(), math.prod(SHAPE)
    weights, first, second, average = (torch.rand(size, generator=generator) for _ in range(4))
    gradient, copy, scale = torch.randn(size, generator=generator), torch.empty(size, dtype=torch.bfloat16), torch.ones(())
    rates = dict(weight_decay=0.01, eps=1e-8)

    def stock(**form: bool) -> Callable[[], Any]:
        parameter = torch.nn.Parameter(weights.clone())
        optimizer = torch.optim.AdamW([parameter], lr=1e-5, betas=(0.9, 0.999), **rates, **form)

        @torch.no_grad()
        def run() -> None:
            parameter.grad = gradient * scale
            optimizer.step()
            average.lerp_(parameter, 1e-3)
            copy.copy_(parameter)

        return run

    return {
        "published": stock(foreach=True),
        "eager": stock(fused=True),
        "ours": lambda: reflow_kernels.fused_adamw(
            weights, gradient, first, second, learning_rate=1e-5, beta1=0.9, beta2=0.999, step=7, grad_scale=scale, average=average,
            decay=0.999, copy=copy, backend="triton", **rates,
        ),
    }  # fmt: skip


def _guidance() -> dict[str, Callable[[], Any]]:
    import reflow_kernels

    output = torch.randn((2 * SHAPE[0], *SHAPE[1:]), generator=_generator()).bfloat16()
    scale = torch.full((SHAPE[0],), peers.GUIDANCE)
    wide = scale.reshape(-1, 1, 1, 1)
    return {
        "published": lambda: peers.guidance_published(output, peers.GUIDANCE, 0.0),
        "eager": lambda: peers.guidance_eager(output, wide, 0.0),
        "ours": lambda: reflow_kernels.cfg_combine(output, scale, backend="triton"),
    }
