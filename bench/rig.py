"""The variants of a family's training step as peers of a benchmark cell, made when they are first asked for."""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench import flops, scenes, timing
from bench.published import PublishedLoop
from bench.session import Peer
from bench.variants import FUSED, UNFUSED, LoopTail, NoOp, Ours, Tail, compiled, published
from reflow.training import targets

BF16_STATE = "latents and schedule in the network's dtype; the window's end differs from fp32 tables by `error`"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
# Pairs of a store that a benchmark solves; a recipe's store is larger, and reading it costs the same.
PAIRS = 128


class Rig:
    """A scene on a device and what was made for it. quick: tiny batches and no real compiler."""

    def __init__(self, family: str, device: torch.device, quick: bool = False, seed: int = 0) -> None:
        self.family, self.device, self.quick, self.seed = family, device, quick, seed
        self.folder = tempfile.TemporaryDirectory(prefix="reflow-bench-")
        self._ours: dict[tuple, Ours] = {}
        self._tails: dict[type, Tail] = {}

    @functools.cached_property
    def scene(self) -> scenes.Scene:
        return scenes.build(self.family, self.device)

    @functools.cached_property
    def compiled_networks(self) -> dict[str, Any]:
        backend = "eager" if self.quick and self.device.type == "cpu" else "inductor"
        return {name: compiled(getattr(self.scene, name), backend) for name in ("teacher", "student")}

    def tail(self, recipe: Any, kind: type[Tail] = Tail) -> Tail:
        """One set of masters and optimizer states for all variants of a scene."""
        if kind not in self._tails:
            self._tails[kind] = kind(self.scene.student, recipe.train)
        if kind is LoopTail and Tail in self._tails:
            self._tails[kind].optimizer = self._tails[Tail].optimizer
        return self._tails[kind]

    def absent(self, network: str, work: str) -> str:
        """Why a variant cannot run here, "" where it can."""
        cpu = self.device.type == "cpu"
        if network == "graph" and cpu:
            return "CUDA graphs need a GPU"
        if network == "compiled" and cpu and not self.quick:
            return "compiled networks are measured on a GPU"
        if work == "fused" and cpu:
            return "the fused ops run on a GPU; on a CPU they are the PyTorch reference that 'unfused' measures"
        return ""

    def recipe(self, *, graph: bool = False, **settings: Any) -> Any:
        return scenes.recipe(dtype=self.scene.dtype, graph=graph, seed=self.seed, **settings)

    def ours(self, network: str = "eager", work: str = "unfused", *, ema: str = "pass", **settings: Any) -> Ours:
        """The trainer's step over the eager, compiled or captured ("graph": compiled too) network."""
        key = (network, work, ema, *sorted(settings.items()))
        if key not in self._ours:
            recipe = self.recipe(graph=network == "graph", **settings)
            nets = {} if network == "eager" else self.compiled_networks
            kind = NoOp if work == "no-op" else Ours
            tail = self.tail(recipe, LoopTail if ema == "loop" else Tail)
            backend = UNFUSED if work == "unfused" else FUSED
            self._ours[key] = kind(self.scene, recipe, tail, backend=backend, **nets)
        return self._ours[key]

    def best(self, **settings: Any) -> Ours:
        """The fastest variant of this device: compiled, captured and fused on a GPU."""
        network, work = ("graph", "fused") if self.device.type == "cuda" else ("eager", "unfused")
        return self.ours(network, work, **settings)

    def stored(self, **settings: Any) -> Ours:
        """The step on stored pairs: a student's step alone, solves paid before."""
        from reflow.training.pairs import PairStore

        group_of_one()
        pairs = 16 if self.quick else PAIRS
        made = self.best(**settings)
        folder = Path(self.folder.name) / "-".join(str(value) for _, value in sorted(settings.items()))
        store = PairStore(folder, made.solver, pairs)
        store.fill(lambda _: None)
        store.load()
        own = self.best(**settings, pairs=pairs)
        own.source = store
        return own

    def in_deepspeed(self, **settings: Any) -> Ours:
        """The step with the student inside the trainer's DeepSpeed engine (ZeRO stage 0), on a copy of the student."""
        from reflow.training import engine

        engine.init_distributed()
        recipe = self.recipe(**settings)
        made = engine.Engine(copy.deepcopy(self.scene.student), recipe.train, 1)
        tail = Tail(made.module, recipe.train)
        tail.ema.masters = made.masters
        return Ours(self.scene, recipe, tail, backend=FUSED, engine=made)

    def published(self, *, cached: bool = False, always_guided: bool = False, **settings: Any) -> PublishedLoop:
        return published(self.scene, self.recipe(**settings), cached=cached, always_guided=always_guided)

    # Peers -----------------------------------------------------------------------------------------------------

    def step(self, call: Callable[[], Any], *, note: str = "", samples: int, tflop: float, **more: Any) -> Peer:
        """A whole training step; it changes weights, so it has no oracle."""
        # A dispatch mode, which counts on a CPU, makes Dynamo skip a compiled network for good.
        eager = not isinstance(call, Ours) or call.forward is self.scene.student
        return Peer(
            call,
            note=note,
            launches=self.family == "digits" and eager,
            capturable=False,
            facts=self.facts(call, samples, tflop, **more),
        )

    def window(self, made: Ours | PublishedLoop, oracle: Ours, settings: Mapping[str, Any]) -> Peer:
        """The teacher's window of the oracle's first batch."""
        tflop = self.teacher_tflop(settings)
        facts = dict(samples=settings["batch"], tflop=tflop)
        if isinstance(made, PublishedLoop):
            call = self.published_window(made, oracle)
            return Peer(
                call, oracle.window(), float("inf"), False, BF16_STATE, launches=False, facts=self.facts(call, **facts)
            )
        if isinstance(made, NoOp):
            return Peer(made.window, None, launches=False, capturable=False, facts=self.facts(made.window, **facts))
        tolerance = TOLERANCE[self.scene.dtype]
        return Peer(
            made.window, oracle.window(), tolerance, False, launches=False, facts=self.facts(made.window, **facts)
        )

    def student(self, made: Ours | PublishedLoop, oracle: Ours, settings: Mapping[str, Any]) -> Peer:
        """The student's forward, loss and backward on the oracle's solved windows; judged by two gradients."""
        facts = dict(samples=settings["batch"], tflop=self.student_tflop(settings))
        oracle.student()
        wanted, note = self.gradients(), ""
        if isinstance(made, PublishedLoop):
            call, tolerance, note = self.published_student(made, oracle), float("inf"), BF16_STATE
        else:
            # cuDNN's convolutions of fp32 are TF32 on a GPU, and a compiled network may choose another one.
            tf32 = self.device.type == "cuda" and self.scene.dtype is torch.float32
            call, tolerance = made.student, 10 * TOLERANCE[self.scene.dtype] * (10 if tf32 else 1)
        right = None if isinstance(made, NoOp) else wanted
        return Peer(call, right, tolerance, False, note, self.gradients, False, facts=self.facts(call, **facts))

    def gradients(self) -> list[Tensor]:
        """Gradients of the student's first and last layer, fp32."""
        network = self.scene.student
        return [layer.weight.grad.float() for layer in (network.conv_in, network.conv_out)]

    def published_window(self, loop: PublishedLoop, ours: Ours) -> Callable[[], Tensor]:
        """The published solve of ours' first batch: the same latents, noise, windows and captions of the teacher."""
        dtype, device, solved = self.scene.dtype, self.device, ours.fixed()
        items, _, noise = ours.solver.inputs(ours.solves(ours.samples))
        rows, batch = ours.teacher_inputs[2].to(device, dtype), len(items)
        null, taught = rows.select(slice(0, batch)), rows.select(slice(-batch, None))
        latents, noise = self.scene.data.latent(items).to(device, dtype), noise.to(device, dtype)
        t = ours.flow.table.t_start[solved.window]
        return lambda: loop.window(latents, noise, t, taught, null)[1]

    def published_student(self, loop: PublishedLoop, ours: Ours) -> Callable[[], None]:
        from bench.published import lookup
        from reflow.data import sampler

        solved, dtype = ours.fixed(), self.scene.dtype
        draws = sampler.chord_draws(self.seed, ours.flow.index, ours.samples).to(self.device)
        t, _ = targets.times(draws, solved.window, ours.flow.table, ours.recipe.objective)
        rows = solved.conditioning.to(self.device, dtype)

        def call() -> None:
            for parameter in self.scene.student.parameters():
                parameter.grad = None
            t_start, t_end, numbers = lookup(t, loop.settings.windows)
            ends = solved.z_start.to(dtype), solved.z_end.to(dtype), t_start, t_end, numbers
            loop.loss(ends, t, rows).backward()

        return call

    # What stands beside a time ---------------------------------------------------------------------------------

    def row_tflop(self) -> tuple[float, float]:
        """TFLOP of one UNet row: forward, forward and backward."""
        hidden = self.scene.data.captions.encoder_hidden_states
        found = flops.row(self.family, self.scene.base.configs["unet"], hidden.shape[1])
        return found[0] / 1e12, found[1] / 1e12

    def teacher_tflop(self, settings: Mapping[str, Any], always_guided: bool = False) -> float:
        guided = always_guided or settings.get("guidance_scale", 1.0) != 1.0
        solves = settings["batch"] // settings.get("chords", 1)
        return solves * settings["solver_steps"] * (2 if guided else 1) * self.row_tflop()[0]

    def student_tflop(self, settings: Mapping[str, Any]) -> float:
        return settings["batch"] * self.row_tflop()[1]

    def facts(self, call: Callable[[], Any], samples: int, tflop: float, **more: Any) -> Callable[[timing.Times], dict]:
        """What a row says beside its time: samples/s, TFLOP/s of the UNets, memory, how solves ran where they may be CUDA graphs."""
        solver = getattr(getattr(call, "__self__", call), "solver", None)

        def told(times: timing.Times) -> dict[str, Any]:
            row = {"samples": samples, "network_tflop": tflop, **more}
            if getattr(solver, "captured", None) is not None:
                row["solves"] = dict(solver.captured.counts)
            if times.median_us is None:
                return row
            seconds = times.median_us / 1e6
            row |= {"samples_per_second": samples / seconds, "tflop_per_second": tflop / seconds}
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                resident = torch.cuda.memory_allocated(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
                with contextlib.suppress(torch.OutOfMemoryError):  # the peak is then what there was
                    call()
                torch.cuda.synchronize(self.device)
                row |= {"resident_bytes": resident, "peak_bytes": torch.cuda.max_memory_allocated(self.device)}
            return row

        return told


def group_of_one() -> None:
    """A process group of this process alone, where there is none: pair stores are shared between ranks."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def made_or_absent(make: Callable[[], Peer], why: str = "") -> Peer:
    """The peer, or one that says why it cannot be. What goes wrong otherwise fails the peer, and with it the run, but
    not the other peers."""
    if why:
        return Peer(lambda: None, why_absent=why)
    try:
        return make()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return Peer(lambda: None, why_absent="out of GPU memory")
    except Exception as error:  # noqa: BLE001 - the gate reports it when it runs the peer
        problem = error

    def run() -> None:
        raise problem

    return Peer(run, oracle=torch.zeros(()))
