"""From NAME=PATH on the command line to the networks themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from reflow.errors import UserError, quote, short
from reflow.evaluation.features.clip import Clip, ClipScore, pair_of
from reflow.evaluation.features.detector import Detector
from reflow.evaluation.features.dinov2 import DinoFeature
from reflow.evaluation.features.feature import Feature
from reflow.evaluation.features.image_reward import ImageReward
from reflow.evaluation.features.inception import InceptionFeature
from reflow.evaluation.features.lpips import Lpips
from reflow.evaluation.features.needed import NEEDS
from reflow.evaluation.features.preference import HpsScore, PickScore
from reflow.quiet import quiet_imports


def _clip(path: Path, device: torch.device) -> list[Feature]:
    pair, digest = pair_of("clip", path, device)
    return [Clip(pair, digest), ClipScore(pair, digest)]


def _one(kind: Callable[[Path, torch.device], Any]) -> Callable[[Path, torch.device], list[Feature]]:
    return lambda path, device: [kind(path, device)]


OPENERS: dict[str, Callable[[Path, torch.device], list[Feature]]] = {
    "inception": _one(InceptionFeature),
    "dinov2": _one(DinoFeature),
    "clip": _clip,
    "lpips": _one(Lpips),
    "pickscore": _one(PickScore),
    "hpsv2": _one(HpsScore),
    "image_reward": _one(ImageReward),
    "detector": _one(Detector),
}


def open_features(specs: Sequence[str], device: str | torch.device = "cpu") -> dict[str, Feature]:
    """The features that specs "NAME=FOLDER_OR_FILE" name, on the device; `clip` gives two, clip and clip_score.

    Nothing is fetched. Raises UserError for a name that is not known, one given twice, and weights that are missing, damaged or another
    network's; each before the weights of any other are read, where its name alone tells.
    """
    named: dict[str, Path] = {}
    for spec in specs:
        name, sign, place = spec.partition("=")
        if name not in OPENERS:
            found = get_close_matches(short(name), OPENERS, n=1)
            near = f" (did you mean {found[0]!r}?)" if found else ""
            raise UserError(f"--features {quote(spec)}: there is no feature {quote(name)}{near}; there are {', '.join(OPENERS)}.")
        if not sign or not place:
            raise UserError(f"--features {quote(spec)}: write NAME=PATH. {name} needs {NEEDS[name]}.")
        if name in named:
            raise UserError(f"--features names {name} twice, {quote(str(named[name]))} and {quote(place)}; give it once.")
        named[name] = Path(place).expanduser()
    quiet_imports()
    device = torch.device(device)
    return {feature.name: feature for name, path in named.items() for feature in OPENERS[name](path, device)}
