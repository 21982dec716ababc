"""What the code decides beside the recipe, by version: a run goes on only under the rules that it was started with."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from dataclasses import dataclass

from reflow.errors import UserError
from reflow.outputs import write_text
from reflow.recipes.settings import Recipe

FILE = "rules.json"


@dataclass(frozen=True)
class Rule:
    """One rule whose change changes results. touches: whether a recipe's result depends on it; change: what its version 2 does otherwise."""

    name: str
    version: int
    change: str
    touches: Callable[[Recipe], bool]


RULES = (
    Rule("ema", 2, "train.ema_warmup is now a share of the samples done", lambda r: r.train.ema_half_life > 0 and r.train.ema_warmup > 0),
    Rule("noise", 2, "objective.starts = 'noise' now makes a pair of every window of a trajectory, so samples come in another order",
         lambda r: any(r.of_stage(i).objective.starts == "noise" and len(stage.edges) > 2 for i, stage in enumerate(r.stages))),
)


def changed(run_dir: pathlib.Path, recipe: Recipe) -> list[str]:
    """What differs, for this recipe, between the rules that a run was started with and those of this code. Runs before the file had version 1."""
    try:
        told = json.loads((run_dir / FILE).read_text())
        if not isinstance(told, dict):
            raise ValueError("it holds no table of versions")
    except FileNotFoundError:
        told = {}
    except (OSError, ValueError) as error:
        raise UserError(f"{run_dir / FILE} cannot be read ({error}); it says which versions of the trainer's rules the run follows. Remove it to "
                        f"go on as with a run of an older version, which --allow-config-change then lets through.") from error
    return [f"{rule.change} (rule '{rule.name}': version {told.get(rule.name, 1)} -> {rule.version})" for rule in RULES
            if rule.touches(recipe) and told.get(rule.name, 1) != rule.version]


def write(run_dir: pathlib.Path) -> None:
    """Keep the versions of this code's rules in a run directory."""
    write_text(run_dir / FILE, json.dumps({rule.name: rule.version for rule in RULES}))
