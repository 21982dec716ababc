"""``python -m bench solver``: how exact a window's velocity is, per number of windows and solver steps.

The target of training is (z_end - z_start) / dt of a window. Each peer solves the same windows from the same starts;
its error is |v - v_ref| / |v_ref| and 1 - cosine against the same solve in fp64 (state, coefficients and network), the
median over samples: a sample near the border of two modes that ends in the other one would outweigh all others.
"published" keeps latents and alphas in bf16 and finds the next index by a floor division; "fp32 state" is the trainer's
solver with the network in bf16, so both ask the same network in the same precision. Accuracy is no time: CPU results
count.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import published
from bench.session import Session, add_options
from reflow.flow import DiscreteVP, Windows, exact
from reflow.flow.solver import WindowSolver

FLOWS = ("mixture", "digits")
WINDOWS = (8, 4, 2, 1)
STEPS = (10, 4, 2)  # per window; 10 divides the schedule's 1000 indices at any number of windows here
FINE = 200  # steps over all time of the solve that stands for the exact flow of a network
PEERS = ("published", "published, fp64", "bf16 state", "fp32 state", "fp32 state and network")
Network = Callable[[Tensor, Tensor, torch.dtype], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser)
    parser.add_argument("--flow", nargs="+", choices=FLOWS, default=list(FLOWS))
    parser.add_argument("--samples", type=int, default=16, help="samples in every window")


@dataclasses.dataclass
class Flow:
    """network(z, timestep, dtype): eps at z, computed and returned in dtype. start(window, windows): z at the windows'
    starts. end(z, windows, window): where the exact flow takes them. All fp64 on the device."""

    name: str
    device: torch.device
    schedule: DiscreteVP
    network: Network
    start: Callable[[Tensor, Windows], Tensor]
    end: Callable[[Tensor, Windows, Tensor], Tensor]
    _known: dict[int, tuple[Tensor, Tensor, Tensor]] = dataclasses.field(default_factory=dict)

    def pairs(self, windows: Windows, samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """(window number of each row, starts, exact ends) with so many samples a window."""
        if len(windows) not in self._known:
            window = torch.arange(len(windows), device=self.device).repeat_interleave(samples)
            start = self.start(window, windows)
            self._known[len(windows)] = window, start, self.end(start, windows, window)
        return self._known[len(windows)]


def main(arguments: argparse.Namespace) -> int:
    session = Session("solver", arguments)
    samples = 2 if session.quick else arguments.samples
    for name in arguments.flow:
        flow: Flow | None = None
        for count in (2,) if session.quick else WINDOWS:
            for steps in (2,) if session.quick else STEPS:
                case, shape = f"{name}/{count} windows/{steps} steps", [count * samples, 4, 8, 8]
                cell = {"case": case, "dtype": "bf16", "shape": shape}
                done = all(session.recorder.done(session.key(**cell, peer=peer)) for peer in PEERS)
                if done or session.out_of_time():
                    continue
                flow = flow or FLOW[name](session, samples)
                for peer, row in errors(flow, Windows.uniform(count), steps, samples).items():
                    session.add(**cell, peer=peer, **row)
    return session.exit_code()


def errors(flow: Flow, windows: Windows, steps: int, samples: int) -> dict[str, dict[str, Any]]:
    """peer -> fields of its row."""
    window, start, end = flow.pairs(windows, samples)
    dt = torch.tensor(windows.t_end, dtype=torch.float64) - torch.tensor(windows.t_start, dtype=torch.float64)
    dt = dt.to(flow.device)[window].reshape(-1, 1, 1, 1)
    reference = (_ours(flow, windows, steps, start, window, torch.float64, torch.float64) - start) / dt
    truth = (end - start) / dt

    half = torch.bfloat16
    ends = {
        "published": lambda: (start.to(half), _published(flow, windows, steps, start.to(half), window, half)),
        "published, fp64": lambda: (start, _published(flow, windows, steps, start, window, torch.float64)),
        "bf16 state": lambda: (start.to(half), _bf16_state(flow, windows, steps, start.to(half), window)),
        "fp32 state": lambda: (start.float(), _ours(flow, windows, steps, start.float(), window, torch.float32, half)),
        "fp32 state and network": lambda: (
            start.float(),
            _ours(flow, windows, steps, start.float(), window, torch.float32, torch.float32),
        ),
    }
    rows = {}
    for peer in PEERS:
        first, last = ends[peer]()
        velocity = (last - first) / dt.to(first.dtype)  # in the peer's own precision, as it would train on it
        found = _compare(velocity.double(), reference, window, len(windows))
        error, angle = found["error"], found["one_minus_cosine"]
        rows[peer] = {
            "error": error,
            "deterministic": torch.equal(last, ends[peer]()[1]) if peer == "fp32 state" else None,
            "note": f"velocity error {error:.3g}, 1-cos {angle:.3g}, worst window {found['worst_window_error']:.3g}",
            "extra": {
                **{name: value for name, value in found.items() if name != "error"},
                "exact_flow_error": _compare(velocity.double(), truth, window, len(windows))["error"],
                "discretisation_error": _compare(reference, truth, window, len(windows))["error"],
                "windows": len(windows),
                "steps": steps,
                "flow": flow.name,
            },
        }
    return rows


def _compare(velocity: Tensor, reference: Tensor, window: Tensor, count: int) -> dict[str, float]:
    """Medians over samples, of the worst window too, and the pooled error, in which the largest samples count most."""
    difference, rows = (velocity - reference).flatten(1).norm(dim=1), reference.flatten(1).norm(dim=1)
    relative = difference / rows
    unit = torch.nn.functional.normalize(velocity.flatten(1)) - torch.nn.functional.normalize(reference.flatten(1))
    return {
        "error": float(relative.median()),
        "one_minus_cosine": float(unit.square().sum(1).median() / 2),
        "worst_window_error": max(float(relative[window == k].median()) for k in range(count)),
        "pooled_error": float(difference.norm() / rows.norm()),
    }


def _ours(
    flow: Flow, windows: Windows, steps: int, start: Tensor, window: Tensor, state: torch.dtype, network: torch.dtype
) -> Tensor:
    solver = WindowSolver(flow.schedule, windows, steps, device=start.device, dtype=state)
    return solver.solve(lambda z, t: flow.network(z, t, network), start, window, input_dtype=network)


def _bf16_state(flow: Flow, windows: Windows, steps: int, start: Tensor, window: Tensor) -> Tensor:
    """The trainer's steps with fp32 coefficients, the state rounded to bf16 after each: what the state alone costs."""
    solver = WindowSolver(flow.schedule, windows, steps, device=start.device)
    a, b, time = (table[:, window] for table in solver.steps_table())
    z = start
    for i in range(steps):
        output = flow.network(z, time[i], torch.bfloat16).float()
        z = (a[i].reshape(-1, 1, 1, 1) * z.float() + b[i].reshape(-1, 1, 1, 1) * output).to(torch.bfloat16)
    return z


def _published(flow: Flow, windows: Windows, steps: int, start: Tensor, window: Tensor, dtype: torch.dtype) -> Tensor:
    t_start, t_end = (torch.tensor(t, device=start.device)[window] for t in (windows.t_start, windows.t_end))
    settings = published.Settings(len(windows), steps)
    table = flow.schedule.alphas_cumprod.cpu().to(torch.float64 if dtype is torch.float64 else torch.float32)

    def network(z: Tensor, timestep: Tensor, conditioning: Any) -> Tensor:
        return flow.network(z, timestep, dtype)

    return published.solve(network, start, t_start, t_end, None, None, table, settings)


# ---- flows ---------------------------------------------------------------------------------------------------------


def _mixture(session: Session, samples: int) -> Flow:
    """Sixteen Gaussians in the digits' latent shape on SD's schedule, where the perfect network and flow are known."""
    from reflow.models.digits import SCHEDULER

    device = session.device
    generator = torch.Generator().manual_seed(session.seed)
    means = torch.randn(16, 4, 8, 8, generator=generator, dtype=torch.float64)
    data = exact.MixtureData(means.to(device), 0.3, torch.full((16,), 1 / 16, dtype=torch.float64, device=device))
    schedule = DiscreteVP.from_config(SCHEDULER)
    perfect = exact.network(data, schedule)

    def network(z: Tensor, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        return perfect(z.to(wide), timestep.to(wide)).to(dtype)

    def start(window: Tensor, windows: Windows) -> Tensor:
        draws = torch.Generator().manual_seed(session.seed + 1)
        chosen = torch.randint(len(means), (len(window),), generator=draws)
        x0 = means[chosen] + 0.3 * torch.randn(len(window), 4, 8, 8, generator=draws, dtype=torch.float64)
        noise = torch.randn(len(window), 4, 8, 8, generator=draws, dtype=torch.float64)
        alpha, sigma = schedule.alpha_sigma(torch.tensor(windows.t_start, dtype=torch.float64))
        alpha, sigma = (value.cpu()[window.cpu()].reshape(-1, 1, 1, 1) for value in (alpha, sigma))
        return (alpha * x0 + sigma * noise).to(device)

    def end(z: Tensor, windows: Windows, window: Tensor) -> Tensor:
        result = torch.empty_like(z)
        for k in range(len(windows)):
            rows = window == k
            result[rows] = data.solve(z[rows], schedule, windows.t_start[k], windows.t_end[k])
        return result

    return Flow("mixture", device, schedule, network, start, end)


def _digits(session: Session, samples: int) -> Flow:
    """The digits teacher with captions, from noise along its own trajectory."""
    from reflow.data import digits as data
    from reflow.models import registry
    from reflow.models.conditioning import denoise

    device = session.device
    base = registry.family("digits").load(device=device)
    schedule = DiscreteVP.from_config(base.scheduler_config)
    # Module.to: diffusers' own warns of modules to keep in fp32, and there are none here.
    unets = {
        dtype: torch.nn.Module.to(copy.deepcopy(base.unet), dtype).eval()
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    }
    captions = [data.captions(number % 10)[0] for number in range(samples)]
    conditioning = base.encode_prompts(captions)
    told = {dtype: conditioning.to(device, dtype) for dtype in unets}

    @torch.no_grad()
    def network(z: Tensor, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        rows = told[dtype].select(torch.arange(len(z), device=device) % samples)
        return denoise(unets[dtype], z.to(dtype), timestep, rows)

    def start(window: Tensor, windows: Windows) -> Tensor:
        """The fine fp64 solve from noise to every window's start."""
        generator = torch.Generator().manual_seed(session.seed)
        z = torch.randn(samples, 4, 8, 8, generator=generator, dtype=torch.float64).to(device)
        starts = []
        for k in range(len(windows)):
            starts.append(z)
            if k + 1 < len(windows):
                z = end(z, windows, torch.full((samples,), k, device=device))
        return torch.cat(starts)

    def end(z: Tensor, windows: Windows, window: Tensor) -> Tensor:
        steps = 2 if session.quick else FINE // len(windows)
        return _ours(flow, windows, steps, z, window, torch.float64, torch.float64)

    flow = Flow("digits", device, schedule, network, start, end)
    return flow


FLOW = {"mixture": _mixture, "digits": _digits}
