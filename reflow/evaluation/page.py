"""report/index.html: one self-contained page, made from report.json and the report's pictures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reflow.evaluation import table
from reflow.evaluation.markup import document, escape, image, listed, plain_table, shortened, without_paths

TILES = (
    "FD: Fréchet distance to real scans, between the features that a classifier finds in both sets; lower is better, and the number for"
    " real against real is the floor. Paired error: how far a student's image is from the teacher's of the same noise and prompt, root mean"
    " square over pixels from -1 to 1; 0 is the same image."
)
DIFFERENCES = (
    "Under each row its difference to the first: red is ink too many, blue ink that is missing, full colour half the range from paper to ink."
    " The digits are those at which the teacher's fewest steps differ most."
)
QUALITY = (
    "Left: how far from the teacher's own images; right: how far from real ones. Lower is better in both. Bars are 95 % intervals. A student"
    " is trained for one step a window; what more steps do to it is the line of its own."
)
TRAINING = (
    "Every point of the loss is a mean over the samples since the point before; it is what the recipe's objective minimises, so it can be"
    " compared within a stage, between the vertical lines, and not from stage to stage. Validation is the averaged (EMA) student's squared"
    " velocity error on windows that stay the same, at the start of a window (0), where a student of one step a window is used, and inside."
)


def write(report: Mapping[str, Any], folder: Path, recipe_text: str) -> Path:
    """Write folder/index.html from the report and those of grid.png, differences.png, quality.png, training.png and curves.png that lie there."""
    path = folder / "index.html"
    path.write_text(
        render(report, {p.stem: p.read_bytes() for p in folder.glob("*.png")}, recipe_text), encoding="utf-8"
    )
    return path


def render(report: Mapping[str, Any], pictures: Mapping[str, bytes], recipe_text: str) -> str:
    title = f"{report['recipe']}: few-step students against their teacher"
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="sub">{escape(summary(report))}</p>']
    parts += [f'<p class="worse">{escape(line)}</p>' for line in worse(report)]
    parts += [tiles(report), f'<p class="note">{escape(TILES)}</p>']
    if "grid" in pictures:
        parts += [
            "<h2>Samples</h2>",
            image(pictures["grid"], "Samples of every method in rows, the same noises and prompts in columns"),
            '<p class="note">Each column starts from one noise and asks for one digit; nothing is selected.</p>',
        ]
    if "differences" in pictures:
        parts += [
            image(pictures["differences"], "Few steps above their differences to the reference, in red and blue"),
            f'<p class="note">{escape(DIFFERENCES)}</p>',
        ]
    parts += ["<h2>All methods</h2>", methods_table(report), f'<p class="note">{escape(reading(report))}</p>']
    parts += ["<h2>Differences</h2>", differences_table(report)]
    if "quality" in pictures:
        parts += [
            "<h2>Quality against steps</h2>",
            image(pictures["quality"], "Paired error and Fréchet distance against the number of steps"),
            f'<p class="note">{escape(QUALITY)}</p>',
        ]
    parts += ["<h2>Straightness</h2>", straightness_table(report)]
    if "training" in pictures or "curves" in pictures:
        parts.append("<h2>Training</h2>")
    if "training" in pictures:
        parts += [
            image(pictures["training"], "Loss, learning rate and validation loss over the samples, stages apart"),
            f'<p class="note">{escape(TRAINING)}</p>',
        ]
    if "curves" in pictures:
        parts += [
            image(pictures["curves"], "Direction and magnitude part of the loss of every window, by stage"),
            (
                '<p class="note">The squared error of the velocity, mean over a batch, split into its magnitude part'
                " (|v̂| − |v|)² / N and the rest, which is due to direction. Windows count from noise to data.</p>"
            ),
        ]
    parts += [
        "<h2>How it was measured</h2>",
        measured(report),
        f"<details><summary>The resolved recipe</summary><pre>{escape(without_paths(recipe_text))}</pre></details>",
    ]
    return document(title, parts)


def native(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Differences of the students that take one step a window, fewest steps last."""
    return sorted((d for d in report["differences"] if d["steps"] == d["windows"]), key=lambda d: -d["steps"])


def of(report: Mapping[str, Any], method: str, steps: int) -> Mapping[str, Any]:
    return next(m for m in report["methods"] if m["method"] == method and m["steps"] == steps)


def summary(report: Mapping[str, Any]) -> str:
    """What came out, in a sentence that follows the intervals."""
    groups: dict[str, list[str]] = {"closer to": [], "farther from": [], "neither closer to nor farther from": []}
    counts = [d["steps"] for d in native(report)]
    for d in native(report):
        difference = d["images"]
        verdict = (
            "neither closer to nor farther from"
            if not difference["excludes_zero"]
            else "closer to" if difference["mean"] < 0 else "farther from"
        )
        stage = f" (stage {d['stage']})" if counts.count(d["steps"]) > 1 else ""
        groups[verdict].append(f"{d['steps']}{stage}")
    sentences = [
        f"With {listed(steps)} step{'' if len(steps) == 1 and steps[0].split()[0] == '1' else 's'} the student is {verdict} the teacher's"
        f" {report['settings']['teacher_steps']} steps than the teacher's own {table.own_sampler(report)} with as many."
        for verdict, steps in groups.items()
        if steps
    ]
    return " ".join(sentences)


def worse(report: Mapping[str, Any]) -> list[str]:
    """Sentences on everything that the intervals say got worse, of all students and step counts; none where nothing did."""
    reference, own = report["settings"]["teacher_steps"], table.own_sampler(report)
    kinds = (
        ("images", f"Further from the teacher's images than its own {own} with as many steps"),
        ("frechet", f"Further from real scans (FD) than the teacher's own {own} with as many steps"),
        ("frechet_to_reference", f"Further from real scans (FD) than the teacher's {reference} steps"),
    )
    lines = []
    for key, what in kinds:
        named = [f"{d['method']} at {d['steps']} step{'s' * (d['steps'] != 1)} (by {d[key]['mean']:.2g})"
                 for d in report["differences"] if d[key]["excludes_zero"] and d[key]["mean"] > 0]  # fmt: skip
        if named:
            lines.append(f"{what}: {'; '.join(named)}.")
    return lines


def tiles(report: Mapping[str, Any]) -> str:
    cells = []
    for d in native(report):
        student, own = of(report, d["method"], d["steps"]), of(report, "teacher", d["steps"])
        cells.append(
            f'<div class="tile"><div class="what">FD of the student, {d["steps"]}'
            f' step{"s" if d["steps"] > 1 else ""}</div><div class="number">{student["frechet"]["mean"]:.2f}</div><div'
            f' class="against{more(d, "frechet")}">teacher\'s own {d["steps"]}: {own["frechet"]["mean"]:.2f}</div><div'
            f' class="against{more(d, "images")}">paired error {student["paired_images"]["mean"]:.3f}, not'
            f' {own["paired_images"]["mean"]:.3f}</div></div>'
        )
    best = of(report, "teacher", report["settings"]["teacher_steps"])
    cells.append(
        f'<div class="tile"><div class="what">FD of the teacher, {best["steps"]} steps</div><div'
        f' class="number">{best["frechet"]["mean"]:.2f}</div><div class="against">real against real:'
        f' {report["floor"]["expected_at_samples"]:.2f}</div><div class="against">{best["milliseconds_per_image"]:.1f}'
        " ms an image</div></div>"
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def more(difference: Mapping[str, Any], key: str) -> str:
    """The mark of a tile's line whose value is larger than the teacher's beyond its interval."""
    return " more" if difference[key]["excludes_zero"] and difference[key]["mean"] > 0 else ""


def methods_table(report: Mapping[str, Any]) -> str:
    rows = table.rows(report["methods"], report["differences"])
    return plain_table(table.HEAD, rows, ["teacher" if row[0] == "teacher" else "" for row in rows])


def reading(report: Mapping[str, Any]) -> str:
    """What the columns mean."""
    settings, floor = report["settings"], report["floor"]
    equal = (
        "both sets equal in size"
        if settings["samples"] == report["real_scans"]
        else f"{settings['samples']} samples against all scans, so biased"
    )
    return (
        "Paired error: root mean square pixel distance (pixels from -1 to 1) to the teacher's"
        f" {settings['teacher_steps']} steps from the same noise and prompt, mean over samples. The next column is its"
        f" difference to the teacher's own {table.own_sampler(report)} with as many steps, sample by sample. FD: Fréchet distance to"
        f" {report['real_scans']} real scans on {report['classifier']['features']} features of a classifier ({equal})."
        f" Real against real is {floor['mean']:.2f} (spread {floor['sd']:.2f} over {floor['splits']} random splits) for"
        f" disjoint sets of {floor['set_size']} scans with equal digits and {floor['smaller_mean']:.2f} for sets of"
        f" {floor['smaller_set_size']}: this bias of finite sets falls as 1/size and is about"
        f" {floor['expected_at_samples']:.2f} at the size compared here. The teacher was trained on these very scans,"
        " so it may come closer to them than other scans would. Diversity: mean feature distance between two images of"
        " one digit, relative to the scans (1: as diverse as they are). Digit read: how often the classifier reads the"
        " digit asked for; no criterion, since it rises when images become more alike. ± is half a 95 % interval"
        " (Student's t), over samples for the paired error and over sampling seeds for the other columns."
    )


def differences_table(report: Mapping[str, Any]) -> str:
    reference = report["settings"]["teacher_steps"]
    head = ("student less teacher", "steps", "paired error", "FD", f"FD less that of {reference} steps")
    digits = {"images": 4, "frechet": 2, "frechet_to_reference": 2}
    rows = [
        (d["method"], str(d["steps"]), *(table.bracketed(d[key], n) for key, n in digits.items()))
        for d in report["differences"]
    ]
    note = (
        f"Mean and 95 % interval of the student's value less that of the teacher's own {table.own_sampler(report)} with as many steps, and in"
        f" the last column of its {reference} steps: over samples for paired errors, over sampling seeds for FD."
        " Negative is better."
    )
    return plain_table(head, rows) + f'<p class="note">{escape(note)}</p>'


def straightness_table(report: Mapping[str, Any]) -> str:
    head = ("method", "windows", "steps", "whole path", "inside a window", "window by window, noise to data")
    rows = [
        (
            s["method"],
            str(s["windows"]),
            str(s["steps"]),
            table.with_interval(s["path"], 3),
            table.with_interval(s["window_deviation_mean"], 4),
            "  ".join(f"{w['mean']:.3f}" for w in s["window_deviation"]),
        )
        for s in report["straightness"]
    ]
    note = (
        "Mean over steps and dimensions of (v − (noise − data))² along the sampled latent path, and the same inside"
        " each window against that window's own chord; 0 is straight. Every network is sampled in at least 32 small"
        " steps, so a student that was only taught its window starts shows that here."
    )
    return (
        plain_table(head, rows, ["teacher" if row[0] == "teacher" else "" for row in rows])
        + f'<p class="note">{escape(note)}</p>'
    )


def measured(report: Mapping[str, Any]) -> str:
    machine, settings = report["machine"], report["settings"]
    items = {
        "Command": f"<code>{escape(shlex.join(map(shortened, shlex.split(report['command']))))}</code>",
        "Machine": escape(
            ", ".join(
                str(v)
                for v in (
                    machine.get("gpu"),
                    machine["processor"],
                    f"{machine['cores']} cores",
                    f"{machine['memory_gib']} GiB",
                    machine["system"],
                )
                if v
            )
        ),
        "Versions": escape(", ".join(f"{name} {version}" for name, version in report["versions"].items())),
        "Seeds": escape(
            f"training {report['training_seed']}; sampling {', '.join(map(str, report['sampling_seeds']))}"
        ),
        "Samples": escape(
            f"{settings['samples']} a method and sampling seed; the digits asked for are those of the scans compared"
            " with"
        ),
        "Classifier": escape(
            f"reads {100 * report['classifier']['held_out_accuracy']:.1f} % of the scans it was not trained on"
        ),
        "Time an image": escape(
            f"batch {report['timing']['batch']} on {report['timing']['device']}, {report['timing']['threads']} thread,"
            " the methods in turns, median, with decoding and without text encoding"
        ),
        "Time taken": escape(", ".join(f"{name} {value:.0f} s" for name, value in report["seconds"].items())),
        "Weights": "<br>".join(
            f"{escape(stage)} <code>{escape(digest[:16])}</code>" for stage, digest in report["weights"].items()
        ),
    }
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in items.items()) + "</dl>"
