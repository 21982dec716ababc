"""Errors of a velocity's direction against errors of its size, of equal length.

    reflow experiment direction-vs-magnitude --bed exact

Figure 1b of ProReflow (arXiv 2503.04824) disturbs one of the two and finds that direction matters more. At every step of the teacher its
velocity v is replaced by one that is 2 |v| sin(theta / 2) away: turned by theta towards a random direction, towards a direction in which
the data vary (the difference of two samples of the class), or made longer or shorter. A disturbance is drawn anew at each step, or once a
sample and kept, as an error that is learnt would be: the sign of a magnitude's bias, and the direction that is turned to; a bias of size
that all samples share stands beside them. Randomness averages
out over steps in one and adds up in the other, so arms are compared within a kind. One row an arm, angle, number of steps and seed of the
disturbance; nothing is trained.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reflow.experiments import cells
from reflow.experiments.beds import measure
from reflow.experiments.beds.exact import ExactBed
from reflow.experiments.figures import COLOURS, canvas, line_over, save
from reflow.experiments.opened import opened
from reflow.flow import Windows

ARMS = ("random direction", "direction of the data", "magnitude")
BIASES = {"all shorter": -1.0, "all longer": 1.0}  # kept errors of size that all samples share
ANGLES = (0.1, 0.2, 0.4, 0.8)
STEPS = (32, 4)
MEASURES = {"paired": "paired error", "frechet": "Fréchet distance", "nll": "-log p a pixel (nats)", "agreement": "class agreement"}


def run(out: Path, *, bed: str = "exact", data: str = "", seeds: int = 3, quick: bool = False, report: bool = False, device: str = "cpu") -> None:
    """Disturb, measure, tabulate and draw. quick: the seconds-long form of the tests. report: make nothing, tell what is there.
    device: where the bed computes. data: of --bed mnist."""
    at = opened("direction-vs-magnitude", out, bed=bed, data=data, quick=quick, report=report, device=device)
    angles, counts = ((0.2, 0.8), (4,)) if quick else (ANGLES, STEPS)
    place = at.bed
    ref = at.reference()
    asked = [{"arm": arm, "kept": kept, "angle": angle, "steps": steps, "seed": seed}
             for seed in range(seeds) for steps in counts for kept in (False, True) for arm in (*ARMS, *(BIASES if kept else ()))
             for angle in angles if arm not in BIASES or seed == 0]  # fmt: skip

    def work(cell: cells.Cell) -> dict[str, Any]:
        found = disturbed(place, ref, cell["arm"], cell["angle"], cell["steps"], cell["kept"], cell["seed"])
        return measure.of_samples(place, found, ref)

    rows = at.make(asked, work)
    found = {"undisturbed": {steps: measure.of_teacher(place, steps, ref) for steps in counts}, "arms": gathered(rows)}
    draw(at.path("png"), rows, found, angles, counts)
    at.finish(rows, text(found, angles, counts), found)


def turned(v: Tensor, towards: Tensor, angle: float) -> Tensor:
    """v [B, D] turned by an angle towards a direction [B, D]; as long as before, and 2 |v| sin(angle / 2) away."""
    unit = v / v.norm(dim=1, keepdim=True)
    side = towards - (towards * unit).sum(1, keepdim=True) * unit
    side = side / side.norm(dim=1, keepdim=True)
    return v.norm(dim=1, keepdim=True) * (math.cos(angle) * unit + math.sin(angle) * side)


def disturbed(bed: ExactBed, ref: measure.Reference, arm: str, angle: float, steps: int, kept: bool, seed: int) -> Tensor:
    """Samples [N, D] of the teacher's `steps` steps, each disturbed."""
    generator = torch.Generator().manual_seed(31_337 + seed)
    solver, z, drawn = bed.solver(Windows.uniform(steps), 1), ref.noise, None
    for k in range(steps):
        window = torch.full((len(z),), k, device=bed.device)
        move = solver.solve(lambda x, t: bed.teacher(x, t, ref.labels), z, window) - z
        if drawn is None or not kept:
            drawn = draws(bed, ref, arm, generator)
        z = z + (move * (1.0 + 2.0 * math.sin(angle / 2) * drawn) if arm == "magnitude" or arm in BIASES else turned(move, drawn, angle))
    return z


def draws(bed: ExactBed, ref: measure.Reference, arm: str, generator: torch.Generator) -> Tensor:
    """Signs [N, 1] of a magnitude's error, or directions [N, D] to turn to."""
    if arm in BIASES:
        return torch.full((len(ref.noise), 1), BIASES[arm]).to(ref.noise)
    if arm == "magnitude":
        return torch.randint(0, 2, (len(ref.noise), 1), generator=generator).to(ref.noise) * 2 - 1
    if arm == "random direction":
        return torch.randn(ref.noise.shape, generator=generator).to(ref.noise)
    return bed.mixture.sample(ref.labels, generator) - bed.mixture.sample(ref.labels, generator)


def gathered(rows: list[cells.Row]) -> list[dict[str, Any]]:
    """Each arm's measures over seeds, and their paired differences to the magnitude's of the same angle, steps and kind."""
    found = []
    for arm, kept, angle, steps in dict.fromkeys(tuple(r["cell"][key] for key in ("arm", "kept", "angle", "steps")) for r in rows):
        mine = cells.select(rows, arm=arm, kept=kept, angle=angle, steps=steps)
        size = cells.select(rows, arm="magnitude", kept=kept, angle=angle, steps=steps)
        line = {"arm": arm, "kept": kept, "angle": angle, "steps": steps}
        line.update({key: cells.over_seeds(mine, lambda r, key=key: r[key]).as_dict() for key in MEASURES})
        if arm not in BIASES:  # without chance: one seed tells all
            line["less_magnitude"] = {key: cells.paired(mine, size, lambda r, key=key: r[key]).as_dict() for key in MEASURES}
        found.append(line)
    return found


def text(found: dict[str, Any], angles: tuple[float, ...], counts: tuple[int, ...]) -> str:
    blocks = []
    for steps in counts:
        own = found["undisturbed"][steps]
        lines = [["undisturbed", "", "", *(f"{own[key]:.3f}" for key in MEASURES), ""]]
        for line in found["arms"]:
            if line["steps"] == steps and line["angle"] in (angles[-3:][0], angles[-1]):
                less = cells.told(cells.Interval(**line["less_magnitude"]["frechet"]), 2, True) if "less_magnitude" in line else ""
                each = [cells.told(cells.Interval(**line[key]), 3) for key in MEASURES]
                lines.append(
                    [
                        line["arm"],
                        "kept" if line["kept"] else "anew",
                        line["angle"],
                        *each,
                        "" if line["arm"] == "magnitude" else less,
                    ]
                )
        blocks.append(
            f"{steps} steps\n\n" + cells.table(["what is wrong", "drawn", "angle", *MEASURES.values(), "Fréchet distance less magnitude's"], lines)
        )
    return "\n".join(blocks) + "\n± is half a 95 % interval over seeds of the disturbance; noises and labels are the same in all rows.\n"


def draw(path: Path, rows: list[cells.Row], found: dict[str, Any], angles: tuple[float, ...], counts: tuple[int, ...]) -> None:
    figure, axes = canvas(len(counts), 3, width=13.0, height=3.7 * len(counts))
    for r, steps in enumerate(counts):
        for axis, key in zip(axes[3 * r : 3 * r + 3], ("paired", "frechet", "nll"), strict=True):
            for arm, colour in zip(ARMS, (COLOURS[4], COLOURS[2], COLOURS[0]), strict=True):
                for kept in (False, True):
                    each = [cells.over_seeds(cells.select(rows, arm=arm, kept=kept, angle=a, steps=steps), lambda x, key=key: x[key]) for a in angles]
                    line_over(axis, angles, each, f"{arm}, {'kept' if kept else 'anew each step'}", colour, style="-" if kept else ":")
            for arm, colour in zip(BIASES, (COLOURS[1], COLOURS[6]), strict=True):
                each = [cells.over_seeds(cells.select(rows, arm=arm, kept=True, angle=a, steps=steps), lambda x, key=key: x[key]) for a in angles]
                line_over(axis, angles, each, arm, colour, marker="", style="-.")
            axis.axhline(found["undisturbed"][steps][key], color="0.35", linestyle="--", linewidth=1)
            axis.set(xlabel="angle theta; every error is 2 |v| sin(theta / 2) long", ylabel=MEASURES[key], title=f"{steps} steps")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save(figure, path)
