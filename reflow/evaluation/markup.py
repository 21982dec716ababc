"""What the pages of reflow share: their look, tables, pictures and how paths are kept to themselves."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from typing import Any

# An absolute path at the beginning of a value or of an item of a list; it may hold blanks.
PATH = re.compile(r"""(^|[\s="'\[,(])(?:~?/)(?=[^\s/])([^"'\],)]+)""")
STYLE = """
:root { color-scheme: light; --ink: #1c2430; --muted: #66707d; --line: #e3e7ec; --blue: #1f6fb4; --wash: #f6f8fa;
  --warn: #b4441f; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em; }
h2 { font-size: 20px; margin: 44px 0 10px; letter-spacing: -.005em; }
p { margin: 8px 0; max-width: 75ch; }
.worse { border-left: 3px solid var(--warn); padding-left: 12px; }
.tile .more { color: var(--warn); }
.sub, .note { color: var(--muted); }
.note { font-size: 14px; max-width: 100ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 14px; margin: 26px 0 8px; }
.tile { border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px 16px; }
.tile .what { color: var(--muted); font-size: 13.5px; }
.tile .number { font-size: 30px; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile .against { font-size: 14px; }
.wide { overflow-x: auto; }
img { max-width: 100%; height: auto; display: block; margin: 10px 0; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; color: var(--muted); border-bottom: 1.5px solid var(--line);
  padding: 6px 10px; white-space: nowrap; }
td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:last-child, th:last-child { padding-right: 0; }
tr.teacher td { color: var(--muted); }
.pm { color: var(--muted); font-size: 12.5px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 22px; margin: 10px 0; font-size: 14.5px; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--wash); border-radius: 8px; padding: 14px 16px; overflow-x: auto; }
details summary { cursor: pointer; color: var(--blue); }
"""

def document(title: str, parts: Sequence[str], style: str = "", script: str = "") -> str:
    """A whole page of these parts; nothing of it lies elsewhere."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport"'
        ' content="width=device-width,'
        f' initial-scale=1">\n<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n'
        + "\n".join(parts)
        + f"\n</main>\n{f'<script>{script}</script>' if script else ''}{chr(10) if script else ''}</body>\n</html>\n"
    )


def escape(value: Any) -> str:
    return html.escape(str(value))


def image(data: bytes, text: str) -> str:
    return (
        f'<div class="wide"><img alt="{escape(text)}"'
        f' src="data:image/png;base64,{base64.b64encode(data).decode()}"></div>'
    )


def shortened(text: str) -> str:
    """A word or value whose absolute paths show their last names alone: a page is passed on, a machine's folders are not."""
    return PATH.sub(lambda found: f"{found[1]}.../{found[2].rstrip('/').rpartition('/')[2]}", text)


def without_paths(recipe_text: str) -> str:
    """`shortened` for every string of a dumped recipe."""
    return re.sub(r'"((?:[^"\\]|\\.)*)"', lambda m: f'"{shortened(m[1])}"', recipe_text)


def listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " or " + items[-1]


def number(value: str) -> str:
    """A number, its interval in a quieter hand; a word as it is."""
    mean, plus, half = (value if any(map(str.isalpha, value)) else value.replace("-", "−")).partition(" ± ")
    return f'{escape(mean)}{f" <span class=pm>± {escape(half)}</span>" if plus else ""}'


def cell(value: str) -> str:
    return f"<td>{number(value)}</td>"


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr>"]
    for i, row in enumerate(rows):
        mark = f' class="{classes[i]}"' if classes and classes[i] else ""
        lines.append(f"<tr{mark}>" + f"<td>{escape(row[0])}</td>" + "".join(cell(c) for c in row[1:]) + "</tr>")
    return '<div class="wide"><table>' + "".join(lines) + "</table></div>"
