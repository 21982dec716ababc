"""One network read as diffusion and as flow, and in whose coordinates paths are straight.

    reflow experiment conversions --bed exact

"Diffusion Meets Flow Matching" (2024) says that DDIM and Euler of a flow are one sampler, so that a network trained as VP, EDM or sub-VP is a
flow-matching network whose input is z / (alpha + sigma) at time sigma / (alpha + sigma); and that flow matching's paths are straight only for a
single data point, while for wide data those of VP can be straighter. Readings: the closed form as a network of each family, sampled as that
family does, by Euler of the flow that it reads as, by the product's solver, and as the networks of the other families at the same noise levels;
and a trained student read as eps, as EDM's D and as a flow. Straightness: of the flow's own paths and of students after one and after four
windows, in z over the table's t, z / (alpha + sigma), z / sqrt(alpha^2 + sigma^2) over the angle, and z / alpha over sigma / alpha. Width: the
data (means and deviations) times .1 to 10, straightness of flow and VP paths and error of their Euler steps of equal length; data are the bed's
or one Gaussian of equal variance in all directions. One row a question, setting and seed (of noise, and of training where there is one).
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reflow.evaluation.metrics import paired_error
from reflow.experiments import cells
from reflow.experiments.beds import readings
from reflow.experiments.beds.exact import ExactBed, student, untrained
from reflow.experiments.beds.mixture import CLASSES
from reflow.experiments.beds.readings import COORDINATES, bent, families
from reflow.experiments.beds.students import Stage, Student
from reflow.experiments.figures import COLOURS, canvas, line_over, save
from reflow.experiments.opened import Opened, opened
from reflow.flow import Windows, WindowSolver
from reflow.flow.exact import network
from reflow.flow.prediction import ddim_step

DATA = ("digits", "one Gaussian")
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
STEPS = (1, 2, 4, 8, 16, 32)
PATH = 32
TIMES: dict[str, tuple[tuple[str, Any], ...]] = {"near start": (), "uniform": (("time_density", "uniform"),)}
DIFFERENCES = {"euler": "Euler of the flow", "product": "the product's solver", "others": "the other families' networks",
               "single": "Euler of the flow, fp32", "not rescaled": "input not rescaled (control)"}  # fmt: skip
BENT = {"deviation": "deviation of v over v", "bow": "1 less chord over arc", "rfpp": "mean of (v - chord)²"}


def run(out: Path, *, bed: str = "exact", data: str = "", seeds: int = 3, quick: bool = False, report: bool = False, device: str = "cpu") -> None:
    """Train, measure, tabulate and draw. quick: the seconds-long form of the tests. report: make nothing, tell what is there.
    device: where the bed computes. data: of --bed mnist."""
    at = opened("conversions", out, bed=bed, data=data, quick=quick, report=report, device=device)
    count, steps = (20, 6) if quick else (500, 600)
    asked: list[cells.Cell] = [{"part": "readings", "family": name, "count": count} for name in families(at.bed)]
    asked.append({"part": "trained", "steps": steps, "count": count})
    asked += [{"part": "paths", "windows": k, "times": times, "steps": steps, "count": count}
              for k in ((0, 1) if quick else (0, 1, 4)) for times in (tuple(TIMES)[: 1 if quick else None] if k else ("",))]  # fmt: skip
    asked += [{"part": "width", "data": kind, "factor": factor, "count": count} for kind in DATA for factor in (FACTORS[::2] if quick else FACTORS)]
    work = {"readings": of_readings, "trained": of_trained, "paths": of_paths, "width": of_width}
    rows = at.make(cells.seeded(asked, seeds), lambda cell: work[cell["part"]](at, cell, range(seeds)), "experiments/beds/readings.py")
    found = gathered(rows)
    draw(at.path("png"), found)
    at.finish(rows, text(found), found)


def drawn(bed: ExactBed, cell: cells.Cell, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(51_511 + cell["seed"])
    shape = (cell["count"], bed.mixture.means.shape[1])
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return noise.to(bed.device, dtype), torch.arange(cell["count"], device=bed.device) % CLASSES


def of_readings(at: Opened, cell: cells.Cell, seeds: range) -> dict[str, Any]:
    """Largest difference of a pixel to DDIM in the family's own coordinates, by number of steps."""
    bed = replace(at.bed, dtype=torch.float64)
    noise, labels = drawn(bed, cell)
    known, found = families(bed), {}
    own = known[cell["family"]]
    nets = {name: network(bed.mixture.of(labels), f.schedule, f.kind) for name, f in known.items()}
    mine = nets[cell["family"]]
    for steps in (8,) if at.quick else (8, PATH):
        times = readings.flow_times(own, steps)
        x = times[0] * noise  # where the data are nearly forgotten
        should = readings.ddim(own, mine, x, steps)
        product = through_product(own, mine, x, steps)
        others = [readings.euler(f, nets[name], x, times) for name, f in known.items() if name not in (cell["family"], "VP, table")]
        single = network(at.bed.mixture.to(torch.float32, at.bed.device).of(labels), own.schedule, own.kind)
        found[str(steps)] = {
            "euler": largest(readings.euler(own, mine, x, times), should),
            "product": largest(product, should),
            "others": max(largest(value, should) for value in others),
            "single": largest(readings.euler(own, single, x.float(), times).double(), should),
            "not rescaled": largest(readings.euler(own, mine, x, times, rescaled=False), should),
        }
    return found


def largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def through_product(family: readings.Family, net: readings.Network, x: Tensor, steps: int) -> Tensor:
    """x at the clean end by `WindowSolver` on the family's schedule."""
    solver = WindowSolver(family.schedule, family.windows, steps, prediction_type=family.kind, device=x.device, dtype=torch.float64)
    first, last = (sum(family.schedule.alpha_sigma(t)) for t in family.grid(1))
    window = torch.zeros(len(x), dtype=torch.long, device=x.device)
    return solver.solve(lambda z, timestep: net(z, exact_time(family, timestep, steps)), x * first, window) / last


def exact_time(family: readings.Family, timestep: Tensor, steps: int) -> Tensor:
    """The timestep in fp64: solvers tell networks fp32, whose rounding is no matter of the reading."""
    known = family.schedule.timestep(family.grid(steps)).to(timestep.device)
    return known[(known - timestep[0].double()).abs().argmin()].expand(len(timestep))


def of_trained(at: Opened, cell: cells.Cell, seeds: range) -> dict[str, Any]:
    """Largest difference of a student's readings to its own DDIM at the table's levels; how far it is from the exact network."""
    bed = replace(at.bed, dtype=torch.float64)
    noise, labels = drawn(bed, cell)
    spec = Student((Stage(1, cell["steps"]),), seed=cell["seed"])
    at.trained(spec, seeds)
    model, family = student(bed, at.correction(spec).double()), families(bed)["VP, table"]
    x = noise * readings.flow_times(family, 1)[0]

    def net(z: Tensor, timestep: Tensor) -> Tensor:
        return model(z, timestep, labels)

    should, times = readings.ddim(family, net, x, PATH), readings.flow_times(family, PATH)
    alpha, sigma = family.schedule.alpha_sigma(family.grid(PATH))
    timestep, z = family.schedule.timestep(family.grid(PATH)).to(x), x / (1.0 - times[0])
    for i in range(PATH):  # EDM's own Euler: dz / dsigma = (z - D) / sigma at levels sigma / alpha
        a, level, after = alpha[i], sigma[i] / alpha[i], sigma[i + 1] / alpha[i + 1]
        denoised = ddim_step("epsilon", net(a * z, timestep[i].expand(len(z))), a * z, a, sigma[i], 1.0, 0.0)
        z = z + (after - level) * (z - denoised) / level
    exact = readings.ddim(family, lambda v, t: bed.teacher(v, t, labels), x, PATH)
    return {"euler": largest(readings.euler(family, net, x, times), should), "edm": largest(z * (1.0 - times[-1]), should),
            "from_exact": largest(exact, should)}  # fmt: skip


def of_paths(at: Opened, cell: cells.Cell, seeds: range) -> dict[str, Any]:
    """Straightness in each coordinates, over the whole of time and (in_4) the mean over four windows."""
    bed = at.bed
    noise, labels = drawn(bed, cell, bed.dtype)
    times = Windows.uniform(PATH)
    if cell["windows"]:
        spec = Student((Stage(cell["windows"], cell["steps"], TIMES[cell["times"]]),), seed=cell["seed"])
        model, table = at.trained(spec, seeds)
        found = {"": bed.path(model, WindowSolver.from_student(table, times, 1), noise, labels)}
        bare = WindowSolver.from_student(table, times, 1)
        found["untrained"] = bed.path(untrained(bed), bare, noise, labels)
    else:
        found = {"": bed.path(bed.teacher, bed.solver(times, 2 if at.quick else 8, method="heun"), noise, labels)}
    alpha, sigma = bed.schedule.alpha_sigma(torch.tensor(times.boundaries, dtype=torch.float64))
    result: dict[str, Any] = {}
    for prefix, states in found.items():
        whole = {"table": (states, list(times.boundaries))}
        for name, (scale, place) in COORDINATES.items():
            whole[name] = ([z / float(c) for z, c in zip(states, scale(alpha, sigma), strict=True)], place(alpha, sigma).tolist())
        for name, (path, when) in whole.items():
            pieces = [bent(path[i : i + PATH // 4 + 1], when[i : i + PATH // 4 + 1])["deviation"] for i in range(0, PATH, PATH // 4)]
            result[f"{prefix} {name}".strip()] = {**bent(path, when), "in_4": sum(pieces) / 4}
    return result


def of_width(at: Opened, cell: cells.Cell, seeds: range) -> dict[str, Any]:
    """Straightness and error at n Euler steps, in shares of the data's own scale, of flow and VP paths of scaled data."""
    bed = replace(at.bed, dtype=torch.float64)
    noise, labels = drawn(bed, cell)
    mixture, quick = bed.mixture, at.quick
    if cell["data"] == DATA[1]:
        mixture, labels = readings.unit_gaussian(mixture), torch.zeros_like(labels)
    mixture = readings.scaled(mixture, cell["factor"])
    fine = {kind: readings.straight_steps(mixture, labels, noise, kind, 40 if quick else 320, heun=True) for kind in ("flow", "VP")}
    every = len(fine["flow"]) // 20
    spans, result = {"flow": 1.0, "VP": math.pi / 2}, {}
    for kind, states in fine.items():
        own = states[::every]
        result[kind] = bent(own, [spans[kind] * (1.0 - i / (len(own) - 1)) for i in range(len(own))])
        ends = {str(n): readings.straight_steps(mixture, labels, noise, kind, n)[-1] for n in STEPS}
        result[kind]["errors"] = {n: float(paired_error(z, fine["VP"][-1]).mean()) / cell["factor"] for n, z in ends.items()}
    result["fine"] = float(paired_error(fine["flow"][-1], fine["VP"][-1]).mean()) / cell["factor"]  # two solves of one map
    result["deviation_of_data"] = float(mixture.moments()[1].diagonal().mean().sqrt())
    return result


def gathered(rows: list[cells.Row]) -> dict[str, Any]:
    """Everything told of the rows."""
    found: dict[str, Any] = {"readings": [], "paths": [], "width": []}
    for family in dict.fromkeys(r["cell"]["family"] for r in cells.select(rows, part="readings")):
        mine = [r["result"] for r in cells.select(rows, part="readings", family=family)]
        found["readings"].append({"family": family, **{n: {key: max(r[n][key] for r in mine) for key in DIFFERENCES} for n in mine[0]}})
    mine = [r["result"] for r in cells.select(rows, part="trained")]
    found["trained"] = {key: [r[key] for r in mine] for key in mine[0]}
    before = cells.select(rows, part="paths", windows=0)
    for windows, times in dict.fromkeys((r["cell"]["windows"], r["cell"]["times"]) for r in cells.select(rows, part="paths")):
        mine = cells.select(rows, part="paths", windows=windows, times=times)
        for name in mine[0]["result"]:
            line: dict[str, Any] = {"windows": windows, "times": times, "coordinates": name}
            for key in (*BENT, "in_4"):
                line[key] = cells.over_seeds(mine, lambda r, name=name, key=key: r[name][key]).as_dict()
            if windows and not name.startswith("untrained"):
                for key in ("deviation", "in_4"):
                    line[f"{key}_less_before"] = cells.paired(mine, before, lambda r, name=name, key=key: r[name][key]).as_dict()
            found["paths"].append(line)
    for kind_of_data, factor in dict.fromkeys((r["cell"]["data"], r["cell"]["factor"]) for r in cells.select(rows, part="width")):
        mine = cells.select(rows, part="width", data=kind_of_data, factor=factor)
        line = {"data": kind_of_data, "factor": factor, "deviation_of_data": mine[0]["result"]["deviation_of_data"]}
        line["fine"] = max(r["result"]["fine"] for r in mine)
        for kind in ("flow", "VP"):
            line[kind] = {key: cells.over_seeds(mine, lambda r, kind=kind, key=key: r[kind][key]).as_dict() for key in BENT}
            line[kind]["errors"] = {str(n): cells.over_seeds(mine, lambda r, kind=kind, n=n: r[kind]["errors"][str(n)]).as_dict() for n in STEPS}
        for key in ("deviation", "bow"):
            line[f"VP_less_flow_{key}"] = cells.over_seeds(mine, lambda r, key=key: r["VP"][key] - r["flow"][key]).as_dict()

        def less(result: dict[str, Any], n: int) -> float:
            return result["VP"]["errors"][str(n)] - result["flow"]["errors"][str(n)]

        line["VP_less_flow_errors"] = {str(n): cells.over_seeds(mine, lambda r, n=n: less(r, n)).as_dict() for n in STEPS}
        found["width"].append(line)
    return found


def text(found: dict[str, Any]) -> str:
    def told(one: dict[str, Any], digits: int = 3, sign: bool = False) -> str:
        return cells.told(cells.Interval(**one), digits, sign)

    lines = [[x["family"], n, *(f"{x[n][key]:.1e}" for key in DIFFERENCES)] for x in found["readings"] for n in x if n != "family"]
    heads = ["family", "steps", *DIFFERENCES.values()]
    trained = ", ".join(f"{key} {max(value):.1e}" for key, value in found["trained"].items())
    blocks = [f"Largest difference of a pixel to DDIM in the family's own coordinates, fp64:\n\n{cells.table(heads, lines)}"]
    blocks.append(f"A trained student, {PATH} steps, largest difference to its own DDIM: {trained}.\n")
    lines = []
    for x in found["paths"]:
        who = f"{x['windows']} windows, times {x['times']}" if x["windows"] else "the flow itself"
        less = [told(x[key], sign=True) if key in x else "" for key in ("deviation_less_before", "in_4_less_before")]
        lines.append([who, x["coordinates"], *(told(x[key]) for key in (*BENT, "in_4")), *less])
    heads = ["paths", "coordinates", *BENT.values(), "deviation within quarters of t", "deviation less the flow's", "within quarters less the flow's"]
    blocks.append(cells.table(heads, lines))
    lines = []
    for x in found["width"]:
        each = [[told(x[kind]["errors"][str(n)]) for n in STEPS] for kind in ("flow", "VP")]
        head = [f"{x['data']}, times {x['factor']:g}", f"{x['deviation_of_data']:.2f}"]
        lines += [[*head, kind, told(x[kind]["deviation"]), told(x[kind]["bow"]), *e] for kind, e in zip(("flow", "VP"), each, strict=True)]
        less = [told(x["VP_less_flow_errors"][str(n)], sign=True) for n in STEPS]
        lines.append([*head, "VP less flow", told(x["VP_less_flow_deviation"], sign=True), told(x["VP_less_flow_bow"], sign=True), *less])
    heads = ["data", "their deviation", "paths", "deviation of v over v", "1 less chord over arc", *(f"error at {n}" for n in STEPS)]
    blocks.append(cells.table(heads, lines))
    end = "± is half a 95 % interval over seeds of the noise (and of the training where there is one); errors are RMS pixels over the factor."
    return "\n".join(blocks) + f"\n{end}\n"


def draw(path: Path, found: dict[str, Any]) -> None:
    figure, axes = canvas(2, 3, width=14.0, height=8.6)
    names = [x["family"] for x in found["readings"]]
    last = [n for n in found["readings"][0] if n != "family"][-1]
    for key, colour, mark in zip(DIFFERENCES, (COLOURS[0], COLOURS[2], COLOURS[5], COLOURS[3], COLOURS[4]), "osDv^", strict=True):
        axes[0].plot([max(x[last][key], 1e-17) for x in found["readings"]], range(len(names)), mark, color=colour, label=DIFFERENCES[key])
    axes[0].set(xscale="log", xlim=(1e-16, 1e2), ylim=(len(names) + 2.9, -0.5), title="One sampler")
    axes[0].set_xlabel(f"largest difference of a pixel to DDIM, {last} steps")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].legend(frameon=False, loc="lower left")
    kinds = ("table", *COORDINATES)
    groups = list(dict.fromkeys((x["windows"], x["times"]) for x in found["paths"]))
    for i, group in enumerate(groups):
        mine = {x["coordinates"]: x for x in found["paths"] if (x["windows"], x["times"]) == group}
        label = f"{group[0]} window{'s' if group[0] > 1 else ''}, times {group[1]}" if group[0] else "the flow itself"
        means = [mine[kind]["deviation"]["mean"] for kind in kinds]
        axes[1].bar([j + 0.16 * (i - 2) for j in range(len(kinds))], means, 0.15, color=(COLOURS[6], *COLOURS[:4])[i], label=label)
    axes[1].set_xticks(range(len(kinds)), ["z over the\ntable's t", "z / (α + σ)\n(flow)", "VP over\nthe angle", "z / α over\nσ / α (VE)"])
    axes[1].set(ylabel=BENT["deviation"], title="Students: straight depends on coordinates")
    axes[1].set_ylim(0, 1.5 * axes[1].get_ylim()[1])
    axes[1].legend(frameon=False, loc="upper left")
    for column, data in enumerate(DATA):
        lines = [x for x in found["width"] if x["data"] == data]
        factors = [x["factor"] for x in lines]
        bow, off = axes[(2, 3)[column]], axes[4 + column]
        for kind, colour in (("flow", COLOURS[4]), ("VP", COLOURS[0])):
            for key, style in (("deviation", "-"), ("bow", ":")):
                line_over(bow, factors, [cells.Interval(**x[kind][key]) for x in lines], f"{kind}, {BENT[key]}", colour, style=style)
            for n, style in ((1, ":"), (4, "--"), (16, "-")):
                each = [cells.Interval(**x[kind]["errors"][str(n)]) for x in lines]
                line_over(off, factors, each, f"{kind}, {n} step{'s' if n > 1 else ''}", colour, style=style)
        bow.set(ylim=(-0.02, 1.7 * max(x[kind]["deviation"]["mean"] for x in lines for kind in ("flow", "VP"))), title=f"Straightness: {data}")
        off.set(yscale="log", ylim=(1e-3, 1e2), title=f"Euler's error: {data}", ylabel="paired error over the factor")
        still = [x["factor"] for x in lines if x["VP"]["errors"]["1"]["mean"] < 1e-9]
        for factor in still:
            off.annotate(f"VP at {factor:g}: none", (factor, 2e-3), ha="center", color=COLOURS[0])
        for axis in (bow, off):
            axis.set(xscale="log", xlabel="the data times")
            axis.set_xticks(factors, [f"{f:g}" for f in factors], minor=False)
            axis.tick_params(axis="x", which="minor", bottom=False)
            axis.legend(frameon=False, ncols=1 if axis is bow else 2, loc="upper center")
    save(figure, path)
