"""The model families by name: those that ship, and any that a file of yours registers."""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from reflow.errors import UserError
from reflow.models import flows
from reflow.models.digits import BUILTIN
from reflow.models.family import Family
from reflow.models.folder import find_folder, load_base, read_index, refuse_options

if TYPE_CHECKING:
    from reflow.recipes.sections import Model

FAMILIES: dict[str, Family] = {}
_OF_FILE: dict[Path, Family] = {}


def register(new: Family) -> Family:
    """Make a family known by its name, and return it. Raises ValueError for a name that is taken."""
    if new.name in FAMILIES:
        raise ValueError(f"There is a model family {new.name!r} already; give the new one another name")
    FAMILIES[new.name] = new
    return new


Family.loader = staticmethod(load_base)
register(Family("digits", ("StableDiffusionXLPipeline",), pooled=True, builtin=BUILTIN))
register(Family("sd15", ("StableDiffusionPipeline",), pooled=False))
register(Family("sdxl", ("StableDiffusionXLPipeline",), pooled=True))
for flow in flows.FAMILIES:
    register(flow)


def family(name: str) -> Family:
    """The family of this name, or the one that a Python file of this path registers; UserError with the nearest name
    if there is none.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    if name.endswith(".py"):
        return _from_file(Path(name).expanduser().resolve())
    near = difflib.get_close_matches(name, FAMILIES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else "there is no such name."
    raise UserError(f"Unknown model family {name!r}: {hint} Families are {', '.join(FAMILIES)}, or a .py file.")


def _from_file(path: Path) -> Family:
    if path not in _OF_FILE:
        if not path.is_file():
            raise UserError(f"There is no file {path} to read a model family from; write a family's name or its file.")
        before = set(FAMILIES)
        spec = importlib.util.spec_from_file_location(f"reflow_family_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(f"The model family in {path} cannot be read: {type(error).__name__}: {error}.") from error
        new = [name for name in FAMILIES if name not in before]
        if len(new) != 1:
            raise UserError(f"{path} registers {len(new)} model families; call reflow.models.register in it once.")
        _OF_FILE[path] = FAMILIES[new[0]]
    return _OF_FILE[path]


def family_for(model: Model) -> Family:
    """The family of a recipe's [model] section, with the null prompt and the guidance input that the section asks for."""
    found = family(model.family)
    own = {"null_prompt": model.null_prompt, "guidance": model.guidance}
    return found if (model.null_prompt, model.guidance) == ("base", 0.0) else replace(found, **own)


def base_path(model: Model) -> str | Path:
    """What `Family.load` and everything else takes as the base of a recipe's [model] section: the folder that a single
    file is unpacked into, and any other base as it is written.
    """
    single = {"tokenizer": model.tokenizer, "config": model.config, "prediction_type": model.prediction_type}

    if model.base == "builtin":
        refuse_options(model.base, single)
    elif any(single.values()) or Path(model.base).expanduser().is_file():
        return find_folder(model.base, single)
    return model.base


def family_of(
    path: str | Path, *, tokenizer: str = "", config: str = "", prediction_type: str = ""
) -> tuple[Family, Path]:
    """The family that loads a diffusers folder, a hub repository's name, a single-file checkpoint or "builtin"
    (digits), and the local folder. The options are for single files: see `reflow.models.single_file.unpack`.

    An exported digits folder is a whole StableDiffusionXLPipeline and loads as sdxl. Raises UserError for a folder
    that is no pipeline, or of a kind that no family takes.
    """
    if str(path) == "builtin":
        return FAMILIES["digits"], BUILTIN
    folder = find_folder(path, {"tokenizer": tokenizer, "config": config, "prediction_type": prediction_type})
    kind = read_index(folder).get("_class_name")
    for candidate in FAMILIES.values():
        if candidate.builtin is None and kind in candidate.pipelines:
            return candidate, folder
    kinds = sorted({name for candidate in FAMILIES.values() for name in candidate.pipelines})
    raise UserError(f"{folder} holds a {kind}, which reflow does not read; it reads {' and '.join(kinds)}.")
