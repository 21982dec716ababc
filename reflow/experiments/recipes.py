"""Every digits recipe against its own teacher: paired errors at equal steps, several training seeds.

    reflow experiment recipes --out runs/experiments/recipes

Each recipe is trained once a seed as by `reflow train --recipe NAME --set train.seed=N` and measured as by `reflow
evaluate`; what is learnt of guidance is the teacher's too. A line of OUT/recipes.jsonl for each recipe and seed; a line
that is there is not made again, so the same command goes on, also with a file of lines that another machine made. Then
OUT/recipes.json and recipes.md: mean and 95 % interval over training seeds of the student's paired error less that of its
teacher's own solver at as many steps. A recipe is won where that interval lies below 0 at one step a window.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reflow.errors import UserError
from reflow.evaluation import machine, report
from reflow.evaluation.intervals import t_interval
from reflow.evaluation.runs import open_run
from reflow.evaluation.suite import Settings
from reflow.experiments import digits_full
from reflow.lines import read_lines
from reflow.outputs import write_text
from reflow.recipes import reading

NAME = "recipes"
ALL = ("digits-421", "digits-perflow", "digits-rectified", "digits-phased", "digits-instaflow", "digits-guided", "digits")


def run(out: Path, *, recipe: tuple = (), seeds: int = 3, samples: int = 600, ranks: int = 0, set_: tuple = ()) -> None:
    """Train and measure each recipe (default: all) with `seeds` training seeds. ranks 0: two on a CPU, else the GPUs."""
    names = list(dict.fromkeys(recipe)) or list(ALL)
    checked = {name: reading.load(name, list(set_)) for name in names}
    if seeds < 1:
        raise UserError("--seeds must be 1 or more.")
    settings, lines = Settings(samples=samples, seeds=1), read(out / "recipes.jsonl")
    for seed in range(seeds):
        for name in names:
            overrides = [*set_, f"train.seed={seed}"]
            if any(same(line, name, seed, settings, set_) for line in lines):
                continue
            folder = out / f"{name}-seed-{seed}"
            digits_full.train(name, folder, overrides, ranks or digits_full.default_ranks(), stages=len(checked[name].stages))
            found = open_run(folder)
            measured = report.existing(folder / "report", found, settings) or report.make(
                found, folder / "report", settings, command=digits_full.command()
            )
            lines.append(line_of(name, seed, measured, digits_full.taken(out).get(folder.name, 0.0), set_))
            write_text(out / "recipes.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    kept = [line for line in lines if line["recipe"] in names and line["samples"] == samples and line["set"] == list(set_)]
    result = {"command": digits_full.command(), "recipes": [gather([x for x in kept if x["recipe"] == name]) for name in names]}
    report.write_json(result, out / "recipes.json")
    write_text(out / "recipes.md", table(result))
    print(f"\n{table(result)}\nResults: {out / 'recipes.json'}")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines that are there. Raises UserError for what is none of them."""
    try:
        return [json.loads(line) for line in read_lines(path)] if path.exists() else []
    except ValueError as error:
        raise UserError(f"{path} is not made of lines of this experiment ({error}); remove it, or give another --out.") from error


def same(line: dict[str, Any], name: str, seed: int, settings: Settings, set_: Sequence[str]) -> bool:
    return (line["recipe"], line["seed"], line["samples"], line["set"]) == (name, seed, settings.samples, list(set_))


def line_of(name: str, seed: int, measured: dict[str, Any], seconds: float, set_: Sequence[str]) -> dict[str, Any]:
    """One training: the student's paired errors in pixels and its teacher's at as many steps, and their difference."""
    errors = {(m["method"], m["steps"]): m["paired_images"]["mean"] for m in measured["methods"] if "paired_images" in m}
    rows = [
        {
            "stage": d["stage"],
            "windows": d["windows"],
            "steps": d["steps"],
            "student": errors[d["method"], d["steps"]],
            "teacher": errors["teacher", d["steps"]],
            "difference": {key: d["images"][key] for key in ("mean", "low", "high")},
        }
        for d in measured["differences"]
        if ("teacher", d["steps"]) in errors
    ]
    return {
        "recipe": name,
        "seed": seed,
        "samples": measured["settings"]["samples"],
        "set": list(set_),
        "rows": rows,
        "weights": measured["weights"],
        "training_seconds": round(seconds, 1),
        **machine.describe(),
    }


def gather(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Lines of one recipe as rows over training seeds. won: every stage beats its teacher at one step a window, with an
    interval that excludes 0 (None with one seed, which has no interval)."""
    rows = []
    for i, first in enumerate(lines[0]["rows"]):
        each = [line["rows"][i] for line in lines]
        interval = t_interval([row["difference"]["mean"] for row in each])
        errors = {who: t_interval([row[who] for row in each]).as_dict() for who in ("student", "teacher")}
        rows.append({**{key: first[key] for key in ("stage", "windows", "steps")}, **errors, "difference": interval.as_dict()})
    native = [row["difference"] for row in rows if row["steps"] == row["windows"]]
    known = all(row["high"] is not None for row in native)
    return {
        "recipe": lines[0]["recipe"],
        "seeds": [line["seed"] for line in lines],
        "rows": rows,
        "won": all(row["high"] < 0 for row in native) if known else None,
        "training_seconds": [line["training_seconds"] for line in lines],
        "machines": sorted({json.dumps(line["machine"], sort_keys=True) for line in lines}),
    }


def table(result: dict[str, Any], *, native: bool = False) -> str:
    """The rows as Markdown; native: of one step a window alone."""
    out = ["| recipe | stage | windows | steps | student | its teacher | difference (95 %) | seeds |", "|---|---|---|---|---|---|---|---|"]
    for found in result["recipes"]:
        for row in found["rows"]:
            if native and row["steps"] != row["windows"]:
                continue
            d = row["difference"]
            half = "" if d["high"] is None else f" ± {(d['high'] - d['low']) / 2:.4f}"
            out.append(
                f"| `{found['recipe']}` | {row['stage']} | {row['windows']} | {row['steps']} "
                f"| {row['student']['mean']:.4f} | {row['teacher']['mean']:.4f} | "
                f"{d['mean']:+.4f}{half} | {len(found['seeds'])} |"
            )
    return "\n".join(out) + "\n"
