"""What is measured on the exact bed: distance to the flow itself from the same noises, and to the mixture that it comes from.

Every method is sampled from the same noises and labels, so that what differs is the method. Time runs from t=1 (noise) to t=0 (data).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor

from reflow.evaluation.measures.frechet import distance_of_moments, moments
from reflow.evaluation.metrics import paired_error
from reflow.experiments.beds import scans
from reflow.experiments.beds.exact import ExactBed, Model
from reflow.experiments.beds.mixture import CLASSES
from reflow.experiments.store import Store, elsewhere
from reflow.flow import ChordTable, Windows, network_time
from reflow_kernels import window_chord

SAMPLES = 2000
NOISE_SEED = 20_250_304


@dataclass(frozen=True)
class Reference:
    """Noise [N, D], labels [N] and the fine solve's samples [N, D], all fp32."""

    noise: Tensor
    labels: Tensor
    fine: Tensor
    guidance: float | None = None


def reference(bed: ExactBed, store: Store, *, samples: int = SAMPLES, guidance: float | None = None, steps: int = 300) -> Reference:
    """The noises that everything is measured from, and what the flow makes of them: kept in the store."""
    labels = torch.arange(samples) % CLASSES
    noise = torch.randn((samples, bed.mixture.means.shape[1]), generator=torch.Generator().manual_seed(NOISE_SEED))
    place = [elsewhere(bed.device)] if elsewhere(bed.device) else []
    what = json.dumps(["fine", bed.zero_snr, scans.digest(bed.scans), samples, guidance, steps, NOISE_SEED, *place])
    name = "fine-" + hashlib.sha256(what.encode()).hexdigest()[:16]
    kept = store.tensors(name, lambda: {"fine": bed.fine(noise.to(bed.device), labels.to(bed.device), guidance=guidance, steps=steps).cpu()}, what)
    return Reference(*(value.to(bed.device) for value in (noise, labels, kept["fine"])), guidance)


def of_samples(bed: ExactBed, found: Tensor, ref: Reference) -> dict[str, float]:
    """paired: mean over noises of the RMS pixel distance to the fine solve. frechet: of the pixels' moments to the mixture's exact ones.
    nll: -log p(x | label) in nats a pixel, of the mixture as the clean end of the table sees it. agreement: share of samples whose most
    probable class is the one that was asked for. In fp64 on the CPU, wherever the samples lie."""
    exact, found, labels = bed.mixture.to(torch.float64), found.cpu().double(), ref.labels.cpu()
    alpha, sigma = bed.clean()
    mean, covariance = exact.moments()
    covariance = alpha**2 * covariance + sigma**2 * torch.eye(len(mean), dtype=torch.float64)
    return {
        "paired": float(paired_error(found, ref.fine).mean()),
        "frechet": distance_of_moments(*moments(found), alpha * mean, covariance),
        "nll": float(-exact.log_likelihood(found, labels, alpha, sigma).mean()) / found.shape[1],
        "agreement": float((exact.most_likely(found, alpha, sigma) == labels).double().mean()),
    }


def of_student(bed: ExactBed, model: Model, table: ChordTable, ref: Reference, per_window: tuple[int, ...] = (1,), *,
               guidance: float | None = None) -> dict[str, dict[str, float]]:  # fmt: skip
    """`of_samples` at so many steps in each window: {steps in all: numbers}. guidance: of the student's own steps; what it learnt of guidance
    needs none."""
    found = {}
    for steps in per_window:
        sample = bed.sample(model, bed.student_solver(table, steps, guidance=guidance), ref.noise, ref.labels)
        found[str(steps * len(table))] = of_samples(bed, sample, ref)
    return found


def of_teacher(bed: ExactBed, steps: int, ref: Reference, *, method: str = "ddim") -> dict[str, float]:
    """`of_samples` of the teacher itself at so many steps."""
    solver = bed.solver(Windows.uniform(1), steps, guidance=ref.guidance, method=method)
    return of_samples(bed, bed.sample(bed.teacher, solver, ref.noise, ref.labels), ref)


@dataclass(frozen=True)
class Chords:
    """Exact chords to ask students about, of every window: z_start, z_end [N, D], window and labels [N]."""

    z_start: Tensor
    z_end: Tensor
    window: Tensor
    labels: Tensor


def chords(bed: ExactBed, windows: Windows, *, per_window: int = 400, steps: int = 60, seed: int = 4_242) -> Chords:
    """Windows solved finely from noised samples that no student was trained on."""
    generator = torch.Generator().manual_seed(seed)
    count = per_window * len(windows)
    labels, window = (value.to(bed.device) for value in (torch.arange(count) % CLASSES, torch.arange(count) // per_window))
    data = bed.mixture.sample(labels, generator)
    noise = torch.randn(data.shape, generator=generator).to(data)
    begin = bed.table(windows).start(data, noise, window)
    end = bed.solver(windows, min(steps, 900 // len(windows)), method="heun").solve(lambda z, t: bed.teacher(z, t, labels), begin, window)
    return Chords(begin, end, window, labels)


@torch.no_grad()
def profile(bed: ExactBed, model: Model, table: ChordTable, at: Chords, places: tuple[float, ...]) -> list[list[float]]:
    """Relative velocity error by window and place in it: [K][len(places)], RMS error over RMS velocity of the window's own chords.

    At a place tau in [0, 1] the student is asked at the chord's point; at 0 that is where a K-step sampler asks it."""
    errors = []
    for tau in places:
        t = table.time(at.window, torch.full((len(at.window),), tau, dtype=table.dtype, device=table.device))
        z, velocity, _ = window_chord(at.z_start, at.z_end, table.tau(at.window, t), table.dt[at.window])
        state, output = table.velocity_coefficients(at.window, t)
        found = state[:, None] * z + output[:, None] * model(z, network_time(t), at.labels)
        off, size = ((x.double() ** 2).mean(1) for x in (found - velocity, velocity))
        errors.append([float((off[at.window == k].mean() / size[at.window == k].mean()).sqrt()) for k in range(len(table))])
    return [list(column) for column in zip(*errors, strict=True)]
