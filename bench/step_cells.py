"""Which cells `python -m bench step` measures, in order of importance, and which peers each cell holds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.rig import Rig, made_or_absent
from bench.session import Peer

NETWORKS = ("eager", "compiled", "graph")
WORK = ("unfused", "fused", "no-op")
GUIDED = 7.5
Make = Callable[[Rig], Peer]


@dataclass
class Cell:
    """case: what is measured, with its settings. entries: peers by name; facts: what goes into every row."""

    family: str
    case: str
    batch: int
    entries: dict[str, Make]
    facts: dict[str, Any] = field(default_factory=dict)

    def peers(self, rig: Rig) -> dict[str, Peer]:
        return {name: made_or_absent(lambda make=make: make(rig)) for name, make in self.entries.items()}


def text(windows: int, solver_steps: int, guidance_scale: float = 1.0, **_: Any) -> str:
    return f"{windows} windows x {solver_steps} steps, guidance {guidance_scale:g}"


def cell(family: str, part: str, settings: dict[str, Any], entries: dict[str, Make]) -> Cell:
    return Cell(family, f"{family} {part}: {text(**settings)}", settings["batch"], entries, dict(settings))


def variant(network: str, work: str, make: Callable[[Rig], Peer]) -> Make:
    """A peer of this kind of network and work, or why there is none on this device."""
    return lambda rig: made_or_absent(lambda: make(rig), rig.absent(network, work))


def grid(family: str, settings: dict[str, Any]) -> list[Cell]:
    """Window, student and step: {eager, compiled, graph} x {unfused, fused, no-op}, and the published-style loop."""
    windows: dict[str, Make] = {
        "published": lambda rig: rig.window(rig.published(**settings), rig.ours(**settings), settings)
    }
    students: dict[str, Make] = {
        "published": lambda rig: rig.student(rig.published(**settings), rig.ours(**settings), settings)
    }
    steps: dict[str, Make] = {"published": lambda rig: published(rig, settings)}
    for network in NETWORKS:
        for work in WORK:
            name, given = f"{network} {work}", (network, work)
            windows[name] = variant(
                *given, lambda rig, g=given: rig.window(rig.ours(*g, **settings), rig.ours(**settings), settings)
            )
            steps[name] = variant(*given, lambda rig, g=given: ours(rig, settings, *g))
            if network != "graph":
                students[name] = variant(
                    *given, lambda rig, g=given: rig.student(rig.ours(*g, **settings), rig.ours(**settings), settings)
                )
    return [
        cell(family, "step", settings, steps),
        cell(family, "window", settings, windows),
        cell(family, "student", settings, students),
    ]


def published(rig: Rig, settings: dict[str, Any], **changes: bool) -> Peer:
    loop = rig.published(**changes, **settings)
    guided = loop.settings.always_guided
    tflop = rig.teacher_tflop(settings, guided) + rig.student_tflop(settings)
    note = "" if changes.get("cached") else "VAE and text encoders in every step; TFLOP/s counts the UNets"
    return rig.step(loop, samples=settings["batch"], tflop=tflop, note=note)


def ours(
    rig: Rig,
    settings: dict[str, Any],
    network: str = "",
    work: str = "unfused",
    baseline: str = "published",
    **changes: Any,
) -> Peer:
    """network "": the fastest variant of the device. baseline: the peer of the cell that it is to be compared with."""
    made = rig.ours(network, work, **settings, **changes) if network else rig.best(**settings, **changes)
    tflop = rig.teacher_tflop(settings) + rig.student_tflop(settings)
    return rig.step(made, samples=settings["batch"], tflop=tflop, baseline=baseline)


def stored(rig: Rig, settings: dict[str, Any]) -> Peer:
    note = "the solve of each pair is paid before; see `solve of a window`"
    return rig.step(rig.stored(**settings), samples=settings["batch"], tflop=rig.student_tflop(settings), note=note)


def loop(family: str, settings: dict[str, Any]) -> Cell:
    """The whole loop: published-style, one difference after another until it is ours, and what else a recipe may do."""
    guided = {**settings, "guidance_scale": GUIDED}

    def chords(count: int) -> Make:
        return lambda rig: ours(rig, {**settings, "chords": count})

    entries: dict[str, Make] = {
        "published": lambda rig: published(rig, settings),
        "published, encodings cached": lambda rig: published(rig, settings, cached=True),
        "ours, EMA as a loop": lambda rig: ours(rig, settings, "eager", "unfused", ema="loop"),
        "ours, unfused": lambda rig: ours(rig, settings, "eager", "unfused"),
        "ours, fused": variant("eager", "fused", lambda rig: ours(rig, settings, "eager", "fused")),
        "ours, fused, compiled": variant("compiled", "fused", lambda rig: ours(rig, settings, "compiled", "fused")),
        "ours, fused, compiled, captured": variant("graph", "fused", lambda rig: ours(rig, settings, "graph", "fused")),
        "ours, no-op elementwise work": variant("eager", "no-op", lambda rig: ours(rig, settings, "eager", "no-op")),
        "ours, 2 chords a solve": chords(2),
        "ours, 4 chords a solve": chords(4),
        "published, unconditional half always": lambda rig: published(rig, settings, always_guided=True),
        "published, guidance 7.5": lambda rig: published(rig, guided),
        "ours, guidance 7.5": lambda rig: ours(rig, guided, baseline="published, guidance 7.5"),
    }
    if family == "digits":
        entries["ours in the DeepSpeed engine"] = lambda rig: deepspeed(rig, settings)
    return cell(family, "loop", settings, entries)


def deepspeed(rig: Rig, settings: dict[str, Any]) -> Peer:
    if rig.quick or importlib.util.find_spec("deepspeed") is None:
        return Peer(lambda: None, why_absent="left out of a quick run" if rig.quick else "deepspeed is not installed")
    tflop = rig.teacher_tflop(settings) + rig.student_tflop(settings)
    return rig.step(rig.in_deepspeed(**settings), samples=settings["batch"], tflop=tflop, note="ZeRO stage 0")


def stage(family: str, settings: dict[str, Any], chained: dict[str, Any] | None, pairs: bool) -> Cell:
    """One stage of a recipe: published-style and ours with the root teacher, the chained teacher, stored pairs."""
    entries: dict[str, Make] = {
        "published": lambda rig: published(rig, settings),
        "ours, root teacher": lambda rig: ours(rig, settings),
        "solve of a window": lambda rig: rig.window(rig.best(**settings), rig.best(**settings), settings),
    }
    if chained:
        name = f"ours, previous student as teacher, {chained['solver_steps']} steps"
        entries[name] = lambda rig: ours(rig, chained)
    if pairs:
        entries["ours, stored pairs"] = lambda rig: stored(rig, settings)
    return cell(family, "stage", settings, entries)


def published_recipe(family: str, batch: int, solver_steps: int) -> Cell:
    """PeRFlow's SDXL recipe and what ours makes of it: guided as published, then as a progressive stage does it."""
    settings = dict(windows=4, solver_steps=solver_steps, batch=batch, guidance_scale=GUIDED)
    root = dict(windows=4, solver_steps=8, batch=batch)
    chained = dict(windows=4, solver_steps=2, batch=batch, before=8)
    entries: dict[str, Make] = {
        "published": lambda rig: published(rig, settings),
        "published, encodings cached": lambda rig: published(rig, settings, cached=True),
        "ours": lambda rig: ours(rig, settings),
        "ours, root teacher, 8 steps, guidance 1": lambda rig: ours(rig, root),
        "ours, previous student as teacher, 2 steps": lambda rig: ours(rig, chained),
    }
    return cell(family, "published recipe", settings, entries)


def encoding(family: str, batch: int) -> Cell:
    """What the encoders cost a step, against reading what was encoded before."""
    settings = dict(windows=8, solver_steps=1, batch=batch)

    def peer(cached: bool) -> Make:
        def make(rig: Rig) -> Peer:
            inputs = torch.no_grad()(rig.published(cached=cached, **settings).inputs)
            return Peer(inputs, launches=False, capturable=False, facts=rig.facts(inputs, batch, 0.0))

        return make

    entries = {"VAE and text encoders": peer(False), "cached": peer(True)}
    return Cell(family, f"{family} encoding", batch, entries, {"batch": batch})


def plan(device: torch.device, quick: bool, families: list[str]) -> list[Cell]:
    """The cells of a run on this device: the first ones answer the first questions."""
    cells: list[Cell] = []
    if quick:
        tiny = dict(windows=8, solver_steps=1, batch=4)
        chained = dict(windows=4, solver_steps=2, batch=4, before=8)
        root = dict(windows=4, solver_steps=1, batch=4)
        cells += [
            loop("digits", tiny),
            stage("digits", root, chained, pairs=True),
            *grid("digits", tiny),
            encoding("digits", 4),
        ]
    elif device.type == "cuda":
        merge = dict(windows=8, solver_steps=2, batch=4)
        cells += [published_recipe("sdxl", 2, 10), *grid("sdxl", merge)]
        cells += [
            *grid("sd15", dict(windows=8, solver_steps=4, batch=4)),
            *digits(64),
            loop("sd15", dict(windows=8, solver_steps=4, batch=8)),
        ]
        cells += [encoding("sdxl", 4), encoding("sd15", 8), *grid("digits", dict(windows=8, solver_steps=4, batch=64))]
        cells += [
            loop("sdxl", dict(windows=8, solver_steps=4, batch=4)),
            *grid("sd15", dict(windows=8, solver_steps=4, batch=1)),
        ]
        cells += [*grid("sdxl", {**merge, "batch": 1}), *grid("sd15", dict(windows=8, solver_steps=4, batch=8))]
    else:
        cells += [*digits(32), encoding("digits", 32), *grid("digits", dict(windows=8, solver_steps=4, batch=32))[1:]]
    return [one for one in cells if one.family in families]


def digits(batch: int) -> list[Cell]:
    """The recipe `digits`: its three stages, the first as the whole loop."""
    stages = []
    for windows, steps in ((8, 4), (4, 8), (2, 16)):
        chained = dict(windows=windows, solver_steps=2, batch=batch, before=2 * windows) if windows < 8 else None
        stages.append(stage("digits", dict(windows=windows, solver_steps=steps, batch=batch), chained, pairs=True))
    return [loop("digits", dict(windows=8, solver_steps=4, batch=batch)), *stages]
