"""One recipe describes one run. TOML in, checked and resolved settings out; unknown keys are refused with the nearest name."""

from __future__ import annotations

import difflib
import itertools
import json
import math
import os
import pathlib
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import pydantic

from reflow.errors import UserError, quote, short
from reflow.recipes import tables
from reflow.recipes.sections import Place
from reflow.recipes.settings import Recipe, Stage

# Sections whose keys may change between a run and its resumption: none of them changes what is learned.
FREE_SECTIONS = ("validate", "checkpoint", "log", "name")
# Keys that decide where the same numbers lie, how a batch is cut and which kernels compute it, each with the reason why it may change between a run
# and its resumption: the result is then equal to rounding, as with the number of ranks. Nothing else may.
FREE_KEYS = {
    "train.zero_stage": "ranks share the same masters, gradients and weights in another way",
    "train.micro_batch": "the same samples of a batch, in other parts; sums run in another order",
    "train.offload": "the same optimizer step, on the CPU",
    "teacher.offload": "the same weights, copied up for every solve",
    "model.gradient_checkpointing": "the same blocks, computed a second time instead of kept",
    "model.compile": "the same blocks, fused otherwise",
    "train.rank_patience": "the same training, which ends sooner or later where a rank is gone",
    "train.check_fit": "the same training, or none",
    "model.attention": "the same attention, by another kernel",
}

# Optimizers that take the same step and store it under the same names, in fp32: one may go on where the other stopped.
SAME_STEP = {"adamw", "fused_adamw"}

TOLD = 5  # mistakes that one refusal names


def available() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("reflow") / "recipes"
    return sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml"))


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or path and apply `section.key=value` overrides. Raises UserError with one sentence."""
    text, where = text_of(name)
    raw = tables.parse(text, where)
    for override in overrides:
        apply_override(raw, override)
    return parse(raw, where)


def text_of(name: str) -> tuple[str, str]:
    """(the text of a recipe by name or path as it stands, what to call it in a sentence). Raises UserError where there is none to read."""
    path = pathlib.Path(name)
    if path.suffix == ".toml" or os.path.exists(path):
        if not os.path.isfile(path):
            raise UserError(f"The recipe file {short(name)} does not exist; give an existing .toml file or one of: {', '.join(available())}.")
        return tables.read(path), str(path)
    if name in available():
        return (resources.files("reflow") / "recipes" / f"{name}.toml").read_text(encoding="utf-8"), f"recipe {name}"
    raise UserError(f"There is no recipe called '{short(name)}'{nearest(name, available())}; the recipes here are: {', '.join(available())}.")


def parse(raw: dict[str, Any], where: str) -> Recipe:
    """Check a recipe's raw tables. Raises UserError naming the key, what was wrong and what to write."""
    tables.check(raw, where)
    try:
        recipe = Recipe.model_validate(raw)
    except pydantic.ValidationError as error:
        items = error.errors()
        more = f"; and {len(items) - TOLD} more" if len(items) > TOLD else ""
        raise UserError("; ".join(sentence(item, where) for item in items[:TOLD]) + more) from error
    tables.check(recipe.resolved(), where)
    check(recipe, where)
    return recipe


def check(recipe: Recipe, where: str) -> None:
    """Refuse values that are fine alone and impossible together."""
    for i, stage in enumerate(recipe.stages):
        key = f"stages.{i}"
        if (stage.windows is None) == (stage.boundaries is None):
            raise UserError(f"{where}: {key} needs either 'windows' (how many) or 'boundaries' (their edges), and only one of them.")
        edges = stage.edges
        if len(edges) < 2 or any(a <= b for a, b in itertools.pairwise(edges)) or edges[0] > 1 or edges[-1] < 0:
            raise UserError(f"{where}: {key}.boundaries must fall from at most 1 (noise) to at least 0 (data); it is {quote(list(edges))}.")
        if stage.merges and (len(edges) - 1) * 2**stage.merges > 1000:
            raise UserError(f"{where}: {key} has {len(edges) - 1} windows of 2^{stage.merges} parts each (merges), and all of time has 1000; "
                            f"write fewer merges.")
        solved = stage.solved_edges
        indices = min(round(1000 * a) - round(1000 * b) for a, b in itertools.pairwise(solved))
        if stage.solver_steps > indices:
            raise UserError(f"{where}: {key}.solver_steps is {stage.solver_steps}, but its smallest {'part' if stage.merges else 'window'} spans "
                            f"only {indices} schedule indices; write at most {indices}.")
        if i == 0 and stage.teacher == "previous":
            raise UserError(f"{where}: {key}.teacher is 'previous', but the first stage has no previous student; write 'root'.")
        if stage.teacher == "previous" and not set(solved) <= set(recipe.stages[i - 1].edges):
            own = "the boundaries of its parts" if stage.merges else "its boundaries"
            raise UserError(f"{where}: {key} merges windows of stage {i - 1}, so each of {own} must be one of that stage's "
                            f"({quote(list(recipe.stages[i - 1].edges))}); use teacher = 'root' or other windows.")
        if stage.samples < recipe.train.batch_size:
            raise UserError(f"{where}: {key}.samples is {stage.samples}, less than one batch of train.batch_size = {recipe.train.batch_size}; "
                            f"give every stage at least one batch.")
        if recipe.train.micro_batch % stage.chords_per_solve:
            raise UserError(f"{where}: {key}.chords_per_solve = {stage.chords_per_solve} must divide train.micro_batch = {recipe.train.micro_batch}.")
        check_own(recipe, i, where)
        objective = recipe.of_stage(i).objective
        if objective.points == "schedule" and objective.loss == "aligned_v":
            raise UserError(f"{where}: {key} has loss 'aligned_v' with objective.points = 'schedule', whose target is the window's end and no "
                            f"velocity; write loss = 'pseudo_huber' or 'mse', or points = 'chord'.")
    check_memory(recipe, where)
    if recipe.data.sources and (recipe.data.path or recipe.data.source == "digits"):
        other = f"data.path = '{short(recipe.data.path)}'" if recipe.data.path else "data.source = 'digits', which lies in one place"
        raise UserError(f"{where}: data.sources stands beside {other}; write the one or the other (source = 'cache' or 'stream' for several places).")
    if recipe.model.compile and recipe.train.zero_stage == 3:
        raise UserError(f"{where}: model.compile = true cannot be used with train.zero_stage = 3, whose hooks gather weights inside the blocks that "
                        f"are compiled; write compile = false, or zero_stage 0 to 2.")
    if recipe.train.batch_size % recipe.train.micro_batch:
        raise UserError(f"{where}: train.micro_batch = {recipe.train.micro_batch} must divide train.batch_size = {recipe.train.batch_size}.")
    on_schedule = any(recipe.of_stage(i).objective.points == "schedule" for i in range(len(recipe.stages)))
    if on_schedule and recipe.student.prediction_type not in ("ddim_eps", "ddim_v"):
        raise UserError(f"{where}: objective.points = 'schedule' needs student.prediction_type 'ddim_eps' or 'ddim_v', "
                        f"not '{recipe.student.prediction_type}'.")


# Keys of a stage that say nothing unless another has one of these values.
NEEDS = {
    ("time_share", "time_upper"): ("objective", "time_density", ("window_start",)),
    ("time_sharpness",): ("objective", "time_density", ("u_shaped", "exponential")),
    ("direction_weight", "direction_norm"): ("objective", "loss", ("aligned_v",)),
    ("huber_c", "huber_norm"): ("objective", "loss", ("pseudo_huber",)),
    ("starts_share",): ("objective", "starts", ("noise",)),
    ("space",): ("objective", "points", ("chord",)),
}


def check_own(recipe: Recipe, index: int, where: str) -> None:
    """Refuse keys of a stage's own that its other values leave without a meaning."""
    stage, staged = recipe.stages[index], recipe.of_stage(index)
    for keys, (section, other, values) in NEEDS.items():
        found = getattr(getattr(staged, section), other)
        own = next((key for key in keys if getattr(stage, key) is not None), None)
        if own and found not in values:
            wanted = " or ".join(f"'{value}'" for value in values)
            raise UserError(f"{where}: stages.{index}.{own} counts with {other} = {wanted} only, and the stage has {other} = '{found}'; "
                            f"leave it out, or write stages.{index}.{other}.")
    if stage.self_share is not None and not stage.merges:
        raise UserError(f"{where}: stages.{index}.self_share counts where the stage merges windows itself; write stages.{index}.merges = 1 or more, "
                        f"or leave it out.")
    own = next((key for key in ("guidance_scale", "method") if getattr(stage, key) is not None), None)
    if own and stage.teacher == "previous":
        raise UserError(f"{where}: stages.{index}.{own} is of the root's solves, and this stage is taught by the student before it, "
                        f"which has learnt its guidance; leave it out, or write teacher = 'root'.")
    if staged.objective.forward_share and stage.teacher == "previous":
        raise UserError(f"{where}: stages.{index} has objective.forward_share = {staged.objective.forward_share:g}, pairs that only the root can "
                        f"make, and its teacher is 'previous'; write stages.{index}.forward_share = 0, or teacher = 'root'.")
    if staged.objective.starts_share < 1 and staged.objective.starts != "noise" and stage.starts is None:
        raise UserError(f"{where}: objective.starts_share = {staged.objective.starts_share:g} is the share of trajectories from noise, and "
                        f"objective.starts is 'data'; write starts = 'noise', or leave the share out.")


def check_memory(recipe: Recipe, where: str) -> None:
    """Refuse ways to save memory that exclude each other."""
    train, teacher = recipe.train, recipe.teacher
    if train.offload and train.optimizer != "adamw":
        raise UserError(f"{where}: train.offload = true keeps the states of AdamW on the CPU; train.optimizer = '{train.optimizer}' cannot be "
                        f"offloaded. Write optimizer = 'adamw', or 'paged_adamw8bit' with offload = false.")
    if train.offload and not train.zero_stage:
        raise UserError(f"{where}: train.offload = true is DeepSpeed's ZeRO offload and train.zero_stage is 0; write zero_stage = 1, 2 or 3.")
    if teacher.offload and (teacher.cuda_graph or teacher.precision == "fp8"):
        other = "cuda_graph = true" if teacher.cuda_graph else "precision = 'fp8'"
        raise UserError(f"{where}: teacher.offload = true moves the teacher's weights, which teacher.{other} keeps in place; choose one of the two.")
    if recipe.model.lora_rank and (teacher.offload or teacher.precision == "fp8"):
        other = "offload = true" if teacher.offload else "precision = 'fp8'"
        raise UserError(f"{where}: with model.lora_rank the teacher is the student's own network without its adapter, so teacher.{other} would take "
                        f"the student along; write offload = false and precision = 'bf16'.")


def sentence(item: Mapping[str, Any], where: str) -> str:
    """One pydantic error as a sentence for the person who wrote the recipe."""
    key = short(".".join(str(part) for part in item["loc"]))
    if item["type"] == "extra_forbidden":
        known = list(fields_at(item["loc"][:-1]))
        return f"{where}: unknown key '{key}'{nearest(str(item['loc'][-1]), known)}; the keys there are: {', '.join(known)}"
    if item["type"] == "missing":
        return f"{where}: the key '{key}' is missing"
    return f"{where}: '{key}' = {quote(item['input'])} cannot be used: {item['msg'][0].lower() + item['msg'][1:]}"


def fields_at(location: tuple[Any, ...]) -> list[str]:
    """Names of the keys that a recipe may have at a place such as ('stages', 0)."""
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        field = next(f for name, f in model.model_fields.items() if part in (name, f.alias))
        model = {"stages": Stage, "sources": Place}.get(part, field.annotation)
    return [f.alias or name for name, f in model.model_fields.items()]


def nearest(name: str, known: list[str]) -> str:
    """' (did you mean ...?)' for a misspelt name, else nothing."""
    match = difflib.get_close_matches(short(name), known, n=1)
    return f" (did you mean '{match[0]}'?)" if match else ""


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Put `stages.0.samples=20000` into the raw tables; the value is TOML, and a bare word is a string."""
    key, eq, value = override.partition("=")
    if not eq:
        raise UserError(f"--set {short(override)}: write it as section.key=value, for example --set train.seed=1.")
    try:
        found = tables.parse(f"v = {value}", f"--set {short(override)}")
    except UserError as error:
        if not isinstance(error.__cause__, tomllib.TOMLDecodeError):
            raise
        found = {}
    parsed = found["v"] if found.keys() == {"v"} else value  # a second line is a part of the text, not another key
    node: Any = raw
    *parents, last = key.split(".")
    try:
        for part in parents:
            node = node[place(part)] if isinstance(node, list) else node.setdefault(part, {})
        if isinstance(node, list):
            node[place(last)] = parsed
        else:
            node[last] = parsed
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"--set {short(override)}: there is no place '{short(key)}' in the recipe; stages are numbered from 0.") from error


def place(text: str) -> int:
    """A position in a list. Raises ValueError for everything else, positions from the end included."""
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as TOML that `load` reads back to the same values."""
    lines: list[str] = []
    resolved = recipe.resolved()
    stages = resolved.pop("stages")
    lines += [f"{k} = {toml_value(v)}" for k, v in resolved.items() if not isinstance(v, dict)]
    for name, table in resolved.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]"] + [f"{k} = {toml_value(v)}" for k, v in table.items()]
    for stage in stages:
        lines += ["", "[[stages]]"] + [f"{k} = {toml_value(v)}" for k, v in stage.items()]
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's, but for DEL
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    return str(value)


def changed_keys(old: Recipe, new: Recipe) -> list[str]:
    """Algorithm keys that differ between two recipes, as 'section.key: old -> new'."""
    return [f"{k}: {a!r} -> {b!r}" for k, (a, b) in differing(old, new).items() if not is_free(k, a, b)]


def free_changes(old: Recipe, new: Recipe) -> dict[str, str]:
    """The keys that differ between two recipes and may, with 'old -> new'."""
    return {k: f"{toml_value(a)} -> {toml_value(b)}" for k, (a, b) in differing(old, new).items() if is_free(k, a, b)}


def is_free(key: str, old: Any, new: Any) -> bool:
    return key in FREE_KEYS or (key == "train.optimizer" and {old, new} <= SAME_STEP)


def differing(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """(old, new) of every key outside the free sections whose values differ."""
    a, b = flatten(old.resolved()), flatten(new.resolved())
    return {k: (a.get(k), b.get(k)) for k in sorted(set(a) | set(b)) if k.split(".")[0] not in FREE_SECTIONS and a.get(k) != b.get(k)}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for name, sub in tree.items() for k, v in flatten(sub, f"{prefix}{name}.").items()}
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        return {k: v for i, sub in enumerate(tree) for k, v in flatten(sub, f"{prefix}{i}.").items()}
    return {prefix[:-1]: tree}
