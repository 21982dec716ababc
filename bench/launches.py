"""``python -m bench launches``: kernel launches and host syncs of the ops and of a training step's own work.

On a GPU torch.profiler counts kernels, copies and fills, and driver calls that wait; on a CPU a TorchDispatchMode
counts ATen calls (see :mod:`bench.counting`). Counts do not depend on sizes, so the shapes are small.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from bench import counting, peers
from bench.rig import Rig
from bench.session import Session, add_options
from bench.variants import Ours

SHAPE = (2, 4, 8, 8)
STEP = "training step (digits, 8 windows x 4 steps) beyond networks, optimizer, EMA"
SETTINGS = dict(windows=8, solver_steps=4, batch=2, guidance_scale=1.0)
# What the fused ops promise (kernels/README.md): a count that is higher makes the run exit 1.
PROMISED = {
    "aligned_v_loss/forward": 2,
    "aligned_v_loss/backward": 1,
    "guided_step": 1,
    "window_chord": 1,
    "cfg_combine": 1,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser)


def main(arguments: argparse.Namespace) -> int:
    session = Session("launches", arguments)
    for case, name, run in [*_calls(session), *_steps(session)]:
        cell = {"case": case, "peer": name, "dtype": "bf16", "shape": list(SHAPE)}
        if session.recorder.done(session.key(**cell)) or session.out_of_time():
            continue
        if name == "ours" and peers.ours_backend(session.device)[0] != "triton":
            session.add(**cell, note="skipped: needs a GPU, or TRITON_INTERPRET=1")
            continue
        counted = counting.count(run, session.device)
        if case == STEP:
            counted = _beyond(session, counted)
        most = ", ".join(f"{number} {label}" for label, number in list(counted.names.items())[:6])
        promised = PROMISED.get(case) if name == "ours" else None
        broken = promised is not None and (counted.launches > promised or counted.syncs > 0)
        if broken:
            found = f"{counted.launches} launches and {counted.syncs} syncs"
            session.fail(f"launches {case}", f"{found}, promised {promised} and 0")
        session.add(
            **cell,
            launches=counted.launches,
            syncs=counted.syncs,
            failed=broken,
            note=f"{counted.launches} launches, {counted.syncs} syncs ({counted.how}): {most}",
            extra={"names": counted.names},
        )
    return session.exit_code()


def _steps(session: Session) -> list[tuple[str, str, Callable[[], Any]]]:
    """One step of the recipe `digits`, first stage, in the trainer's own code and as published (encodings cached)."""
    rig = _rig(session)
    ours = Ours(rig.scene, rig.recipe(**SETTINGS), rig.tail(rig.recipe(**SETTINGS)), backend=peers.ours_backend(session.device)[0])
    # No unfused peer: on a CPU a dispatch mode does not see what a registered op does in PyTorch.
    return [(STEP, "published", rig.published(cached=True, **SETTINGS)), (STEP, "ours", lambda: unasked(ours))]


def unasked(step: Callable[[], Any]) -> None:
    """A step as it runs on a GPU, where nobody asks whether all samples are good: that would wait for it."""
    with patch("reflow.training.loop.known_good", lambda good: False), patch("reflow.training.solves.known_good", lambda good: False):
        step()


@functools.cache
def _rig(session: Session) -> Rig:
    return Rig("digits", session.device, quick=True, seed=session.seed)


@functools.cache
def _least(session: Session) -> counting.Counts:
    """A step whose elementwise work is replaced by nothing: networks, optimizer and EMA."""
    return counting.count(_rig(session).ours("eager", "no-op", **SETTINGS), session.device)


def _beyond(session: Session, counted: counting.Counts) -> counting.Counts:
    least = _least(session)
    names = {name: number - least.names.get(name, 0) for name, number in counted.names.items()}
    names = {name: number for name, number in sorted(names.items(), key=lambda item: -item[1]) if number > 0}
    how = f"{counted.how}, less the {least.launches} of networks, optimizer and EMA"
    return counting.Counts(counted.launches - least.launches, max(counted.syncs - least.syncs, 0), how, names)


def _calls(session: Session) -> list[tuple[str, str, Callable[[], Any]]]:
    """(case, peer, call)."""
    import reflow_kernels

    device = session.device
    generator = torch.Generator(device)
    generator.manual_seed(session.seed)
    target = torch.randn(SHAPE, generator=generator, device=device).bfloat16()
    output = (target + 0.3 * torch.randn(SHAPE, generator=generator, device=device).bfloat16()).requires_grad_()
    weight = torch.full(SHAPE[:1], peers.DIRECTION_WEIGHT, device=device)
    incoming = torch.ones((), device=device)
    backend, _ = peers.ours_backend(device)
    calls: list[tuple[str, str, Callable[[], Any]]] = []
    losses = {"published": peers.loss_published, "eager": peers.loss_eager, "ours": peers.loss_ours(backend)}
    for name, function in losses.items():
        held = function(output, target, weight)

        def backward(held=held):
            return torch.autograd.grad(held, output, incoming, retain_graph=True)

        calls.append(("aligned_v_loss/forward", name, lambda function=function: function(output, target, weight)))
        calls.append(("aligned_v_loss/backward", name, backward))

    case = peers.Step.make(SHAPE, torch.bfloat16, device, generator)
    if device.type != "cuda":
        case.timesteps, case.previous = counting.on_device(case.timesteps), counting.on_device(case.previous)
    for name, run in (
        ("published", peers.step_published(case)),
        ("eager", peers.step_eager(case)),
        ("ours", peers.step_ours(case, backend)),
    ):
        calls.append(("guided_step", name, run))

    start, end = case.state, case.state + 0.1
    tau, dt = torch.full(SHAPE[:1], 0.5, device=device), torch.full(SHAPE[:1], -0.25, device=device)
    wide = tau.reshape(-1, 1, 1, 1), dt.reshape(-1, 1, 1, 1)
    half = torch.bfloat16
    calls += [
        ("window_chord", "published", lambda: peers.chord_published(start, end, tau, dt, half)),
        ("window_chord", "eager", lambda: peers.chord_eager(start, end, *wide, half)),
        (
            "window_chord",
            "ours",
            lambda: reflow_kernels.window_chord(start, end, tau, dt, input_dtype=half, backend=backend),
        ),
    ]
    scale = torch.full(SHAPE[:1], peers.GUIDANCE, device=device)
    calls += [
        ("cfg_combine", "published", lambda: peers.guidance_published(case.output, peers.GUIDANCE, 0.0)),
        ("cfg_combine", "eager", lambda: peers.guidance_eager(case.output, scale.reshape(-1, 1, 1, 1), 0.0)),
        ("cfg_combine", "ours", lambda: reflow_kernels.cfg_combine(case.output, scale, backend=backend)),
    ]
    return calls
