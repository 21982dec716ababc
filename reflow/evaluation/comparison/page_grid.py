"""The pictures of a comparison's page: the same prompts and seeds across models, as WebP within the page, and read back from one."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

from reflow.errors import short
from reflow.evaluation.comparison.samples import Cell
from reflow.evaluation.markup import escape

COLUMNS = 8  # prompts that a page shows
SIDES = (2048, 1536, 1024, 768, 640, 512, 448, 384, 320, 256, 192, 160, 128, 96, 64)  # pixels of the longer side, as many as fit
BUDGET = 4_000_000  # bytes of all pictures, a third more as text: the page stays below 6 MB
QUALITY = 80
SAMPLE = 6  # pictures that are tried first
TINY = 128  # pixels: enlarged with their pixels kept apart
SOURCE = re.compile(r"data:image/(webp|png);base64,[A-Za-z0-9+/]+=*")


@dataclass(frozen=True)
class Chosen:
    """Files of the pictures of a page: of every cell one a prompt, with the seed of its noise."""

    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    files: Mapping[Cell, tuple[Path, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """One picture as a page has it. src: a data URL."""

    model: str
    steps: int
    guidance: float
    prompt: str
    seed: int
    src: str
    width: int
    height: int


@dataclass(frozen=True)
class Grid:
    """Rows of pictures, each of one model, steps and guidance, all of the same prompts. full: (width, height) of the largest before it was
    made smaller for the page; (0, 0) where that is not known."""

    rows: tuple[tuple[Picture, ...], ...]
    full: tuple[int, int] = (0, 0)


def opened(path: Path, side: int) -> tuple[Image.Image, tuple[int, int]]:
    """(the picture, its longer side at most `side`; the file's size)."""
    with Image.open(path) as file:
        picture, full = file.convert("RGB"), file.size
    return smaller(picture, side), full


def smaller(picture: Image.Image, side: int) -> Image.Image:
    if max(picture.size) <= side:
        return picture
    scale = side / max(picture.size)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.LANCZOS)


def webp(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY, method=4)
    return buffer.getvalue()


def fitting(pictures: Sequence[Image.Image], room: float) -> int:
    """The largest side at which these pictures take at most `room` bytes, else the smallest there is."""
    found = (side for side in SIDES if sum(len(webp(smaller(picture, side))) for picture in pictures) <= room)
    return next(found, SIDES[-1])


def grid(chosen: Chosen, budget: int = BUDGET) -> Grid:
    """The chosen pictures at the largest size at which all of them fit the budget."""
    files = [path for own in chosen.files.values() for path in own]
    if not files:
        return Grid(())
    some = [opened(path, SIDES[0])[0] for path in files[:: -(-len(files) // SAMPLE)]]
    side = fitting(some, 0.95 * budget * len(some) / len(files))
    pictures, sizes = zip(*(opened(path, side) for path in files), strict=True)
    coded = [webp(picture) for picture in pictures]
    while sum(map(len, coded)) > budget and side > SIDES[-1]:  # the others hold more than those that were tried
        side = SIDES[SIDES.index(side) + 1]
        pictures = tuple(smaller(picture, side) for picture in pictures)
        coded = [webp(picture) for picture in pictures]
    found = {path: (data, picture.size) for path, data, picture in zip(files, coded, pictures, strict=True)}
    rows = tuple(
        tuple(
            Picture(
                cell.label,
                cell.steps,
                cell.guidance,
                prompt,
                seed,
                f"data:image/webp;base64,{base64.b64encode(found[path][0]).decode()}",
                *found[path][1],
            )
            for prompt, seed, path in zip(chosen.prompts, chosen.seeds, own, strict=True)
        )
        for cell, own in chosen.files.items()
    )
    return Grid(rows, max(sizes))


def who(picture: Picture) -> str:
    return str(Cell(picture.model, picture.steps, picture.guidance))


def markup(pictures: Grid, label: str = "Samples") -> str:
    """The table of a grid: a row a model, a column a prompt."""
    heads = "".join(
        f'<th scope="col"><span class="prompt" title="{escape(p.prompt)}">{escape(p.prompt)}</span><span class="tag">seed {p.seed}</span></th>'
        for p in pictures.rows[0]
    )
    lines = []
    for row in pictures.rows:
        first = row[0]
        settings = f"{first.steps} step{'s' * (first.steps != 1)}, guidance {first.guidance:g}"
        cells = "".join(f"<td>{image(p)}</td>" for p in row)
        lines.append(f'<tr><th scope="row">{escape(first.model)}<span class="tag">{settings}</span></th>{cells}</tr>')
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}"><table class="grid"><thead><tr><th'
        f' scope="col">model</th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def image(p: Picture) -> str:
    tiny = ' class="tiny"' if max(p.width, p.height) <= TINY else ""
    return (
        f'<img loading="lazy" decoding="async"{tiny} width="{p.width}" height="{p.height}" alt="{escape(f"{who(p)}: {short(p.prompt)}")}"'
        f' data-who="{escape(who(p))}"'
        f' data-prompt="{escape(p.prompt)}" data-model="{escape(p.model)}" data-steps="{p.steps}" data-guidance="{p.guidance:g}"'
        f' data-seed="{p.seed}" src="{p.src}">'
    )


def note(pictures: Grid) -> str:
    """What is seen, and at which size."""
    width, height = max((p.width, p.height) for row in pictures.rows for p in row)
    size = f"{width} x {height} pixels" + (f", made smaller from {pictures.full[0]} x {pictures.full[1]}" if pictures.full > (width, height) else "")
    return (
        f"The first image of each of the first {len(pictures.rows[0])} prompts; nothing is selected. A column has one prompt and one noise, as far"
        f" as the models'"
        f" latents have the same shape. Stored as WebP at {size}."
    )


class Reader(HTMLParser):
    """Pictures of a grid in a page of ours; all else of the page is passed over."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Picture] = []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        given: dict[str, Any] = dict(attrs)
        if tag != "img" or "data-model" not in given or not SOURCE.fullmatch(given.get("src") or ""):
            return
        try:
            numbers = int(given["data-steps"]), float(given["data-guidance"])
            sizes = int(given["width"]), int(given["height"])
            self.found.append(Picture(given["data-model"], *numbers, given["data-prompt"] or "", int(given["data-seed"]), given["src"], *sizes))
        except (KeyError, TypeError, ValueError):
            return


def read_back(page: Path) -> Grid:
    """The grid of a comparison's page; one without rows where there is no such page or no grid in it."""
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return Grid(())
    reader = Reader()
    reader.feed(text)
    rows: dict[tuple[str, int, float], list[Picture]] = {}
    for picture in reader.found:
        rows.setdefault((picture.model, picture.steps, picture.guidance), []).append(picture)
    asked = [(p.prompt, p.seed) for p in next(iter(rows.values()), [])]
    return Grid(tuple(tuple(row) for row in rows.values() if [(p.prompt, p.seed) for p in row] == asked))
