"""index.html of a comparison: one self-contained page, made from its report and the chosen pictures alone."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflow.evaluation.comparison import page_curves, page_grid, page_table, verdicts
from reflow.evaluation.comparison.page_grid import COLUMNS, Chosen, Grid
from reflow.evaluation.comparison.page_style import DIALOG, SCRIPT, STYLE
from reflow.evaluation.comparison.text import shown
from reflow.evaluation.markup import document, escape, listed, shortened
from reflow.outputs import write_text

if TYPE_CHECKING:
    from reflow.evaluation.comparison.drawing import Drawing
    from reflow.evaluation.comparison.samples import Cell

CURVES = (
    "Bars are 95 % intervals, points of one number of steps are set side by side so that none hides another. Measures against the reference"
    " compare each guidance"
    " with the reference of that guidance."
)

KEYS = "Click a picture, or press Enter on it, to enlarge it; arrow keys then step through the models and the prompts."


def chosen_pictures(cells: Iterable[Cell], drawing: Drawing) -> Chosen:
    """The first image of each of the first prompts, of every cell; files of samples that may be deleted once the page is written."""
    first = [prompt * drawing.per_prompt for prompt in range(min(COLUMNS, len(drawing.prompts)))]
    files = {cell: tuple(drawing.samples(cell).image(number) for number in first) for cell in cells}
    return Chosen(drawing.prompts[: len(first)], tuple(drawing.seed + number for number in first), files)


def write(report: Mapping[str, Any], pictures: Chosen, folder: Path) -> Path:
    """Write folder/index.html; it holds all that it shows."""
    path = folder / "index.html"
    write_text(path, render(report, page_grid.grid(pictures)))
    return path


def render(report: Mapping[str, Any], pictures: Grid) -> str:
    columns = shown(report)
    title = title_of(report)
    top = [f"<h1>{escape(title)}</h1>", limited(report), f'<p class="sub">{escape(verdicts.summary(report))}</p>']
    lines = verdicts.at_equal_steps(report)
    if lines:
        column = verdicts.main_column(report) or {}
        top.append(f"<p>At equal steps and guidance, by {escape(column['title'])}:</p>{bullets(lines)}")
    top += [f'<p class="worse">{escape(note)}</p>' for note in report["notes"]]
    table = (
        page_table.whole(report, columns)
        + f'<p class="note">{escape(page_table.note(report, device_of(report)))}</p>'
        + page_table.over_seeds(report, columns)
    )
    curves, straight, grid = page_curves.curves(report, columns), page_table.straightness(report), ""
    if pictures.rows:
        grid = f'<p class="note">{escape(page_grid.note(pictures))}</p><p class="note screen">{KEYS}</p>{page_grid.markup(pictures)}'
    sections = [
        section("The protocol", protocol_box(report), flows=True),
        section("All models, steps and guidance", table),
        section("Quality against steps", f'{curves}<p class="note">{CURVES}</p>' if curves else ""),
        section("Straightness", straight, flows=True),
        section("The same prompts and seeds", grid),
        section("What was not measured", missing(report)),
        section("How it was measured", measured(report), flows=True),
    ]
    return document(title, ["\n".join(filter(None, top)), *filter(None, sections), DIALOG if pictures.rows else ""], STYLE, SCRIPT)


def section(title: str, body: str, flows: bool = False) -> str:
    """A part of the page under its head, "" for none; flows: no new sheet before it in print."""
    return f"<section{' class=flows' if flows else ''}><h2>{escape(title)}</h2>{body}</section>" if body else ""


def title_of(report: Mapping[str, Any]) -> str:
    reference = report["reference"]
    labels = [model["label"] for model in report["models"] if reference is None or model["label"] != reference["model"]]
    named = labels if len(labels) < 4 else [*labels[:2], f"{len(labels) - 2} more"]
    models = "Nothing" if not named else named[0] if len(named) == 1 else ", ".join(named[:-1]) + " and " + named[-1]
    return f"{models} against {reference['model']}" if reference is not None and labels else models if labels else reference["model"]


def limited(report: Mapping[str, Any]) -> str:
    """The mark of a comparison that is not the whole protocol; "" for one that is."""
    limit = report["protocol"]["limit"]
    if not limit:
        return ""
    return (
        f'<p class="badge">Only the first {limit} prompts: a first answer, not the numbers of the protocol {escape(report["protocol"]["name"])}</p>'
    )


def device_of(report: Mapping[str, Any]) -> str:
    """What the images were drawn on, in words."""
    machine, devices = report["machine"], report["cost"]["devices"]
    return str(machine["gpu"] if devices[0].startswith("cuda") and machine.get("gpu") else machine["processor"])


def facts(items: Mapping[str, str]) -> str:
    """A list of names and values; the values are markup already."""
    return '<dl class="facts">' + "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in items.items() if value) + "</dl>"


def bullets(lines: Iterable[str]) -> str:
    return '<ul class="lines">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def protocol_box(report: Mapping[str, Any]) -> str:
    """All of the protocol that changes a number."""
    protocol, prompts = report["protocol"], report["prompts"]
    captions, images, samples = protocol["captions"], protocol["images"], protocol["samples"]
    if captions["kind"] == "coco":
        order = {"file": "in the file's order", "image_id": "by image id", "seeded": f"shuffled by seed {captions['seed']}"}[captions["order"]]
        choice = "the caption of the lowest id" if captions["choice"] == "first" else f"one drawn by seed {captions['seed']}"
        count = f"the first {captions['count']:,}" if captions["count"] else "all"
        told = f"{captions['file']}: {count} images {order}, of each {choice}"
    else:
        told = "a text file's, one a line, in its order"
    per_prompt = samples["per_prompt"]
    cut = f"shorter side to {images['size']} pixels by {images['resize']}, then the centre" if images["size"] else "none: at their own size"
    real = "none"
    if report["real_images"]:
        which = "all of the folder" if images["all"] else "those of the captions"
        how = cut if images["size"] else f"shorter side to that of the samples by {images['resize']}, then the centre"
        real = f"{report['real_images']:,} of {images['folder']}/, {which}; cut: {how}"
    numbers = f"{report['samples']:,} a model, steps and guidance: {prompts['count']:,} prompts x {per_prompt}"
    seeds = f"sample number i has the noise of seed {samples['seed']} + i, prompts in order, a prompt's images one after the other"
    limit = f"<strong>the first {protocol['limit']:,} prompts</strong>" if protocol["limit"] else "none, the whole protocol"
    return facts(
        {
            "Name": f"{escape(protocol['title'])} <code>{escape(protocol['digest'])}</code>",
            "What": escape(protocol["about"]),
            "Source": escape(protocol["source"]),
            "Captions": f"{escape(told)}; {prompts['count']:,} prompts <code>{escape(prompts['digest'])}</code>",
            "Real images": escape(real),
            "Cut of the samples": escape(cut),
            "Images": escape(numbers),
            "Seeds": escape(seeds),
            "Limit": limit,
            "Wants": escape(", ".join(titles(report, protocol["measures"]["wanted"])) or "nothing in particular"),
        }
    )


def titles(report: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    known = {column["name"]: column["title"] for column in report["columns"]}
    return [known.get(name, name) for name in names]


def missing(report: Mapping[str, Any]) -> str:
    """What was not measured by its reason, what the protocol wants first."""
    wanted = report["protocol"]["measures"]["wanted"]
    reasons: dict[str, list[str]] = {}
    for name in sorted(report["not_measured"], key=lambda name: name not in wanted):
        reasons.setdefault(report["not_measured"][name], []).append(name)
    lines = []
    for why, names in reasons.items():
        asked = [name for name in names if name in wanted]
        said = f"; the protocol wants {listed(titles(report, asked)).replace(' or ', ' and ')}" if asked else ""
        lines.append(f"{', '.join(titles(report, names))}: {shortened(why)}{said}.")
    return bullets(lines) if lines else ""


def measured(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    parts = (machine.get("gpu"), machine["processor"], f"{machine['cores']} cores", f"{machine['memory_gib']} GiB", machine["system"])
    features = [f"{name}: {plain(f['implementation'])} {f['digest'][:16]}" for name, f in report["features"].items()]
    items = {
        "Command": f"<code>{escape(command_of(report['command']))}</code>",
        **{f"Model {model['label']}": escape(model_facts(model)) for model in report["models"]},
        "Networks of the measures": "<br>".join(map(escape, features)),
        "Drawn": escape(f"{report['batch']} images at once on {', '.join(report['cost']['devices'])}"),
        "Cost": escape(cost(report)),
        "Machine": escape(", ".join(str(part) for part in parts if part)),
        "Versions": escape(", ".join(f"{name} {version}" for name, version in report["versions"].items())),
        "Digests": f"protocol <code>{escape(report['protocol']['digest'])}</code>, prompts <code>{escape(report['prompts']['digest'])}</code>,"
        f" all that was asked for <code>{escape(report['key'])}</code>",
    }
    return facts(items)


def command_of(command: str) -> str:
    try:
        return shlex.join(map(shortened, shlex.split(command)))
    except ValueError:  # quotes that do not match
        return shortened(command)


def cost(report: Mapping[str, Any]) -> str:
    """Network evaluations and device hours; of a limited comparison also what the whole protocol would take."""
    found = report["cost"]
    said = f"{found['network_evaluations']:,} network evaluations, {hours(found['device_hours'])} of drawing on {device_of(report)}"
    protocol, count = report["protocol"], report["prompts"]["count"]
    if not protocol["limit"]:
        return said
    whole = protocol["captions"]["count"]
    if not whole or not count:
        return f"{said}; the whole protocol takes as many times more as it has more prompts"
    whole_hours = hours(found["device_hours"] * whole / count)
    return f"{said}; the whole protocol's {whole:,} prompts would take about {whole_hours} on the same device (estimated in proportion)"


def hours(value: float) -> str:
    return f"{value:,.1f} device hours" if value >= 10 else f"{value:.2f} device hours" if value >= 0.1 else f"{value:.2g} device hours"


def model_facts(model: Mapping[str, Any]) -> str:
    """All that is told of a model but its label."""
    return "; ".join(
        f"{name.replace('_', ' ')} {plain(value)}" for name, value in model.items() if name != "label" and value not in (None, "", [], {})
    )


def plain(value: Any) -> str:
    """A value in words: digests cut short, absolute paths by their last name."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return text[:16] if len(text) == 64 and not set(text) - set("0123456789abcdef") else shortened(text)
