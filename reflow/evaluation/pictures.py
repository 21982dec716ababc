"""Pictures of a report: the grid of samples, quality against steps, curves of the training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from reflow.evaluation.table import own_sampler

INK, MUTED, LINE = "#1c2430", "#66707d", "#d9dee5"
TEACHER, STUDENT, LAST = "#7a828e", "#1f6fb4", "#d1622b"


def sample_grid(pictures: Mapping[tuple[str, int], torch.Tensor], labels: torch.Tensor, scale: int = 3) -> Image.Image:
    """Rows of methods over columns of noises: images [n,1,H,W] in [-1,1] by (method, steps), shown as ink on paper.

    A column a digit: the first sample that asks for it.
    """
    columns = [int(i) for digit in range(10) for i in (labels == digit).nonzero()[:1, 0]]
    rows, font = ordered(pictures), ImageFont.load_default(size=8 * scale)
    titles = [f"{name}, {steps} step{'s' if steps > 1 else ''}" for name, steps in rows]
    side, gap, left = 32 * scale, 4 * scale, round(max(map(font.getlength, titles))) + 14 * scale
    width, height = left + len(columns) * (side + gap), len(rows) * (side + gap) + gap
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    top = gap
    for place, (name, steps) in enumerate(rows):
        if place and rows[place - 1][1] != steps:
            pen.line([(0, top - gap // 2), (width, top - gap // 2)], fill=LINE, width=scale)
        pen.text((0, top + side // 2), titles[place], fill=MUTED if name == "teacher" else INK, font=font, anchor="lm")
        for i, column in enumerate(columns):
            canvas.paste(paper(pictures[name, steps][column, 0], side), (left + i * (side + gap), top))
        top += side + gap
    return canvas


def difference_grid(
    pictures: Mapping[tuple[str, int], torch.Tensor], labels: torch.Tensor, scale: int = 4, columns: int = 6, counts: int = 2
) -> Image.Image:
    """What few steps change: the reference's row, then for the `counts` fewest steps of a student with one step a window
    the teacher's own and the student's row, and under each its difference to the reference. Images are as of `sample_grid`.

    Red is ink that the reference lacks, blue ink that is missing; full colour is half the range from paper to ink. The
    columns are those digits at which the teacher's fewest steps differ most, so that there is something to see.
    """
    rows = ordered(pictures)
    reference = pictures[rows[0]]
    native = [(name, steps) for name, steps in rows if windows_in(name) == steps or (name == "teacher" and (name, steps) != rows[0])]
    fewest = sorted({steps for name, steps in native if name != "teacher"})[:counts]
    native = [key for key in native if key[1] in fewest]
    first = [int(i) for digit in range(10) for i in (labels == digit).nonzero()[:1, 0]]
    rough = pictures[native[-1] if native[-1][0] == "teacher" else ("teacher", native[-1][1])]
    most = sorted(first, key=lambda i: -float((rough[i] - reference[i]).square().mean()))[:columns]
    chosen = [i for i in first if i in most]
    font, small = ImageFont.load_default(size=6 * scale), ImageFont.load_default(size=5 * scale)
    titles = [f"{name}, {steps} step{'s' if steps > 1 else ''}" for name, steps in (rows[0], *native)]
    side, gap = 32 * scale, 4 * scale
    left = round(max(map(font.getlength, titles))) + 8 * scale
    tall = side + gap + len(native) * (2 * side + 3 * gap)
    canvas = Image.new("RGB", (left + len(chosen) * (side + gap), tall), "white")
    pen, top = ImageDraw.Draw(canvas), 0
    for title, key in zip(titles, (rows[0], *native), strict=True):
        pen.text((0, top + side // 2), title, fill=MUTED if key[0] == "teacher" else INK, font=font, anchor="lm")
        for i, column in enumerate(chosen):
            canvas.paste(paper(pictures[key][column, 0], side), (left + i * (side + gap), top))
        top += side + gap
        if key == rows[0]:
            continue
        error = (pictures[key] - reference)[chosen, 0]
        told = f"its difference (RMS {error.square().mean().sqrt():.3f})"
        pen.text((0, top + side // 2 - gap), told, fill=MUTED, font=small, anchor="lm")
        for i, off in enumerate(error):
            canvas.paste(coloured(off, side), (left + i * (side + gap), top - gap // 2))
        top += side + 2 * gap
    return canvas


def paper(image: torch.Tensor, side: int) -> Image.Image:
    """[H,W] in [-1,1] as ink on paper."""
    grey = ((1 - image.clamp(-1, 1)) * 127.5).round().byte().numpy()
    return Image.fromarray(np.asarray(grey)).resize((side, side), Image.Resampling.BICUBIC).convert("RGB")


def coloured(error: torch.Tensor, side: int) -> Image.Image:
    """[H,W] of a difference of images: white where it is 0, red where it is ink too many and blue where it is too little."""
    strength = (error.clamp(-1, 1).abs()[..., None]).double().numpy()
    colour = np.where((error > 0)[..., None].numpy(), (196, 46, 36), (31, 95, 196))
    pixels = (255 + strength * (colour - 255.0)).round().astype(np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)


def ordered(keys: Mapping[tuple[str, int], Any]) -> list[tuple[str, int]]:
    """Most steps first; at equal steps the teacher first, so that each student stands under its own rival."""
    return sorted(keys, key=lambda key: (-key[1], key[0] != "teacher", -windows_in(key[0])))


def windows_in(name: str) -> int:
    """Windows of a student by its label; 0 for the teacher."""
    found = re.match(r"student, (\d+) window", name)
    return int(found[1]) if found else 0


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.titlecolor": INK,
            "axes.titlelocation": "left",
            "axes.edgecolor": LINE,
            "axes.labelcolor": MUTED,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#eef1f4",
            "axes.axisbelow": True,
            "legend.frameon": False,
            "figure.dpi": 160,
        }
    )
    return plt


def series(report: Mapping[str, Any]) -> list[tuple[str, str, list[Mapping[str, Any]]]]:
    """(name, colour, rows by steps): the teacher, the students at one step a window, the last student at more steps."""
    methods = report["methods"]
    students = [m for m in methods if m["windows"]]
    last, label = students[-1]["windows"], students[-1]["method"]
    groups = [
        (f"teacher's own {own_sampler(report)}", TEACHER, [m for m in methods if not m["windows"]]),
        ("students, one step a window", STUDENT, [m for m in students if m["steps"] == m["windows"]]),
        (f"the {last}-window student at more steps", LAST, [m for m in students if m["method"] == label]),
    ]
    return [(name, colour, sorted(rows, key=lambda m: m["steps"])) for name, colour, rows in groups if rows]


def quality(report: Mapping[str, Any], path: Path) -> None:
    """Paired error and Fréchet distance against steps, with 95 % intervals."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
    steps = sorted({m["steps"] for m in report["methods"]})
    place = {s: i for i, s in enumerate(steps)}
    aside = {TEACHER: -0.05, STUDENT: 0.0, LAST: 0.05}  # so that no interval hides another
    for axis, key in zip(axes, ("paired_images", "frechet"), strict=True):
        for name, colour, rows in series(report):
            rows = [m for m in rows if key in m]
            means = [m[key]["mean"] for m in rows]
            reach = [0 if m[key]["low"] is None else m[key]["high"] - m[key]["mean"] for m in rows]
            axis.errorbar(
                [place[m["steps"]] + aside[colour] for m in rows],
                means,
                reach,
                color=colour,
                label=name,
                marker="o",
                markersize=5,
                linewidth=1.8,
                capsize=3,
                linestyle="--" if colour == LAST else "-",
            )
        axis.set_xticks(range(len(steps)), [str(s) for s in steps])
        axis.set_xlim(-0.3, len(steps) - 0.7)
        axis.set_xlabel("steps")
        # Two sampling seeds give intervals that would dwarf what they belong to; they may run out of the picture.
        axis.set_ylim(0, 1.35 * max(m[key]["mean"] for m in report["methods"] if key in m))
    axes[0].set_title(f"Paired error: RMS distance to the teacher's {report['settings']['teacher_steps']} steps")
    axes[1].set_title("Fréchet distance to the real scans")
    floor = report["floor"]["expected_at_samples"]
    line = axes[1].axhline(floor, color=INK, linewidth=1, linestyle=":")
    axes[1].legend([line], ["real against real, same size"], loc="upper right")
    axes[0].legend(loc="upper right")
    figure.savefig(path)
    plt.close(figure)


def curves(records: Sequence[Mapping[str, Any]], windows: Sequence[int], path: Path) -> bool:
    """Direction and magnitude part of the squared velocity error while training: a column a stage, a line a window.

    records: the "train" lines of log.jsonl; windows: how many each stage has. False, and no file, if there are none.
    """
    stages = [[r for r in records if r["stage"] == i + 1 and r.get("windows")] for i in range(len(windows))]
    shown = [i for i, lines in enumerate(stages) if lines]
    if not shown:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(
        2,
        len(shown),
        figsize=(3.4 * len(shown) + 0.6, 5),
        layout="constrained",
        sharey="row",
        sharex="col",
        squeeze=False,
    )
    for column, stage in enumerate(shown):
        colours = plt.get_cmap("viridis")(np.linspace(0.05, 0.85, windows[stage]))
        for axis, part in zip(axes[:, column], ("direction", "magnitude"), strict=True):
            for k in range(windows[stage]):
                found = [
                    (r["samples"] / 1000, w[part]) for r in stages[stage] for w in r["windows"] if w["window"] == k
                ]
                if found:
                    label = f"window {k + 1}" + (" (noise)" if k == 0 else " (data)" if k == windows[stage] - 1 else "")
                    marker = "o" if len(found) == 1 else None
                    axis.plot(*zip(*found, strict=True), color=colours[k], linewidth=1.6, label=label, marker=marker)
            axis.set_yscale("log")
        axes[0, column].set_title(f"stage {stage + 1}: {windows[stage]} window{'s' if windows[stage] > 1 else ''}")
        axes[1, column].set_xlabel("samples, thousands")
        axes[0, column].legend(fontsize=7, ncols=2 if windows[stage] > 4 else 1, loc="upper right")
    axes[0, 0].set_ylim(top=8 * axes[0, 0].get_ylim()[1])  # room for the legends
    for axis, part in zip(axes[:, 0], ("direction", "magnitude"), strict=True):
        axis.set_ylabel(f"{part} part")
    figure.savefig(path)
    plt.close(figure)
    return True


def progress(train: Sequence[Mapping[str, Any]], validate: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Loss, learning rate and, where there was one, the fixed validation loss over the whole run, stages apart.

    train, validate: those lines of log.jsonl. False, and no file, if there is none with a loss.
    """
    train = [r for r in train if r.get("loss") is not None]
    if not train:
        return False
    fixed = {w["tau"] for r in validate for w in r["windows"]}
    shades = (STUDENT, LAST, TEACHER, "#3b8f5a")
    plt = _pyplot()
    count = 2 + bool(fixed)
    figure, axes = plt.subplots(1, count, figsize=(3.6 * count, 3), layout="constrained", squeeze=False)
    for axis, key in zip(axes[0], ("loss", "learning_rate"), strict=False):
        draw(axis, train, lambda r, key=key: r[key], INK, "")
        axis.set_title(key.replace("_", " "))
    for n, tau in enumerate(sorted(fixed)):
        draw(axes[0, 2], validate, lambda r, tau=tau: mean_at(r, tau), shades[n % len(shades)], f"at {tau:g} of a window")
    if fixed:
        axes[0, 2].set_title("validation: squared velocity error")
        axes[0, 2].legend(fontsize=7, loc="upper right")
    starts = [max(r["total_samples"] for r in train if r["stage"] == i) / 1000 for i in sorted({r["stage"] for r in train})[:-1]]
    for place, axis in enumerate(axes[0]):
        axis.set_xlabel("samples, thousands")
        if place != 1:
            axis.set_yscale("log")
        for edge in starts:
            axis.axvline(edge, color=LINE, linewidth=1)
    figure.savefig(path)
    plt.close(figure)
    return True


def mean_at(record: Mapping[str, Any], tau: float) -> float | None:
    """Mean over the windows of a validation's squared velocity error at a place inside them."""
    found = [w["mse"] for w in record["windows"] if w["tau"] == tau]
    return sum(found) / len(found) if found else None


def draw(axis: Any, records: Sequence[Mapping[str, Any]], value: Any, colour: str, label: str) -> None:
    """One line a stage: between two stages the windows change, and with them what a loss means."""
    for n, stage in enumerate(sorted({r["stage"] for r in records})):
        found = [(r["total_samples"] / 1000, value(r)) for r in records if r["stage"] == stage and value(r) is not None]
        if found:
            marker = "o" if len(found) == 1 else None
            axis.plot(*zip(*found, strict=True), color=colour, linewidth=1.6, label="" if n else label, marker=marker)
