"""Samplers that draw noise against samplers that draw none, by evaluations and by how wrong the score is.

    reflow experiment stochasticity --bed exact

The 6.s978 project, "Diffusion Meets Flow Matching", EDM (arXiv 2206.00364) and Restart (2306.14878) say that deterministic samplers win at few
evaluations and stochastic ones at many, since noise washes out the errors that an imperfect score has made; a perfect score makes none. The
score is exact, or eps plus 5 % or 15 % (in RMS of eps over the table) of a fixed random field of (z, t), the same error at the same place as a
trained network's is: even over time in v, with a length of .5 in RMS pixels (samples are wrong in ways of their own) or 4 (nearly one error
for all), or of the first its part where sigma > alpha (errors that later noise could wash out) or the rest. Paths start at noised data, so that
nothing else is wrong, or, with the exact score, at pure noise, which the table's last entry is not quite. That late errors favour the flow and
early ones the SDE is the finding of Cao et al. (2306.02063). Three pairs differ in their noise alone: ancestral and DDIM, EDM's churn and Heun
on Karras's levels, the reverse VP SDE and the Euler steps of its flow. Restart spends half of its steps on ways back from a noise level of .06
to .30 and down again. Heun's kind takes two evaluations a step, of an odd number one less. Only laws are compared: Fréchet distance of pixels
to the exact moments, and -log p. One row a sampler, score, number of evaluations and seed (starts, noises and field); nothing is trained.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reflow.experiments import cells
from reflow.experiments.beds import measure, restart, samplers
from reflow.experiments.beds.exact import ExactBed
from reflow.experiments.beds.mixture import CLASSES
from reflow.experiments.beds.samplers import Diffusion, Field, Network
from reflow.experiments.figures import COLOURS, canvas, save
from reflow.experiments.opened import opened
from reflow.flow import Windows

EVALUATIONS = (5, 10, 20, 50, 100, 200, 500)
CHURN = 40.0
DETERMINISTIC = {"DDIM": COLOURS[0], "Heun": COLOURS[1], "Heun, Karras's levels": COLOURS[2], "VP flow, Euler": COLOURS[6]}
STOCHASTIC = {"ancestral": COLOURS[0], "EDM churn": COLOURS[2], "VP SDE": COLOURS[6], "VE SDE": COLOURS[3], "sub-VP SDE": COLOURS[4],
              "Restart": COLOURS[5]}  # fmt: skip
PAIRS = {"ancestral": "DDIM", "EDM churn": "Heun, Karras's levels", "VP SDE": "VP flow, Euler"}
EXACT = "exact"
# name -> (share of eps, length of the field in RMS pixels, where it is, where paths start)
SCORES = {
    EXACT: (0.0, 0.0, "", "data"),
    "exact, from pure noise": (0.0, 0.0, "", "noise"),
    "5 % wrong": (0.05, 0.5, "all", "data"),
    "15 % wrong": (0.15, 0.5, "all", "data"),
    "15 %, one error for all": (0.15, 4.0, "all", "data"),
    "15 %, its noisy half only": (0.15, 0.5, "noisy", "data"),
    "15 %, its clean half only": (0.15, 0.5, "clean", "data"),
}
SAMPLES = 1500
MEASURES = {"frechet": "Fréchet distance", "nll": "-log p a pixel (nats)"}
BEST = "the best of each kind"


class NoisyHalf(Field):
    """The field where there is more noise than data."""

    def __call__(self, z: Tensor, alpha: float, sigma: float) -> Tensor:
        return super().__call__(z, alpha, sigma) if sigma > alpha else torch.zeros_like(z)


class CleanHalf(Field):
    def __call__(self, z: Tensor, alpha: float, sigma: float) -> Tensor:
        return super().__call__(z, alpha, sigma) if sigma <= alpha else torch.zeros_like(z)


HALVES = {"all": Field, "noisy": NoisyHalf, "clean": CleanHalf}


def run(out: Path, *, bed: str = "exact", data: str = "", seeds: int = 3, quick: bool = False, report: bool = False, device: str = "cpu") -> None:
    """Sample, measure, tabulate and draw. quick: the seconds-long form of the tests. report: make nothing, tell what is there.
    device: where the bed computes. data: of --bed mnist."""
    at = opened("stochasticity", out, bed=bed, data=data, quick=quick, report=report, device=device)
    place, counts, samples = at.bed, (5, 20) if quick else EVALUATIONS, 100 if quick else SAMPLES
    scores = ("exact", "15 % wrong") if quick else tuple(SCORES)
    asked = [{"sampler": "data", "score": "", "evaluations": 0, "samples": samples, "seed": seed} for seed in range(seeds)]
    asked += cells.seeded([{"sampler": name, "score": score, "evaluations": n, "samples": samples}
                           for score in scores for name in (*DETERMINISTIC, *STOCHASTIC) for n in counts], seeds)  # fmt: skip

    def work(cell: cells.Cell) -> dict[str, Any]:
        labels = torch.arange(cell["samples"], device=place.device) % CLASSES
        return of_law(place, sampled(place, cell, labels), labels)

    rows = at.make(asked, work, "experiments/beds/samplers.py", "experiments/beds/restart.py")
    found = {"samplers": gathered(rows), "pairs": compared(rows)}
    draw(at.path("png"), rows, scores, counts)
    at.finish(rows, text(found, scores, counts), found)


def of_law(bed: ExactBed, found: Tensor, labels: Tensor) -> dict[str, float]:
    """What `measure.of_samples` tells of a law, without a partner from the same noise."""
    whole = measure.of_samples(bed, found, measure.Reference(found, labels, found))
    return {key: whole[key] for key in MEASURES}


def sampled(bed: ExactBed, cell: cells.Cell, labels: Tensor) -> Tensor:
    """Samples [N, D] at the clean end of the table."""
    generator = torch.Generator().manual_seed(88_001 + cell["seed"])
    data = bed.mixture.sample(labels, generator)
    drawn = torch.randn(data.shape, generator=generator).to(data)
    if cell["sampler"] == "data":
        return bed.clean()[0] * data + bed.clean()[1] * drawn
    share, length, where, starts = SCORES[cell["score"]]
    field = field_of(bed, length, where, cell["seed"]) if share else None
    network, (largest, smallest) = Network(bed.mixture, labels, share, field), samplers.ends(bed)
    shrink = 1.0 / math.hypot(1.0, largest)
    x = drawn if starts == "noise" else shrink * data + largest * shrink * drawn
    return sample(bed, cell["sampler"], network, x, (largest, smallest), cell["evaluations"], generator)


@lru_cache(maxsize=8)
def field_of(bed: ExactBed, length: float, where: str, seed: int) -> Field:
    """As large as eps over the whole table, then cut: the halves add up to the whole."""
    whole = samplers.like_eps(bed, Field.drawn(bed.mixture.means.shape[1], length, seed, dtype=bed.dtype, device=bed.device))
    return HALVES[where](whole.frequencies, whole.phases, whole.values, whole.even, whole.scale)


def sample(
    bed: ExactBed, name: str, network: Network, x: Tensor, levels: tuple[float, float], evaluations: int, generator: torch.Generator
) -> Tensor:
    """From x [N, D] at the noisy end of the table, where alpha^2 + sigma^2 = 1, to its clean end; levels: sigma / alpha at both."""
    if name in ("DDIM", "Heun"):
        steps, method = (evaluations, "ddim") if name == "DDIM" else (evaluations // 2, "heun")
        return bed.sample(network.on(bed.schedule), bed.solver(Windows.uniform(1), steps, method=method), x, network.labels)
    if name == "ancestral":
        return samplers.ancestral(network, x, *samplers.table(bed, evaluations), generator)
    if name in ("EDM churn", PAIRS["EDM churn"]):
        churn = CHURN if name == "EDM churn" else 0.0
        z = samplers.churned(network, x * math.hypot(1.0, levels[0]), samplers.karras(*levels, evaluations // 2), generator, churn=churn)
        return z / math.hypot(1.0, levels[1])
    if name == "Restart":
        z = restart.restarted(network, x * math.hypot(1.0, levels[0]), *levels, evaluations // 2, generator)
        return z / math.hypot(1.0, levels[1])
    diffusion = Diffusion(name.split()[0], *levels)
    first, last = (math.hypot(*diffusion.alpha_sigma(s)) for s in diffusion.times(1))
    return samplers.reversed_in_time(network, x * first, diffusion, evaluations, generator, noise=0.0 if "flow" in name else 1.0) / last


def gathered(rows: list[cells.Row]) -> list[dict[str, Any]]:
    """Each sampler's law at each number of evaluations, and what is wrong with it because the score or the start is: less the exact one's, with the
    same noises."""
    found = []
    for name, score, n in dict.fromkeys(tuple(r["cell"][key] for key in ("sampler", "score", "evaluations")) for r in rows):
        mine = cells.select(rows, sampler=name, score=score, evaluations=n)
        each = {key: cells.over_seeds(mine, lambda r, key=key: r[key]).as_dict() for key in MEASURES}
        line = {"sampler": name, "score": score, "evaluations": n, **each}
        if score not in ("", EXACT):
            exact = cells.select(rows, sampler=name, score=EXACT, evaluations=n)
            line["less_exact"] = {key: cells.paired(mine, exact, lambda r, key=key: r[key]).as_dict() for key in MEASURES}
        found.append(line)
    return found


def compared(rows: list[cells.Row]) -> list[dict[str, Any]]:
    """Of each pair (and of the best of each kind) the stochastic one's distance less the other's, and where it goes below: Fréchet distance, and
    the distance of -log p to that of as many data, whose excess and lack are as bad."""
    found = []
    counts = sorted({r["cell"]["evaluations"] for r in rows} - {0})
    seeds = sorted({r["cell"]["seed"] for r in rows})
    data = {r["cell"]["seed"]: r["result"]["nll"] for r in cells.select(rows, sampler="data")}
    value = {}
    for row in rows:
        place = tuple(row["cell"][key] for key in ("sampler", "score", "evaluations", "seed"))
        value["frechet", *place] = row["result"]["frechet"]
        value["nll", *place] = abs(row["result"]["nll"] - data[row["cell"]["seed"]])

    def best(key: str, names: tuple[str, ...], score: str, n: int, seed: int) -> float:
        """Of the sampler that is best on the other seeds, so that the luck of a seed does not choose."""
        others = [s for s in seeds if s != seed] or seeds
        chosen = min(names, key=lambda name: sum(value[key, name, score, n, s] for s in others))
        return value[key, chosen, score, n, seed]

    for score in dict.fromkeys(r["cell"]["score"] for r in rows if r["cell"]["score"]):
        for mine, theirs in (*(((a,), (b,)) for a, b in PAIRS.items()), (tuple(STOCHASTIC), tuple(DETERMINISTIC))):
            for key in MEASURES:
                less = {seed: [best(key, mine, score, n, seed) - best(key, theirs, score, n, seed) for n in counts] for seed in seeds}
                places = [crossing(counts, less[seed]) for seed in seeds]
                pair = f"{mine[0]} less {theirs[0]}" if len(mine) == 1 else BEST
                line: dict[str, Any] = {"measure": key, "score": score, "pair": pair, "crossings": places}
                line["less"] = {str(n): cells.t_interval([less[seed][i] for seed in seeds]).as_dict() for i, n in enumerate(counts)}
                if all(p is not None and p > counts[0] for p in places):
                    line["log_crossing"] = cells.t_interval([math.log(p) for p in places if p]).as_dict()
                found.append(line)
    return found


def crossing(counts: list[int], less: list[float]) -> float | None:
    """The number of evaluations, read off between the counts on a log scale, from which the difference stays below zero; None where it is
    not below at the last count, the first count where it never is above."""
    if less[-1] >= 0:
        return None
    above = [i for i, value in enumerate(less) if value >= 0]
    if not above:
        return float(counts[0])
    i = above[-1]
    share = less[i] / (less[i] - less[i + 1])
    return math.exp(math.log(counts[i]) + share * (math.log(counts[i + 1]) - math.log(counts[i])))


def told_crossing(line: dict[str, Any], last: int) -> str:
    if "log_crossing" in line:
        one = cells.Interval(**line["log_crossing"])
        between = "" if one.low is None else f" [{math.exp(one.low):.0f}, {math.exp(one.high):.0f}]"
        return f"{math.exp(one.mean):.0f}{between}"
    never = sum(place is None for place in line["crossings"])
    if never == len(line["crossings"]):
        return f"not crossed up to {last}"
    each = ", ".join(f"not up to {last}" if p is None else f"{p:.0f}" for p in line["crossings"])
    return f"by seed: {each}"


def text(found: dict[str, Any], scores: tuple[str, ...], counts: tuple[int, ...]) -> str:
    blocks = []
    data = next(line for line in found["samplers"] if line["sampler"] == "data")
    for key, said in MEASURES.items():
        lines = [["the data themselves", "", *[""] * (len(counts) - 1), cells.told(cells.Interval(**data[key]), 3)]]
        for score in scores:
            for name in (*DETERMINISTIC, *STOCHASTIC):
                mine = {line["evaluations"]: line for line in found["samplers"] if (line["score"], line["sampler"]) == (score, name)}
                lines.append([name, score, *(cells.told(cells.Interval(**mine[n][key]), 3) for n in counts)])
        blocks.append(f"{said}:\n\n" + cells.table(["sampler", "score", *counts], lines))
    worse = [score for score in scores if score != EXACT]
    for key, said in MEASURES.items():
        lines = []
        for name in (*DETERMINISTIC, *STOCHASTIC):
            mine = {x["score"]: x for x in found["samplers"] if (x["sampler"], x["evaluations"]) == (name, counts[-1])}
            lines.append([name, *(cells.told(cells.Interval(**mine[score]["less_exact"][key]), 4, True) for score in worse)])
        blocks.append(f"{said} at {counts[-1]}, less that of the exact score from data:\n\n" + cells.table(["sampler", *worse], lines))
    for measure_of, said in (("frechet", MEASURES["frechet"]), ("nll", "distance of -log p to the data's")):
        lines = []
        for line in (x for x in found["pairs"] if x["measure"] == measure_of):
            each = [cells.told(cells.Interval(**line["less"][str(n)]), 3, True) for n in counts]
            lines.append([line["score"], line["pair"], *each, told_crossing(line, counts[-1])])
        blocks.append(f"{said}, stochastic less deterministic:\n\n" + cells.table(["score", "pair", *counts, "crosses at [95 %]"], lines))
    end = "Columns are evaluations. ± is half a 95 % interval over seeds, of paired differences where they are differences; of each kind the best on"
    return "\n".join(blocks) + f"\n{end} the other seeds counts.\n"


def draw(path: Path, rows: list[cells.Row], scores: tuple[str, ...], counts: tuple[int, ...]) -> None:
    figure, axes = canvas(2, 4, width=12.6, height=6.4)
    floor = cells.over_seeds(cells.select(rows, sampler="data"), lambda x: x["frechet"]).mean
    for axis, score in zip(axes, scores, strict=False):
        for names, style, mark in ((DETERMINISTIC, "-", "o"), (STOCHASTIC, "--", "^")):
            for name, colour in names.items():
                mine = [cells.over_seeds(cells.select(rows, sampler=name, score=score, evaluations=n), lambda x: x["frechet"]) for n in counts]
                width = [one.half_width or 0.0 for one in mine]
                axis.errorbar(counts, [one.mean for one in mine], width, label=name, color=colour, linestyle=style, marker=mark, markersize=3.5,
                              linewidth=1.4, elinewidth=0.7)  # fmt: skip
        axis.axhline(floor, color="0.35", linestyle=":", linewidth=1.2, label="as many data")
        axis.set(xscale="log", yscale="log", ylim=(0.8 * floor, 40 * floor), title=score, xlabel="evaluations")
        axis.set_xticks(counts, [str(n) for n in counts], minor=False)
        ticks = [floor, *(v for v in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0) if 1.1 * floor < v < 40 * floor)]
        axis.set_yticks(ticks, [f"{v:.2g}" for v in ticks], minor=False)
        axis.minorticks_off()
    for axis in (axes[0], axes[4]):
        axis.set_ylabel(MEASURES["frechet"])
    for axis in axes[len(scores) :]:
        axis.set_axis_off()
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center", frameon=False)
    save(figure, path)
