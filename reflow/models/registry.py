"""The model families by name."""

from __future__ import annotations

import difflib

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
