"""``python -m bench report``: the blocks of README.md that hold numbers, made from the files under bench/results/ alone."""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
DIGITS = ROOT / "bench" / "results" / "experiments" / "digits.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--readme", type=pathlib.Path, default=ROOT / "README.md", help="the file whose blocks are rewritten")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a block is out of date")


def main(arguments: argparse.Namespace) -> int:
    """Rewrite the blocks, or with --check say whether they are what the results say."""
    old = arguments.readme.read_text()
    new = fill(old, "digits", digits(json.loads(DIGITS.read_text())))
    if arguments.check:
        print("README.md is up to date" if new == old else "README.md is out of date: run python -m bench report")
        return int(new != old)
    arguments.readme.write_text(new)
    return 0


def fill(text: str, name: str, block: str) -> str:
    """`text` with what stands between <!-- name:start --> and <!-- name:end --> replaced."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    if start not in text or end not in text:
        raise ValueError(f"The text has no pair of markers {start} and {end}; add them where the block belongs.")
    head, rest = text.split(start, 1)
    return f"{head}{start}\n{block}\n{end}{rest.split(end, 1)[1]}"


def plus_minus(value: dict[str, Any] | None, digits: int) -> str:
    """Mean and half its 95 % interval."""
    if value is None:
        return "-"
    half = "" if value["low"] is None else f" ± {(value['high'] - value['low']) / 2:.{digits}f}"
    return f"{value['mean']:.{digits}f}{half}"


def worse(differences: list[dict[str, Any]]) -> str:
    """A sentence that names the students that are further from the teacher than its own DDIM of as many steps; nothing if there is none."""
    rows = [f"{d['method']} at {d['steps']} steps" for d in differences if d["images"]["mean"] > 0]
    return f" Further from the teacher than its own DDIM of as many steps: {'; '.join(rows)}." if rows else ""


def digits(result: dict[str, Any]) -> str:
    """The full run on digits as a markdown table, with the conditions under it."""
    lines = ["| digits | steps | paired error | Fréchet distance | ms an image |", "|---|---|---|---|---|"]
    for m in result["methods"]:
        paired = plus_minus(m.get("paired_images"), 4) if "paired_images" in m else "reference"
        lines.append(f"| {m['method']} | {m['steps']} | {paired} | {plus_minus(m['frechet'], 2)} | {m['milliseconds_per_image']:.1f} |")
    machine, versions, settings = result["machine"], result["versions"], result["settings"]
    seeds = len(result["training_seeds"])
    lines += ["", f"Paired error: RMS pixel distance (pixels -1 to 1) to the teacher's {settings['teacher_steps']} steps from the same noise and prompt. "
              f"Fréchet distance: features of a classifier trained on the real scans, {settings['samples']:,} samples against {result['real_scans']:,} scans. "
              f"± is half a 95 % interval: over {seeds} training seeds for students, over {result['sampling_seeds'] if isinstance(result['sampling_seeds'], int) else len(result['sampling_seeds'])} sampling seeds for the teacher. "
              f"`{result['command']}`, {sum(result['training_seconds']) / 60:.0f} minutes of training for the {seeds} seeds on a shared machine: {machine['processor']}, "
              f"{machine['cores']} cores, Python {versions['python']}, torch {versions['torch']}, diffusers {versions['diffusers']}. Times are one thread's, "
              f"batch {result['timing']['batch']}." + worse(result["differences"])]
    return "\n".join(lines)
