"""The model families by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from reflow.errors import UserError
from reflow.models.digits import BUILTIN
from reflow.models.family import Family

FAMILIES = {
    family.name: family
    for family in (
        Family("digits", ("StableDiffusionXLPipeline",), pooled=True, builtin=BUILTIN),
        Family("sd15", ("StableDiffusionPipeline",), pooled=False),
        Family("sdxl", ("StableDiffusionXLPipeline",), pooled=True),
    )
}


def family(name: str) -> Family:
    """The family of this name; UserError with the nearest name if there is none."""
    if name in FAMILIES:
        return FAMILIES[name]
    near = difflib.get_close_matches(name, FAMILIES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else "there is no such name."
    raise UserError(f"Unknown model family {name!r}: {hint} Families are {', '.join(FAMILIES)}.")


def family_of(path: str | Path) -> tuple[Family, Path]:
    """The family that loads a diffusers folder, a hub repository's name or "builtin" (digits), and the local folder.

    An exported digits folder is a whole StableDiffusionXLPipeline and loads as sdxl. Raises UserError for a folder
    that is no pipeline, or of a kind that no family takes.
    """
    if str(path) == "builtin":
        return FAMILIES["digits"], BUILTIN
    from reflow.models.folder import find_folder, read_index

    folder = find_folder(path)
    kind = read_index(folder).get("_class_name")
    for candidate in FAMILIES.values():
        if candidate.builtin is None and kind in candidate.pipelines:
            return candidate, folder
    kinds = sorted({name for candidate in FAMILIES.values() for name in candidate.pipelines})
    raise UserError(f"{folder} holds a {kind}, which reflow does not read; it reads {' and '.join(kinds)}.")
