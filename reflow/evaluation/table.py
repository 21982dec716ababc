"""The tables that `reflow evaluate` prints, made from report.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HEAD = ("method", "steps", "paired error", "less teacher's own", "FD", "diversity", "digit read", "ms/image")


def with_interval(value: Mapping[str, Any] | None, digits: int = 3) -> str:
    """Mean -+ half the 95 % interval; a dash for nothing, the mean alone for a single value."""
    if value is None:
        return "-"
    if value["low"] is None:
        return f"{value['mean']:.{digits}f}"
    return f"{value['mean']:.{digits}f} ± {(value['high'] - value['low']) / 2:.{digits}f}"


def own_sampler(report: Mapping[str, Any]) -> str:
    """What a teacher's own steps are called: Euler of a flow, DDIM of any other base. Reports from before `teacher_sampler` are told by
    the recipe, where they have it."""
    student = report.get("resolved_recipe", {}).get("student", {})
    return str(report.get("teacher_sampler") or ("Euler" if student.get("network_time") == "flow" else "DDIM"))


def rows(methods: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Cells as text, one tuple a method, in the order of HEAD."""
    own = {(d["method"], d["steps"]): d["images"] for d in differences}
    cells = []
    for m in methods:
        accuracy = m.get("prompt_accuracy")
        cells.append(
            (
                m["method"],
                str(m["steps"]),
                with_interval(m.get("paired_images"), 4) if "paired_images" in m else "reference",
                with_interval(own.get((m["method"], m["steps"])), 4),
                with_interval(m["frechet"], 2),
                with_interval(m["diversity"], 3),
                "-" if accuracy is None else f"{100 * accuracy['mean']:.1f} %",
                f"{m['milliseconds_per_image']:.2f}",
            )
        )
    return cells


def columns(cells: Sequence[Sequence[str]]) -> str:
    """Cells under each other; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for row in cells:
        padded = (c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(padded))
    return "\n".join(lines)


def text(report: Mapping[str, Any]) -> str:
    """The table of one evaluation and the sentences needed to read it."""
    floor, settings = report["floor"], report["settings"]
    seeds = settings["seeds"]
    return "\n".join(
        [
            columns([HEAD, *rows(report["methods"], report["differences"])]),
            "",
            (
                f"Paired error: RMS pixel distance (pixels -1 to 1) to the teacher's {settings['teacher_steps']} steps"
                " from the same noise."
            ),
            (
                f"{settings['samples']} samples x {seeds} sampling seed{'s' if seeds > 1 else ''}; ± is half a 95 %"
                " interval."
            ),
            (
                f"FD: Fréchet distance to {report['real_scans']} real scans, which the teacher was trained on,"
                " by features of a classifier"
            ),
            (
                f"that reads {100 * report['classifier']['held_out_accuracy']:.1f} % of held-out scans. Real against"
                f" real: {floor['mean']:.2f} with {floor['set_size']} a set, about {floor['expected_at_samples']:.2f}"
                f" with {report['real_scans']}."
            ),
        ]
    )


def experiment_text(result: Mapping[str, Any]) -> str:
    """The table of a committed full run: means over its training seeds, and each seed's difference."""
    lines = [columns([HEAD, *rows(result["methods"], result["differences"])]), ""]
    for steps, entries in by_steps(result["per_seed"]).items():
        lines.append(
            f"{entries[0]['method']}, {steps} steps, paired error less the teacher's own, 95 % interval over samples:"
        )
        lines += [f"  training seed {e['training_seed']}: {bracketed(e['images'])}" for e in entries]
    return "\n".join(lines)


def bracketed(value: Mapping[str, Any], digits: int = 4) -> str:
    """A signed mean with its interval."""
    if value["low"] is None:
        return f"{value['mean']:+.{digits}f}"
    return f"{value['mean']:+.{digits}f} [{value['low']:+.{digits}f}, {value['high']:+.{digits}f}]"


def by_steps(per_seed: Sequence[Mapping[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The differences of students that take one step a window, by their number of steps."""
    grouped: dict[int, list[dict[str, Any]]] = {}
    for seed in per_seed:
        for entry in seed["differences"]:
            if entry["steps"] == entry["windows"]:
                grouped.setdefault(entry["steps"], []).append({**entry, "training_seed": seed["training_seed"]})
    return grouped
