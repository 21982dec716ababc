"""The tables and the picture of `reflow experiment comparison`, from what was found alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reflow.experiments import cells
from reflow.experiments.figures import COLOURS, canvas, line_over, save

STEPS = ("1", "2", "4", "8")
MEASURES = {"paired": ("Paired error", 3), "frechet": ("Fréchet distance", 2), "nll": ("-log p a pixel (nats)", 3)}
FAMILIES = ("rectified", "PeRFlow", "PeRFlow-fixed", "ProReflow", "rectified diffusion", "consistency", "ours")

# Samplers of the picture, one for each colour.
DRAWN = ("DDIM", "DPM-Solver", "UniPC", "Heun", "DPM-Solver++", "DPM-Solver, to the end", "Heun, to the end")


def told(line: dict[str, Any], kind: str, steps: str, key: str, digits: int) -> str:
    own = line[kind].get(steps)
    return "" if own is None else cells.told(cells.Interval(**own[key]), digits)


def counted(steps: str) -> str:
    return f"{steps} step{'' if steps == '1' else 's'}"


def named(line: dict[str, Any]) -> str:
    return " -> ".join(map(str, line["windows"]))


def text(found: dict[str, Any]) -> str:
    parts = []
    for kind in ("unguided", "guided"):
        mine = [line for line in found["methods"] if kind in line]
        for key, (said, digits) in MEASURES.items():
            lines = []
            if kind == "unguided" and key == "paired":
                heads = ["method", "windows", "training: evaluations", "optimizer steps", *(counted(s) for s in STEPS)]
                lines = [[line["method"], named(line), f"{line['training']:,}", line["optimizer_steps"],
                          *(told(line, kind, s, key, digits) for s in STEPS)] for line in mine]  # fmt: skip
            else:
                heads = ["method", *(counted(s) for s in STEPS)]
                lines = [[line["method"], *(told(line, kind, s, key, digits) for s in STEPS)] for line in mine]
            own = [["teacher, DDIM (no training)"], ["the fine solve"]]
            for s in STEPS:
                own[0].append(f"{teachers(found, 'DDIM', int(s), kind == 'guided')[key]:.{digits}f}")
            own[1] += ["" if key == "paired" else f"{found['fine'][kind][key]:.{digits}f}"] * len(STEPS)
            blank = [""] * (len(heads) - 1 - len(STEPS))
            lines += [[row[0], *blank, *row[1:]] for row in own]
            title = f"{said}, {kind}" + (" at scale 3, against the fine solve guided so" if kind == "guided" else "")
            parts.append(f"## {title}\n\n" + cells.table(heads, lines))
    parts.insert(3, note(found))
    parts.insert(4, "## Differences between two of them, unguided\n\n" + order(found))
    parts.append("## The teacher's samplers (diffusers' schedulers, no training, so no ±)\n\n" + samplers(found))
    parts.append(f"## Cost until 4 steps are within 1.05 of 32 DDIM steps\n\n{quality(found)}")
    return "\n".join(parts)


def note(found: dict[str, Any]) -> str:
    sampled = ", ".join(f"{line['method']} {line['time']:.1f}" for line in found["methods"] if line["method"] in ("2-rectified flow", "PeRFlow"))
    return (
        f"Each student's training costs at most {found['budget']:,} network evaluations (solves of pairs, three for each sample of a step, targets "
        "of its own). ± is half a 95 % interval over training seeds. An image costs as many network evaluations as it has steps, twice that when "
        f"guided at inference; measured time over that of one evaluation at the fewest steps: {sampled}. Consistency students at more "
        "steps than phases are noised anew, so that their paired error there is not that of a flow. -log p is best near that of the fine solve, not "
        "lowest: samples too near the means of their class are likelier than data.\n"
    )


def teachers(found: dict[str, Any], kind: str, steps: int, guided: bool) -> dict[str, Any]:
    return next(line for line in found["teacher"] if (line["teacher"], line["steps"], line["guided"]) == (kind, steps, guided))


def samplers(found: dict[str, Any]) -> str:
    lines = []
    for guided in (False, True):
        for kind in dict.fromkeys(line["teacher"] for line in found["teacher"]):
            for line in (x for x in found["teacher"] if (x["teacher"], x["guided"]) == (kind, guided)):
                values = [f"{line[key]:.{digits}f}" for key, (_, digits) in MEASURES.items()]
                lines.append([kind, "3" if guided else "none", line["steps"], line["evaluations"], f"{line['time']:.1f}", *values])
    heads = ["sampler", "guidance", "steps", "evaluations an image", "time, in evaluations", *(said for said, _ in MEASURES.values())]
    return cells.table(heads, lines)


def order(found: dict[str, Any]) -> str:
    lines = []
    for line in found["order"]:
        names = [f"{name}, {counted(str(steps))}" for name, steps in (line["method"], line["other"])]
        values = [cells.told(cells.Interval(**line[key]), digits, True) for key, digits in (("paired", 4), ("frechet", 2))]
        lines.append([*names, line["published"], *values])
    return cells.table(["method", "less", "published FIDs", "paired error", "Fréchet distance"], lines)


def quality(found: dict[str, Any]) -> str:
    lines = []
    for line in found["to_quality"]:
        most = line["curve"][-1]["training"]
        if line["cost"]:
            said = f"{line['cost']['mean']:,.0f}"
            if line["cost"]["low"]:
                said += f" (95 %: {line['cost']['low']:,.0f} to {line['cost']['high']:,.0f})"
        else:
            said = f"not reached up to {most:,}" + (f" by {line['reached'].count(None)} of {len(line['reached'])}" if any(line["reached"]) else "")
        curve = ", ".join(f"{cells.told(cells.Interval(**x['paired']))} at {x['training']:,} ({x['optimizer_steps']:,})" for x in line["curve"])
        lines.append([line["method"], said, curve])
    wanted = ""
    if lines:
        wanted = f"\nWanted: {found['to_quality'][0]['wanted']:.4f}. The interval is of the logarithm of the cost, over training seeds.\n"
    return cells.table(["student of 4 windows", "network evaluations of training", "paired error at evaluations (optimizer steps)"], lines) + wanted


def draw(path: Path, found: dict[str, Any]) -> None:
    mine = [line for line in found["methods"] if "unguided" in line]
    figure, axes = canvas(1, 3, width=15.0, height=max(4.5, 1.4 + 0.18 * len(mine)))
    names = [f"{line['method']} ({line['steps']})" for line in mine]
    for row, line in enumerate(mine):
        own = cells.Interval(**line["unguided"][str(line["steps"])]["paired"])
        axes[0].errorbar(own.mean, row, xerr=own.half_width, fmt="o", markersize=4, color=COLOURS[FAMILIES.index(line["family"])])
    for s, style in zip(("1", "2", "4"), (":", "--", "-"), strict=True):
        error = teachers(found, "DDIM", int(s), False)["paired"]
        axes[0].axvline(error, color="0.35", linewidth=1, linestyle=style, label=f"teacher's DDIM, {counted(s)}")
    axes[0].set_yticks(range(len(mine)), names)
    axes[0].invert_yaxis()
    axes[0].set(xscale="log", xlabel="paired error (steps in brackets)", title="Methods at equal training cost")
    axes[0].set_xticks([0.06, 0.1, 0.2, 0.4, 0.6], ["0.06", "0.1", "0.2", "0.4", "0.6"])
    axes[0].minorticks_off()
    axes[0].legend(frameon=False, loc="lower right")
    for kind, colour in zip(DRAWN, COLOURS, strict=True):
        own_rows = [line for line in found["teacher"] if line["teacher"] == kind and not line["guided"]]
        costs, errors = ([x[key] for x in own_rows] for key in ("evaluations", "paired"))
        axes[1].plot(costs, errors, "o-", markersize=3.5, color=colour, label=f"teacher, {kind}")
    best: dict[int, float] = {}
    for line in mine:
        for s, value in line["unguided"].items():
            best[int(s)] = min(best.get(int(s), 9.0), value["paired"]["mean"])
    axes[1].plot(sorted(best), [best[s] for s in sorted(best)], "*", markersize=10, color=COLOURS[-1], label="best student of the first table")
    axes[1].set(xscale="log", yscale="log", xlabel="network evaluations an image", ylabel="paired error", title="The teacher's samplers")
    axes[1].set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    axes[1].minorticks_off()
    axes[1].legend(frameon=False)
    for line, colour in zip(found["to_quality"], COLOURS, strict=False):
        values = [cells.Interval(**x["paired"]) for x in line["curve"]]
        line_over(axes[2], [x["training"] for x in line["curve"]], values, line["method"], colour)
        axes[2].axhline(line["wanted"], color="0.35", linestyle="--", linewidth=1)
    axes[2].set(xscale="log", yscale="log", xlabel="network evaluations of training", ylabel="paired error, 4 steps")
    axes[2].set_xticks([5e5, 1e6, 2e6], ["500,000", "1 million", "2 million"])
    axes[2].set_yticks([0.04, 0.06, 0.08, 0.1], ["0.04", "0.06", "0.08", "0.1"])
    axes[2].minorticks_off()
    axes[2].set_title("Dashed: 1.05 times the teacher's 32 steps")
    axes[2].legend(frameon=False)
    save(figure, path)
