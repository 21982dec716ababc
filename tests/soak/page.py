"""The table of tests/README.md, from the summaries under bench/results/soak: `python tests/soak/page.py` writes it."""

from __future__ import annotations

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE, RESULTS = ROOT / "tests" / "README.md", ROOT / "bench" / "results" / "soak"
BLOCK = re.compile(r"(<!-- soak:start -->\n).*?(<!-- soak:end -->)", re.S)
ROWS = ("kills", "inputs", "weights", "recipes", "mutants", "growth")


def table(results: pathlib.Path = RESULTS) -> str:
    """One row a summary, and what each machine was."""
    lines = ["| row | what is tried | cases | counted | failed | seconds |", "|---|---|---|---|---|---|"]
    machines = []
    for name in ROWS:
        file = results / f"{name}.json"
        if not file.exists():
            continue
        found = json.loads(file.read_text())
        counted = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in found["totals"].items() if key != "steps")
        if name == "growth":
            counted = f"{found['totals']['steps']:,} steps; largest slope {max(found['slopes'].values()):g} bytes a step"
        lines.append(f"| `{name}` | {found['title']} | {found['cases']:,} of {found['of']:,} | {counted} | {len(found['failed'])} | {found['seconds']:,} |")
        machines.append(f"{name}: revision {found['revision'][:8]}, {found['cpu']}, {found['cores']} cores, Python {found['python']}, torch {found['torch']}, "
                        f"{found['date'][:10]}")
    return "\n".join([*lines, "", *(f"* {machine}" for machine in machines), ""])


def page(text: str) -> str:
    return BLOCK.sub(lambda found: found[1] + "\n" + table() + "\n" + found[2], text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
