"""The trial of an export: the base's own pipeline class, called as users call it, samples a stand-in network as the student is sampled.

What is tried is the class that model_index.json names, of the diffusers that is installed, with the scheduler that would be written: from text
and, where diffusers has the class, from an image at strengths .5 and 1. How a pipeline calls its scheduler, tells its network the time, guides,
and where image to image starts are all in it, so a version of diffusers that does any of these otherwise makes no wrong export in silence.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from reflow.errors import UserError
from reflow.export.stand_in import pipeline_of, stand_ins
from reflow.export.stock import flow_candidates, stock_scheduler
from reflow.models import FAMILIES, Base, Conditioning, family_of
from reflow.models.flows.base import packed
from reflow.models.folder import read_index
from reflow.quiet import quiet_imports
from reflow.sampling import FlowWindowScheduler, sample
from reflow.sampling.sampler import Scheduler
from reflow.weights.guard import reason_of

TOLERANCE = 1e-5  # of the result's size: rounding of some tens of steps in fp32
STRENGTHS = (0.5, 1.0)
SEED = 0
Found = float | str  # how far a pipeline's result is from ours, as a share of the result, or why it could not be tried


@dataclass(frozen=True)
class Choice:
    """The scheduler to export, whether it is one of diffusers, and why; found: what each pipeline's trial with it found, {} without one."""

    scheduler: Any
    stock: bool
    reason: str
    found: Mapping[str, Found] = field(default_factory=dict)


def base_of(path: Path) -> Base | str:
    """The base in a folder by its pipeline's class, nothing of it loaded, or why there is none, in words for a card: merge writes folders of
    any pipeline with a fitting UNet."""
    kind = read_index(path).get("_class_name")
    if not any(kind in one.pipelines for one in FAMILIES.values()):
        return f"no family here takes a {kind}"
    try:
        family, folder = family_of(path)
        return family.load(folder, parts=())
    except UserError:
        return f"the base is not as its family reads a {kind}"


def choose(base: Base | str, scheduler: Scheduler, steps: int | None = None, guidance: float = 1.0) -> Choice:
    """The first scheduler with which the base's pipeline samples a student exactly in ``steps`` steps (None: one a window): those of diffusers
    that may, then the student's own.

    ``base`` may be a text that says why there is none; then, as where the pipeline cannot be made or called, the schedulers are compared alone
    and the reason says so. guidance: the scale that the student is meant for. Raises UserError where the pipeline samples the student with no
    scheduler as it was trained.
    """
    steps = len(scheduler.windows) if steps is None else steps
    alone, why = stock_scheduler(scheduler, steps)
    if isinstance(base, str):
        return untried(scheduler, alone, why, base)
    stocks = flow_candidates(scheduler, steps) if isinstance(scheduler, FlowWindowScheduler) else [alone] * (alone is not None)
    trial = outcome(lambda: Trial(base, scheduler, steps, guidance))
    if isinstance(trial, str):
        return untried(scheduler, alone, why, trial)
    tried: list[tuple[Any, dict[str, Found]]] = []
    for candidate in (*stocks, scheduler):
        tried.append((candidate, trial.found(candidate)))
        if exact(tried[-1][1][trial.name]) and not any(wrong(one) for one in tried[-1][1].values()):
            break
    else:  # none serves image to image as well: the first that serves text, if there is one
        end = next((i + 1 for i, (_, found) in enumerate(tried) if exact(found[trial.name])), len(tried))
        tried = tried[:end]
    chosen, found = tried[-1]
    first = found[trial.name]
    if not exact(first):
        if all(isinstance(one[trial.name], str) for _, one in tried):
            return untried(scheduler, alone, why, str(first))
        raise UserError(
            f"{trial.name} of diffusers {version()} does not sample this student as it was trained: on a network of known answers its {steps} "
            f"steps with {type(chosen).__name__} {ends(first)}. Install the version of diffusers that constraints.txt names and export again, or "
            "sample the run with `reflow sample`."
        )
    return Choice(chosen, chosen is not scheduler, reason_for(trial, tried, why if not stocks else ""), found)


def untried(scheduler: Scheduler, alone: Any | None, why: str, error: str) -> Choice:
    """What the schedulers say without a pipeline."""
    return Choice(alone or scheduler, alone is not None, f"{why}; it was not tried through a pipeline ({error.rstrip('.')})")


def exact(found: Found) -> bool:
    return not isinstance(found, str) and found <= TOLERANCE


def wrong(found: Found) -> bool:
    return not isinstance(found, str) and found > TOLERANCE


def worst(found: Mapping[str, Found]) -> tuple[str, Found]:
    """The first pipeline of a trial that is not exact: the base's own comes before image to image."""
    return next((name, error) for name, error in found.items() if not exact(error))


def ends(found: Found) -> str:
    """A trial's outcome, after "4 steps"."""
    return f"fail ({found})" if isinstance(found, str) else f"end {found:.2g} of the result away from the student's own"


def version() -> str:
    import diffusers

    return str(diffusers.__version__)


def reason_for(trial: Trial, tried: list[tuple[Any, dict[str, Found]]], why: str) -> str:
    """Of the last that was tried; why: what the schedulers alone said against those of diffusers."""
    chosen, found = tried[-1]
    good = [f"{name} to {error:.0e} of the result" if error else f"{name} to the bit" for name, error in found.items() if exact(error)]
    said = f"{trial.steps} step{'s' * (trial.steps != 1)} with {type(chosen).__name__} are the student's, tried through {' and '.join(good)}"
    said += f" (diffusers {version()})"
    bad = [(type(one).__name__, *worst(of)) for one, of in tried[:-1]]
    if bad:  # of the one that comes nearest: right from text, or else the least wrong
        kind, name, error = min(bad, key=lambda one: (isinstance(one[2], str), one[1] == trial.name, one[2]))
        said = f"{trial.steps} steps of {name} with diffusers' own {kind} {ends(error)}; {said}"
    elif why:
        said = f"{why}; {said}"
    for name, error in found.items():
        if wrong(error):
            said += f"; image to image does not start where the student's does: {trial.steps} steps of {name} {ends(error)}"
        elif isinstance(error, str):
            said += f"; {name} was not tried ({error})"
    return said


class Trial:
    """One base's pipelines around stand-ins, a small image that is not square, random text; what our own sampling makes of the same."""

    def __init__(self, base: Base, scheduler: Scheduler, steps: int, guidance: float) -> None:
        quiet_imports()
        network, vae = stand_ins(base)
        self.base, self.scheduler, self.steps, self.guidance = replace(base, unet=network, vae=vae), scheduler, steps, guidance
        self.name = str(base.configs["pipeline"]["_class_name"])
        side = math.lcm(base.cell, 32)  # Stable Diffusion's pipelines ask for multiples of 8, Sana's of 32
        self.size = (2 * side, 3 * side)
        generator = torch.Generator().manual_seed(SEED)
        self.pixels = torch.rand(1, base.configs["vae"].get("in_channels") or 3, *self.size, generator=generator)
        self.call = base.pipeline_call(guidance)
        self.rows, self.null = (self._rows(low, generator) for low in (0.0, -1.0))
        self.ours = cache(self._ours)

    def _rows(self, low: float, generator: torch.Generator) -> Conditioning:
        """Conditioning of uniform numbers from low to low + 1, nothing masked, with the size and the guidance that the pipeline will tell."""
        empty = self.base.example(torch.float32)
        rows = {name: torch.rand(rows.shape, generator=generator) + low for name, rows in empty.rows.items()}
        rows |= {name: torch.ones_like(row) for name, row in rows.items() if name.endswith("mask")}
        if "time_ids" in rows:
            rows["time_ids"] = torch.tensor([[*self.size, 0.0, 0.0, *self.size]])
        if "guidance" in rows:
            rows["guidance"] = torch.full_like(rows["guidance"], self.call.get("guidance_scale", self.guidance))
        return empty.of(list(rows.values()))

    def found(self, candidate: Any) -> dict[str, Found]:
        """What the trial of a scheduler found, by pipeline: of the base's own, and of image to image where diffusers has the class."""
        import diffusers

        image = self.name.replace("Pipeline", "Img2ImgPipeline")
        found = {self.name: outcome(lambda: self.distance(self.name, candidate, None))}
        if hasattr(diffusers, image):
            least = 0.0 if isinstance(self.scheduler, FlowWindowScheduler) else 1 / self.steps  # SD and SDXL refuse to run no step
            found[image] = outcome(lambda: max(self.distance(image, candidate, one) for one in STRENGTHS if one >= least))
        return found

    def distance(self, name: str, candidate: Any, strength: float | None) -> float:
        """Of the pipeline's latents from ours, as a share of ours; strength None: from text alone."""
        ours, theirs = self.ours(strength), self.theirs(name, candidate, strength)
        ours = packed(ours) if theirs.ndim == 3 else ours
        error = ((theirs - ours).norm() / ours.norm()).item()
        return math.inf if math.isnan(error) else error

    def _ours(self, strength: float | None) -> torch.Tensor:
        start = {} if strength is None else {"strength": strength, "init": self.base.encode_images(2 * self.pixels - 1)}
        return sample(
            self.base, self.base.unet, self.rows, self.steps, [SEED], scheduler=copied(self.scheduler), guidance_scale=self.guidance,
            null=self.null, resolution=self.size, decode=False, **start,
        ).latents  # fmt: skip

    def theirs(self, name: str, candidate: Any, strength: float | None) -> torch.Tensor:
        """What a pipeline of this class makes of the same with a candidate, called as a user calls it."""
        import diffusers

        kind = getattr(diffusers, name)
        call = {key: value for key, value in self.call.items() if key != "negative_prompt"} | self.base.pipeline_prompt(self.rows)
        if self.guidance > 1:
            call |= {"negative_prompt": None}  # '' by default of Sana's, which takes only one of both
            call |= {f"negative_{key}": value for key, value in self.base.pipeline_prompt(self.null).items()}
        call |= {} if strength is None else {"image": self.pixels, "strength": strength}
        # Sana's pipeline would take the nearest size of a table, none of which is small.
        call |= {name: False for name in inspect.signature(kind.__call__).parameters if name == "use_resolution_binning"}
        pipe = pipeline_of(kind, self.base, copied(candidate))
        height, width = self.size
        made = pipe(
            num_inference_steps=self.steps, height=height, width=width, generator=[torch.Generator().manual_seed(SEED)], output_type="latent", **call
        )
        return made.images


def copied(scheduler: Any) -> Any:
    """Pipelines and sampling change a scheduler's state."""
    return type(scheduler).from_config(scheduler.config)


def outcome(measure: Callable[[], Any]) -> Any:
    """What it gives, or why a pipeline of this version of diffusers, or of a family of someone's own, cannot be made or called with stand-ins."""
    try:
        return measure()
    except Exception as error:  # noqa: BLE001 - other versions and families read and ask what these do not
        return f"{type(error).__name__}: {reason_of(error)}"
