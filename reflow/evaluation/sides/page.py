"""index.html of several runs and evaluations side by side; one self-contained page in the style of an evaluation's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reflow.evaluation.comparison import page_grid, page_table, verdicts
from reflow.evaluation.comparison.page import KEYS, bullets, facts, section
from reflow.evaluation.comparison.page_style import DIALOG, SCRIPT, STYLE
from reflow.evaluation.markup import document, escape, image, plain_table, shortened, without_paths
from reflow.evaluation.sides import rows, terms
from reflow.evaluation.sides.opened import Side
from reflow.outputs import write_text

LARGEST = 3_000_000  # bytes of one picture that is taken as it is
COST = (
    "Samples: those of the log, or of the recipe where there is none. Teacher evaluations: network rows by the recipe, both halves of guidance"
    " counted. Student"
    " evaluations: one forward and backward a sample. Training time: of the steps that the log has, without starting up; the machine is not in the"
    " log."
)


def write(sides: Sequence[Side], command: str, folder: Path) -> Path:
    """Write folder/index.html."""
    path = folder / "index.html"
    write_text(path, render(sides, command))
    return path


def render(sides: Sequence[Side], command: str) -> str:
    title = " beside ".join(side.label for side in sides[:3]) + (f" and {len(sides) - 3} more" if len(sides) > 3 else "")
    found = terms.entries(sides)
    columns = terms.all_columns(found)
    top = [f"<h1>{escape(title)}</h1>"]
    outcomes = [f"{side.label}: {verdicts.summary(result.report)}" for side, result in found if result.report is not None]
    top += [f'<p class="sub">{escape(line)}</p>' for line in outcomes]
    top += [f'<p class="worse">{escape(line)}</p>' for line in terms.warnings(found, columns)]
    grids = any(side.grids for side in sides)
    sections = [
        section("Quality", quality(sides)),
        section("Recipes", recipes(sides), flows=True),
        section("Cost", costs(sides), flows=True),
        section("Pictures", pictures(sides)),
        section("What is compared", compared(sides, command), flows=True),
    ]
    return document(title, ["\n".join(top), *filter(None, sections), DIALOG if grids else ""], STYLE, SCRIPT)


def recipes(sides: Sequence[Side]) -> str:
    """The keys whose values differ; "" where fewer than two sides have a recipe."""
    named = [side.label for side in sides if side.recipe is not None]
    if len(named) < 2:
        return ""
    found = rows.differences(sides)
    if not found:
        return "<p>The recipes are the same, key by key.</p>"
    lines = [(key, *told_apart([without_paths(value) for value in values])) for key, values, _ in found]
    told = "Grey: keys that change where and how numbers are computed and kept, and nothing that is learnt. Of paths only the last names are shown."
    shown = plain_table(("key", *named), lines, ["" if learnt else "teacher" for _, _, learnt in found])
    return f'{shown}<p class="note">{told}</p>'


def told_apart(values: Sequence[str]) -> list[str]:
    """Values that shortening made equal, numbered: they are of different folders."""
    return [f"{value} ({i + 1})" for i, value in enumerate(values)] if len(set(values)) == 1 else list(values)


def costs(sides: Sequence[Side]) -> str:
    return plain_table(rows.COST, rows.cost_rows(sides)) + f'<p class="note">{escape(COST)}</p>'


def quality(sides: Sequence[Side]) -> str:
    """All rows of all sides; a letter stands at each number that may not be compared with another of its column."""
    found = terms.entries(sides)
    if not found:
        return "<p>None of them holds an evaluation; <code>reflow evaluate</code> makes one.</p>"
    columns = terms.all_columns(found)
    marks = {column["name"]: terms.marked(found, column).marks for column in (*columns, terms.TIME)}
    everything = [row for _, result in found for row in result.rows]
    # Where numbers are of different terms no best is told.
    best = {column["name"]: [] if any(marks[column["name"]]) else verdicts.best(everything, column) for column in columns}
    fixed = [page_table.head("side"), page_table.head("model", name=True)]
    fixed += [page_table.head("steps", narrow=True), page_table.head("guidance", narrow=True)]
    heads = [page_table.head(column["title"], column["better"]) for column in columns]
    heads += [page_table.head(title, narrow=True) for title in page_table.COSTS]
    lines = []
    for i, (side, result) in enumerate(found):
        for row in result.rows:
            name = f'<td class="name" data-v="{escape(row["model"])}">{escape(row["model"])}{page_table.tag(row)}</td>'
            cells = [page_table.measure_cell(row, column, best[column["name"]], marks[column["name"]][i]) for column in columns]
            cells += page_table.cost_cells(row, marks[terms.TIME["name"]][i])
            lines.append((row["is_reference"], [page_table.name_cell(side.label), name, *page_table.setting_cells(row)], cells))
    told = (
        "± is half a 95 % interval. Numbers of one column with different letters may not be compared; what they differ in is said"
        f" {'above' if terms.warnings(found, columns) else 'where there are any'}. Bold green: the best of a column without letters, only where"
        f" its interval is apart"
        " from those of all others. Seconds of a digits report are with decoding."
    )
    return page_table.sortable("Quality of all sides", fixed, heads, lines) + f'<p class="note">{escape(told)}</p>'


def pictures(sides: Sequence[Side]) -> str:
    """The grids of evaluations and the pictures of runs, one side under the other."""
    parts = []
    for side in sides:
        own = [page_grid.markup(grid, f"Samples of {side.label}") for grid in side.grids]
        own += [f"<p>{escape(what)}</p>{image(path.read_bytes(), f'{side.label}: {what}')}" for what, path in side.images if readable(path)]
        if own:
            parts.append(f"<h3>{escape(side.label)}</h3>{''.join(own)}")
    keys = f'<p class="note screen">{KEYS}</p>' if any(side.grids for side in sides) else ""
    return keys + "".join(parts) if parts else ""


def readable(path: Path) -> bool:
    """Whether a file is a PNG small enough to be taken into the page."""
    try:
        with open(path, "rb") as file:
            return file.read(8) == b"\x89PNG\r\n\x1a\n" and path.stat().st_size <= LARGEST
    except OSError:
        return False


def compared(sides: Sequence[Side], command: str) -> str:
    """What each side is, and the terms of its numbers."""
    items = {"Command": f"<code>{escape(command)}</code>"}
    for side in sides:
        lines = [", ".join(f"{name}: {shortened(value)}" for name, value in result.terms.items()) for result in side.results]
        items[side.label] = (
            f"{escape(side.kind)} {escape(shortened(str(side.path.absolute())))}{bullets(lines) if lines else ', without an evaluation'}"
        )
    return facts(items)
