"""The page of all recipe keys, from the settings' own types and descriptions: `python -m reflow.recipes.keys` writes KEYS.md."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

from reflow.recipes.reading import toml_value
from reflow.recipes.settings import Recipe

PAGE = pathlib.Path(__file__).with_name("KEYS.md")
NAMES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
START = """# Recipe keys

Written by `python -m reflow.recipes.keys` from [sections.py](sections.py) and [settings.py](settings.py), which check a recipe; do not edit.
[digits.toml](digits.toml) shows every key where it is used, and `reflow recipe NAME --resolved` prints all of a recipe's values. A key that a
recipe leaves out has its default here. On the command line a key is `--set section.key=value`, of a stage `--set stages.0.key=value` (0 is the
first).
"""


def sections() -> Iterator[tuple[str, str, dict[str, dict[str, Any]]]]:
    """(name, what it is, keys) of every table of a recipe in the order of Recipe; a key maps to its JSON schema."""
    schema = Recipe.model_json_schema()
    yield "", schema["description"], {name: node for name, node in schema["properties"].items() if "type" in node and node["type"] != "array"}
    for name, node in schema["properties"].items():
        target = node.get("$ref") or node.get("items", {}).get("$ref")
        if target:
            table = schema["$defs"][target.rpartition("/")[2]]
            inner = {key: sub["items"]["$ref"] for key, sub in table["properties"].items() if "$ref" in sub.get("items", {})}
            for key, place in inner.items():
                table["properties"][key]["items"] = {**schema["$defs"][place.rpartition("/")[2]]}
            yield name, table["description"], table["properties"]


def page() -> str:
    """KEYS.md as text."""
    lines = [START]
    for name, text, keys in sections():
        title = "Top of the file" if not name else "[[stages]]" if name == "stages" else f"[{name}]"
        lines += [f"## {title}", "", " ".join(text.split()), "", "| key | value | default | meaning |", "|---|---|---|---|"]
        lines += [f"| `{key}` | {kind(node)} | {default(node)} | {cell(node['description'])} |" for key, node in keys.items()]
        lines.append("")
    return "\n".join(lines)


def kind(node: dict[str, Any]) -> str:
    """Type and range or choices of a key's schema, in words."""
    if "anyOf" in node:
        return kind(next(option for option in node["anyOf"] if option.get("type") != "null"))
    if "enum" in node:
        return ", ".join(f"`{choice}`" if choice else '`""`' for choice in node["enum"])
    if node["type"] == "array":
        inner = node.get("prefixItems")
        return f"{len(inner)} of: {kind(inner[0])}" if inner else f"list of: {kind(node['items'])}"
    if node["type"] == "object":
        return "{" + ", ".join(f"`{key}`: {kind(sub)}, {default(sub, key in node['required'])}" for key, sub in node["properties"].items()) + "}"
    bounds = [f"{word} {node[name]:g}" for name, word in BOUNDS.items() if name in node]
    return NAMES[node["type"]] + (f" {', '.join(bounds)}" if bounds else "")


def default(node: dict[str, Any], required: bool = False) -> str:
    """The default as a recipe would write it."""
    if required or "default" not in node:
        return "must be given"
    return "-" if node["default"] is None else f"`{toml_value(node['default'])}`"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
