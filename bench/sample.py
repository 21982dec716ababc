"""Seconds an image at 1 to 32 steps, guided and not: the time column of a few-step model's table.

Peers of a cell run the same network as often; what differs is the scheduler's step. "stock" is diffusers' DDIMScheduler
as its pipelines call it, "piecewise" the scheduler that reflow exports, "fused" the solver with the guided_step op, and
"captured" all steps of it as one CUDA graph. Text encoders are left out; the VAE has a cell of its own.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import scenes, session
from bench.rig import made_or_absent
from bench.session import Peer
from bench.timing import Times
from reflow.flow import DiscreteVP, Windows, WindowSolver
from reflow.flow.captured import CapturedSolve
from reflow.models.conditioning import Conditioning, denoise
from reflow.sampling import PiecewiseFlowScheduler
from reflow.sampling.sampler import sample, sample_teacher

STEPS = (4, 8, 2, 1, 25, 32)
GUIDED = 7.5
NAMES = ("stock", "piecewise", "fused", "captured")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    session.add_options(parser)
    parser.add_argument("--families", nargs="+", choices=scenes.FAMILIES, default=None)
    parser.add_argument("--batch", type=int, default=1, help="images at once")


def main(arguments: argparse.Namespace) -> int:
    run = session.Session("sample", arguments)
    cpu = run.device.type == "cpu"
    families = arguments.families or (["digits"] if cpu else ["sdxl", "sd15"])
    for family in families:
        lazy = functools.cache(lambda family=family: Sampling(family, run.device, arguments.batch, run.seed))
        steps = (2, 4) if run.quick else STEPS
        for scale in (1.0, GUIDED):
            for count in steps:
                cell = {"case": f"{family} sample: {count} steps, guidance {scale:g}", **place(family, arguments.batch)}
                peers = functools.partial(lambda lazy, *given: lazy().peers(*given), lazy, count, scale)
                run.measure(
                    cell,
                    peers,
                    NAMES,
                    modes=["plain"],
                    caches=["warm"],
                    extra={"steps": count, "guidance_scale": scale},
                )
        cell = {"case": f"{family} VAE decode", **place(family, arguments.batch)}
        run.measure(cell, lambda lazy=lazy: lazy().decoder(), ["VAE"], modes=["plain"], caches=["warm"])
        cell = {"case": f"{family} scheduler step", **place(family, arguments.batch)}
        run.measure(cell, lambda lazy=lazy: lazy().steppers(), NAMES[:3], modes=["plain"], caches=["warm"])
        lazy.cache_clear()
    return run.exit_code()


def place(family: str, batch: int) -> dict[str, Any]:
    shape = {"digits": [4, 8, 8], "sd15": [4, 64, 64], "sdxl": [4, 128, 128]}[family]
    return {"dtype": "fp32" if family == "digits" else "bf16", "shape": [batch, *shape]}


class Sampling:
    """The ways to draw `batch` images of a family from the same noise and prompts."""

    def __init__(self, family: str, device: torch.device, batch: int, seed: int) -> None:
        self.scene = scenes.build(family, device, student=False)
        self.device, self.batch = device, batch
        self.noise = self.scene.noise(batch, seed)
        items = torch.arange(batch) % len(self.scene.data)
        self.prompt = self.scene.data.conditioning(items).to(device, self.scene.dtype)
        self.null = self.scene.data.conditioning(items, torch.ones(batch, dtype=torch.bool)).to(
            device, self.scene.dtype
        )

    def peers(self, steps: int, scale: float) -> dict[str, Peer]:
        calls = {
            "stock": lambda: self.stock(steps, scale),
            "piecewise": lambda: sample(**self.given(scale), steps=steps, windows=steps).latents,
            "fused": lambda: sample_teacher(**self.given(scale), steps=steps).latents,
        }
        # 1000/32 is no whole number: stock DDIM rounds its times down there, so it draws other images.
        exact = self.scene.dtype is torch.float32 and 1000 % steps == 0
        oracle = calls["stock"]()
        made = {name: self.peer(call, oracle, 1e-3 if exact else float("inf")) for name, call in calls.items()}
        if self.device.type != "cuda":
            made["captured"] = Peer(lambda: None, why_absent="CUDA graphs need a GPU")
        else:
            made["captured"] = made_or_absent(lambda: self.peer(self.captured(steps, scale), oracle, float("inf")))
        return made

    def peer(self, call: Callable[[], Tensor], oracle: Tensor, tolerance: float) -> Peer:
        return Peer(call, oracle, tolerance, capturable=False, launches=False, facts=self.per_image)

    def per_image(self, times: Times) -> dict[str, Any]:
        return {} if times.median_us is None else {"seconds_per_image": times.median_us / 1e6 / self.batch}

    def given(self, scale: float) -> dict[str, Any]:
        """The arguments that both of reflow's samplers take."""
        base = self.scene.base
        null = self.null.select(slice(0, 1)) if scale > 1 else None
        common = dict(base=base, unet=self.scene.teacher, prompts=self.prompt, seeds=list(range(self.batch)))
        return {**common, "guidance_scale": scale, "null": null, "noise": self.noise, "decode": False}

    def rows(self, scale: float) -> Conditioning:
        return self.null.cat(self.prompt) if scale > 1 else self.prompt

    @torch.no_grad()
    def stock(self, steps: int, scale: float) -> Tensor:
        """The loop of a diffusers pipeline: latents in the network's dtype, guidance by chunk, scheduler.step."""
        scheduler = self.scheduler(steps)
        latents, rows = self.noise.to(self.scene.dtype), self.rows(scale)
        for t in scheduler.timesteps:
            given = torch.cat([latents] * 2) if scale > 1 else latents
            output = denoise(self.scene.teacher, scheduler.scale_model_input(given, t), t.expand(len(given)), rows)
            if scale > 1:
                empty, full = output.chunk(2)
                output = empty + scale * (full - empty)
            latents = scheduler.step(output, t, latents, return_dict=False)[0]
        return latents

    def scheduler(self, steps: int) -> Any:
        from diffusers import DDIMScheduler

        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
        betas = {
            name: self.scene.base.scheduler_config[name] for name in names if name in self.scene.base.scheduler_config
        }
        fixed = dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing")
        scheduler = DDIMScheduler(**betas, **fixed)
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    def solver(self, steps: int, scale: float) -> WindowSolver:
        schedule = DiscreteVP.from_config(self.scene.base.scheduler_config)
        kind = self.scene.base.prediction_type
        guidance = scale if scale > 1 else None
        return WindowSolver(
            schedule, Windows.uniform(1), steps, prediction_type=kind, guidance_scale=guidance, device=self.device
        )

    def captured(self, steps: int, scale: float) -> Callable[[], Tensor]:
        rows = self.rows(scale)
        tensors = tuple(x for x in (rows.encoder_hidden_states, rows.text_embeds, rows.time_ids) if x is not None)
        window = torch.zeros(self.batch, dtype=torch.long, device=self.device)

        def network(x: Tensor, t: Tensor, *conditioning: Tensor) -> Tensor:
            return denoise(self.scene.teacher, x, t, Conditioning(*conditioning))

        solve = CapturedSolve(
            self.solver(steps, scale), network, self.noise, window, *tensors, input_dtype=self.scene.dtype
        )
        return lambda: solve(self.noise, window, *tensors)

    def decoder(self) -> dict[str, Peer]:
        latents = self.noise

        def call() -> Tensor:
            return self.scene.base.decode(latents)

        return {
            "VAE": made_or_absent(lambda: Peer(call, call(), float("inf"), False, launches=False, facts=self.per_image))
        }

    def steppers(self) -> dict[str, Peer]:
        """One step of each scheduler on a guided output: everything but the network."""
        from reflow_kernels import guided_step

        dtype, output = self.scene.dtype, torch.cat([self.noise, self.noise * 0.9]).to(self.scene.dtype)
        scheduler, piecewise = (
            self.scheduler(4),
            PiecewiseFlowScheduler.for_student(self.scene.base.scheduler_config, 4),
        )
        piecewise.set_timesteps(4, device=self.device)
        latents = self.noise.to(dtype)
        state, coefficient, _ = (
            value[0, :1].expand(self.batch).contiguous() for value in self.solver(4, GUIDED).steps_table()
        )
        scale = torch.full((self.batch,), GUIDED, device=self.device)

        def combined() -> Tensor:
            empty, full = output.chunk(2)
            return empty + GUIDED * (full - empty)

        def stock() -> Tensor:
            return scheduler.step(combined(), scheduler.timesteps[0], latents, return_dict=False)[0]

        def ours() -> Tensor:
            return piecewise.step(combined(), piecewise.timesteps[0], self.noise, return_dict=False)[0]

        def fused() -> Tensor:
            return guided_step(self.noise, output, state, coefficient, guidance_scale=scale, input_dtype=dtype)[0]

        tolerance = 1e-4 if dtype is torch.float32 else 0.05
        calls = {"stock": stock, "piecewise": ours, "fused": fused}
        return {name: Peer(call, stock().float(), tolerance, capturable=False) for name, call in calls.items()}
