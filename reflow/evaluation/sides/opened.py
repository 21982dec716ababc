"""What `reflow compare` puts side by side: training runs, evaluations, and the digits' own reports, read into one shape."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reflow.errors import UserError
from reflow.evaluation.comparison import page_grid
from reflow.evaluation.comparison.page_grid import Grid
from reflow.evaluation.comparison.result import NAME, open_result
from reflow.recipes import reading

DIGITS = (
    {"name": "paired_digits", "title": "paired error, digits", "better": "lower", "digits": 4, "network": "", "real": False},
    {"name": "frechet_digits", "title": "FD, digits", "better": "lower", "digits": 2, "network": "classifier", "real": True},
    {"name": "diversity_digits", "title": "diversity, digits", "better": "higher", "digits": 3, "network": "classifier", "real": True},
    {"name": "read_digits", "title": "digit read", "better": "higher", "digits": 3, "network": "classifier", "real": False},
)
KEYS = ("paired_images", "frechet", "diversity", "prompt_accuracy")  # of a digits report, in the order of DIGITS


@dataclass(frozen=True)
class Result:
    """The rows of one report. terms: by name all that must be the same for two numbers to be comparable; `terms.py` says which of them a
    column depends on."""

    rows: tuple[Mapping[str, Any], ...]
    columns: tuple[Mapping[str, Any], ...]
    terms: Mapping[str, str]
    cost: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] | None = None  # of a comparison, whose outcome can be told in a sentence


@dataclass(frozen=True)
class Side:
    """One thing that is compared. recipe: resolved keys with their values; pictures: grids of evaluations; images: (what, PNG file)."""

    label: str
    path: Path
    kind: str
    recipe: Mapping[str, Any] | None = None
    recipe_of: Any = None  # the Recipe itself, of a run
    results: tuple[Result, ...] = ()
    grids: tuple[Grid, ...] = ()
    images: tuple[tuple[str, Path], ...] = ()


def open_sides(paths: Sequence[str]) -> list[Side]:
    """What lies at each path. Raises UserError for one that holds nothing to compare."""
    places = [Path(path) for path in paths]
    return [open_side(place, label) for place, label in zip(places, labels(places), strict=True)]


def labels(places: Sequence[Path]) -> list[str]:
    """A name of each: the last names of its path, as many as tell it from the others."""
    parts = [place.absolute().parts[1:] or ("/",) for place in places]
    found = []
    for i, own in enumerate(parts):
        count = next((n for n in range(1, len(own)) if not any(own[-n:] == other[-n:] for j, other in enumerate(parts) if j != i)), len(own))
        found.append("/".join(own[-count:]))
    return [f"{name} ({found[: i + 1].count(name)})" if found.count(name) > 1 else name for i, name in enumerate(found)]


def open_side(place: Path, label: str) -> Side:
    if not place.exists():
        raise UserError(f"There is no {place}; give folders of training runs, folders that `reflow evaluate` wrote, or their report.json files.")
    if (place / "recipe.toml").is_file():
        return of_run(place, label)
    return of_evaluation(place, label)


def of_run(place: Path, label: str) -> Side:
    """A training run: its recipe, and the reports that lie in it."""
    recipe = reading.load(str(place / "recipe.toml"))
    pictures = sorted((place / "validation").glob("*.png"))
    images = [("the last validation", pictures[-1])] if pictures else []
    results, grids = [], []
    for folder in reports(place / "report"):
        results.append(opened(folder))
        grids.append(page_grid.read_back(folder / "index.html"))
        images += drawn(folder)
    return Side(label, place, "training run", reading.flatten(recipe.resolved()), recipe, tuple(results), full(grids), tuple(images))


def of_evaluation(place: Path, label: str) -> Side:
    if place.is_file():
        experiment = committed(place)
        if experiment is not None:
            return Side(label, place, "experiment", resolved(experiment["resolved_recipe"]), None, (converted(place, experiment),))
    folders = reports(place) if place.is_dir() else [place]
    beside = folders or [place]
    if not folders:
        open_result(place)  # says what is missing
    grids = full([page_grid.read_back((folder if folder.is_dir() else folder.parent) / "index.html") for folder in beside])
    images = [image for folder in beside for image in drawn(folder if folder.is_dir() else folder.parent)]
    return Side(label, place, "evaluation", results=tuple(opened(folder) for folder in beside), grids=grids, images=tuple(images))


def resolved(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a recipe in a result: with those that later versions added, or as they are where it is not a recipe of this version."""
    try:
        return reading.flatten(reading.parse(dict(recipe), "the recipe of the result").resolved())
    except UserError:
        return reading.flatten(dict(recipe))


def full(grids: Sequence[Grid]) -> tuple[Grid, ...]:
    return tuple(grid for grid in grids if grid.rows)


def reports(folder: Path) -> list[Path]:
    """The folder itself where a report lies in it, else those below it, one a guidance."""
    return [folder] if (folder / NAME).is_file() else sorted(file.parent for file in folder.glob(f"*/{NAME}"))


def drawn(folder: Path) -> list[tuple[str, Path]]:
    """The grid of a digits report."""
    return [("samples of all methods", folder / "grid.png")] if (folder / "grid.png").is_file() else []


def committed(place: Path) -> dict[str, Any] | None:
    """A digits experiment's file; None for another."""
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    wanted = {"methods", "per_seed", "resolved_recipe", "settings", "machine"}
    return found if isinstance(found, dict) and wanted <= found.keys() and isinstance(found["resolved_recipe"], dict) else None


def opened(place: Path) -> Result:
    """The report of a folder, or a file. Raises UserError where there is none, or one that lacks what is compared."""
    return converted(place, open_result(place))


def converted(place: Path, report: Mapping[str, Any]) -> Result:
    try:
        return of_comparison(report) if report.get("format") == 2 else of_digits(report)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f"{place} is no whole result of `reflow evaluate` ({type(error).__name__}: {error}); evaluate again with --again.") from error


def device_of(report: Mapping[str, Any], name: str) -> str:
    machine = report["machine"]
    return str(machine["gpu"] if name.startswith("cuda") and machine.get("gpu") else machine["processor"])


def of_comparison(report: Mapping[str, Any]) -> Result:
    """Format 2."""
    protocol, reference = report["protocol"], report["reference"]
    terms = {
        "protocol": f"{protocol['title']} {protocol['digest']}",
        "prompts": f"{report['prompts']['count']} of digest {report['prompts']['digest']}",
        "samples": str(report["samples"]),
        "dtype": " and ".join(sorted({str(model.get("dtype")) for model in report["models"]})),
        "real images": str(report["real_images"]),
        "device": device_of(report, report["cost"]["devices"][0]),
        "timing": "one image at a time, decoding apart",
    }
    if reference is not None:
        teacher = next(model for model in report["models"] if model["label"] == reference["model"])
        guidance = "each row's guidance" if reference["guidance"] is None else f"guidance {reference['guidance']:g}"
        own = ", ".join(str(teacher[key]) for key in ("base", "path", "scheduler") if teacher.get(key))
        terms["reference"] = f"{reference['model']} ({own}) at {reference['steps']} steps, {guidance}"
    terms |= {f"features of {name}": found["digest"] for name, found in report["features"].items()}
    for row in report["rows"]:
        assert_row(row)
    columns = [c for c in report["columns"] if any(c["name"] in row["measures"] for row in report["rows"])]
    cost = {"evaluations": report["cost"]["network_evaluations"], "hours": report["cost"]["device_hours"]}
    return Result(tuple(report["rows"]), tuple(columns), terms, cost, report)


def assert_row(row: Mapping[str, Any]) -> None:
    """Raises KeyError or TypeError for a row that lacks what tables show."""
    str(row["model"]), int(row["steps"]), float(row["guidance"]), bool(row["is_reference"]), int(row["evaluations"])
    for found in row["measures"].values():
        float(found["mean"])
        if found["low"] is not None:
            float(found["low"]), float(found["high"])
    if row.get("seconds"):
        float(row["seconds"]["denoise"]), float(row["seconds"]["decode"])


def of_digits(report: Mapping[str, Any]) -> Result:
    """Format 1, and the committed experiment, whose intervals are over training seeds."""
    settings, scans, classifier = report["settings"], report["real_scans"], report["classifier"]
    steps, guidance = settings["teacher_steps"], float(settings.get("guidance") or 1)
    seeds = f"{len(report['per_seed'])} training seeds" if "per_seed" in report else f"{settings['seeds']} sampling seeds"
    terms = {
        "protocol": f"digits, {settings['samples']} samples, intervals over {seeds}{', unequal sets' if settings.get('unequal') else ''}",
        "prompts": "the digits of the scans",
        "samples": str(settings["samples"]),
        "dtype": "fp32",
        "real images": str(scans),
        "device": device_of(report, report["timing"]["device"]),
        "timing": f"batch {report['timing']['batch']} on {report['timing']['threads']} thread(s), with decoding",
        "reference": f"teacher at {steps} steps, guidance {guidance:g}",
        "features of classifier": f"{classifier['features']} features, {100 * classifier['held_out_accuracy']:.2f} % of held-out scans",
    }
    rows = []
    for method in report["methods"]:
        is_reference = method["method"] == "teacher" and method["steps"] == steps
        measures = {column["name"]: method[key] for column, key in zip(DIGITS, KEYS, strict=True) if method.get(key) is not None}
        rows.append(
            {
                "model": method["method"],
                "steps": method["steps"],
                "guidance": guidance,
                "is_reference": is_reference,
                "reference": None if is_reference else {"model": "teacher", "steps": steps, "guidance": guidance},
                "evaluations": method["steps"] * (2 if guidance != 1 and method["method"] == "teacher" else 1),
                "measures": measures,
                "seconds": {"denoise": method["milliseconds_per_image"] / 1000, "decode": None},
            }
        )
    return Result(tuple(rows), DIGITS, terms)
