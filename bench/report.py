"""``python -m bench report``: tables, pictures and README.md's blocks, made from files under bench/results/ alone.

A machine's folder gets README.md (every table) and PNG files; README.md's block `digits` is the full run on digits, its
block `bench` the targets and the first tables.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from bench import record, tables
from reflow.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
DIGITS = ROOT / "bench" / "results" / "experiments" / "digits.json"
BLOCKS = ("digits", "bench")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--readme", type=pathlib.Path, default=ROOT / "README.md", help="the file with the blocks")
    parser.add_argument("--results", type=pathlib.Path, default=record.RESULTS, help="holds the machines' folders")
    parser.add_argument("--blocks", nargs="*", choices=BLOCKS, default=list(BLOCKS), help="default: all")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a block is out of date")


def main(arguments: argparse.Namespace) -> int:
    """Rewrite the blocks and the machines' pages, or with --check say whether the blocks are what the results say."""
    old = new = arguments.readme.read_text() if arguments.blocks else ""
    found = machines(arguments.results)
    for name in arguments.blocks:
        block = digits(json.loads(DIGITS.read_text())) if name == "digits" else bench_block(found)
        try:
            new = fill(new, name, block)
        except ValueError as error:
            raise UserError(f"{arguments.readme}: {error}") from None
    if arguments.check:
        print("README.md is up to date" if new == old else "README.md is out of date: run python -m bench report")
        return int(new != old)
    if arguments.blocks:
        arguments.readme.write_text(new)
    for folder, rows in found.items():
        page(arguments.results / folder, rows)
    return 0


def machines(results: pathlib.Path) -> dict[str, tables.Rows]:
    """Folder name -> rows, of every machine that has some. Quick runs and experiments are no machines."""
    found = {}
    for folder in sorted(path for path in results.iterdir() if path.is_dir()) if results.exists() else []:
        quick = folder.name.endswith("-quick")
        rows = tables.Rows([] if quick else [row for row in record.read(folder) if "bench" in row and "stamp" in row])
        if rows.all:
            found[folder.name] = rows
    return found


def page(folder: pathlib.Path, rows: tables.Rows) -> None:
    """README.md of a machine's folder with every table, and its pictures."""
    from bench import plots

    pictures = plots.draw(rows, folder)
    parts = [f"# Measured on {tables.machine(rows.all)}"]
    parts += ["Made by `python -m bench report` from the .jsonl files beside it."]
    timed = rows.where(bench="ops", device="cuda", case=lambda case: case != "copy")
    sections = [("Targets", tables.targets(rows) if "cuda" in rows.devices() else "")]
    for shape, dtype in dict.fromkeys((tuple(row["shape"]), row["dtype"]) for row in timed):
        title = f"Ops, microseconds, {'x'.join(map(str, shape))} {dtype}"
        sections += [(title, tables.ops(rows, shape, dtype))]
    sections += [("Launches", tables.launches(rows)), ("Host time", tables.host(rows))]
    sections += [("Solver: median relative error of a window's velocity, 1 - cosine", tables.solver(rows, None))]
    sections += [("Training step", tables.step(rows)), ("Tail", tables.tail(rows, next(iter(rows.devices()))))]
    parts += [f"## {title}\n\n{body}" for title, body in sections if body]
    parts += [f"![{path.stem}]({path.name})" for path in pictures]
    unstable = sum(bool(row["unstable"]) for row in rows.all)
    if unstable:
        parts += [f"\\* {unstable} rows: clocks differed by more than 3 % between the peers in three measurements."]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n")


def bench_block(found: dict[str, tables.Rows]) -> str:
    """Targets and the first tables, GPUs before CPUs."""
    merged = tables.Rows([row for rows in found.values() for row in rows.all])
    parts = [tables.targets(merged)]
    for folder, rows in sorted(found.items(), key=lambda item: "cuda" not in item[1].devices()):
        bodies = [tables.ops(rows), tables.launches(rows), _solver_part(rows), _step_part(rows)]
        shown = [body for body in bodies if body]
        if shown:
            link = f"([all tables](bench/results/{folder}/README.md))"
            parts += [f"Measured on {tables.machine(rows.all)} {link}:", *shown]
    return "\n\n".join(parts)


def _solver_part(rows: tables.Rows) -> str:
    table = tables.solver(rows, (10, 4))
    said = "Median relative error of a window's velocity and 1 - cosine, against the same solve in fp64 with the same steps"
    said += " (`python -m bench solver`; accuracy, not time):"
    return f"{said}\n\n{table}" if table else ""


def _step_part(rows: tables.Rows) -> str:
    """The whole loop of every family."""
    table = tables.step(rows, lambda case: " loop" in case or "published recipe" in case)
    return f"A whole training step (`python -m bench step`):\n\n{table}" if table else ""


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
    # One table, one kind of interval: a teacher is not trained, so over training seeds it has none.
    apart = max(max(m["frechet"]["values"]) - min(m["frechet"]["values"]) for m in result["methods"] if m["stage"] is None)
    for m in result["methods"]:
        paired, frechet = ({**m[key], "low": None} if m["stage"] is None and key in m else m.get(key) for key in ("paired_images", "frechet"))
        told = plus_minus(paired, 4) if paired else "reference"
        lines.append(f"| {m['method']} | {m['steps']} | {told} | {plus_minus(frechet, 2)} | {m['milliseconds_per_image']:.1f} |")
    machine, versions, settings = result["machine"], result["versions"], result["settings"]
    seeds, drawn = len(result["training_seeds"]), result["sampling_seeds"]
    drawn = drawn if isinstance(drawn, int) else len(drawn)
    lines += ["", f"Paired error: RMS pixel distance (pixels -1 to 1) to the teacher's {settings['teacher_steps']} steps from the same noise "
              "and prompt. "
              f"Fréchet distance: features of a classifier trained on the real scans, {settings['samples']:,} samples "
              f"against {result['real_scans']:,} scans. "
              f"± is half a 95 % interval over {seeds} training seeds; the teacher has none of these, and Fréchet distances of its {drawn} sampling "
              f"seeds lie up to {apart:.2f} apart. "
              f"`{result['command']}`, {sum(result['training_seconds']) / 60:.0f} minutes of training for the {seeds} seeds on a shared "
              f"machine: {machine['processor']}, "
              f"{machine['cores']} cores, Python {versions['python']}, torch {versions['torch']}, diffusers {versions['diffusers']}. "
              f"Times are one thread's, "
              f"batch {result['timing']['batch']}." + worse(result["differences"])]
    return "\n".join(lines)
