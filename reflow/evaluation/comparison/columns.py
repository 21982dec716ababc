"""The measures of a comparison, each with what it needs: a network, real images, a teacher, several images a prompt.

All of them are computed that what is given allows; of the others the result says what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from reflow.evaluation.comparison import asked
from reflow.evaluation.comparison.samples import Samples
from reflow.evaluation.comparison.stored import Stored
from reflow.evaluation.intervals import Interval, t_interval
from reflow.evaluation.measures.cmmd import cmmd, cmmd_interval
from reflow.evaluation.measures.diversity import diversity_of_prompts, means_of_groups, pairs_within
from reflow.evaluation.measures.fid_infinity import fid_infinity, fid_interval
from reflow.evaluation.measures.frechet import frechet_distance
from reflow.evaluation.measures.kid import kid, kid_interval
from reflow.evaluation.measures.precision_recall import manifolds
from reflow.evaluation.measures.resampling import bootstrap, bootstrap_mean
from reflow.evaluation.measures.vendi import vendi
from reflow.evaluation.metrics import paired_error

PATCH = 299  # pixels: a crop as large as Inception's input, at the image's own resolution


OPENED_BY = {"clip_score": "clip"}  # what of --features gives a network of another name
FEWEST = 8  # images of a seed, for a measure of that seed alone
Found = dict[str, Any]  # an interval's fields, and "over_seeds" where there are several


@dataclass
class Given:
    """What is there to measure one cell by."""

    samples: Samples
    reference: Samples | None  # the teacher's from the same noises; None for none, and for the reference itself
    stored: Stored
    features: dict[str, Any]
    real: Sequence[Path]
    real_digest: str
    replicates: int
    objects: Sequence[Sequence[tuple[str, int, int | None]]] = ()

    @property
    def groups(self) -> torch.Tensor:
        """The prompt of each sample."""
        return torch.arange(self.samples.count) // self.stored.per_prompt

    @cached_property
    def samples_side(self) -> int:
        """Pixels of the samples' shorter side."""
        return min(next(asked.pictures([self.samples.image(0)], 0, "lanczos")).shape[1:])

    @property
    def side(self) -> int:
        """Pixels of the real images: the protocol's, or the samples' own."""
        return self.stored.size or self.samples_side

    def own(self, name: str, patches: int | None = None) -> torch.Tensor:
        return self.stored.features(self.features[name], self.samples, patches)

    def others(self, name: str, of: str, patches: int | None = None) -> torch.Tensor:
        """Features of the real images or of the reference."""
        if of == "real":
            return self.stored.real(self.features[name], self.real, self.side, self.real_digest)
        return self.stored.features(self.features[name], self.reference, patches)  # type: ignore[arg-type]

    def of_prompts(self, values: torch.Tensor) -> Found:
        """Mean of a value of every image, with a bootstrap interval over prompts: images of one prompt are no independent draws."""
        table = values.double().view(-1, self.stored.per_prompt)
        return self.with_seeds(bootstrap_mean(table.mean(1)), table.mean(0).tolist())

    def of_set(self, measure: Callable[[torch.Tensor], float], whole: Callable[[int], Interval] | None = None) -> Found:
        """A measure of a set of rows, with a bootstrap interval over images; whole: the measure of all rows with an interval of its own."""
        rows, each = torch.arange(self.samples.count), self.stored.per_prompt
        slices = [float(measure(rows[seed::each])) for seed in range(each)] if each > 1 and len(rows) // each >= FEWEST else []
        if self.replicates < 2:
            return self.with_seeds(Interval(float(measure(rows)), None, None, len(rows)), slices)
        if whole is not None:
            return self.with_seeds(whole(self.replicates), slices)
        return self.with_seeds(bootstrap(measure, len(rows), replicates=self.replicates), slices)

    def with_seeds(self, interval: Interval, values: Sequence[float]) -> Found:
        """The interval over images or prompts, and beside it that over seeds, of the measure of each seed's images alone: what other noises
        of the same prompts would have changed. A set measure of fewer images has another bias, which is why its mean differs."""
        return {**interval.as_dict(), **({"over_seeds": {**t_interval(values).as_dict(), "values": list(values)}} if len(values) > 1 else {})}


@dataclass(frozen=True)
class Column:
    """One measure. better: "lower" or "higher"; network: the name of --features that it needs; real, teacher, several: whether it needs
    real images, a reference, more than one image a prompt; fewest: images; smallest: pixels of a side of the samples; asks: prompts
    that say what must be seen."""

    name: str
    title: str
    better: str
    digits: int
    compute: Callable[[Given], Found]
    network: str = ""
    real: bool = False
    teacher: bool = False
    several: bool = False
    fewest: int = 1
    smallest: int = 0
    asks: bool = False

    def missing(self, given: Given) -> str | None:
        """Why it is not measured; None where it can be."""
        if self.network and self.network not in given.features:
            return f"needs --features {OPENED_BY.get(self.network, self.network)}=PATH"
        if self.real and not given.real:
            return "needs a protocol with real images"
        if self.asks and not given.objects:
            return "needs prompts that say what must be seen (--protocol geneval)"
        if self.teacher and given.reference is None:
            return "needs --teacher"
        if self.several and given.stored.per_prompt < 2:
            return "needs two images a prompt or more (--per-prompt)"
        if given.samples.count < self.fewest:
            return f"needs {self.fewest} images or more"
        if given.samples_side < self.smallest:
            return f"needs images of {self.smallest} pixels or more"
        return None


Sets = Callable[[torch.Tensor, torch.Tensor], float]
Intervals = Callable[[torch.Tensor, torch.Tensor, int], Interval]


def of_sets(
    name: str, title: str, network: str, of: str, function: Sets, digits: int, better: str = "lower", fewest: int = 2,
    patches: int | None = None, interval: Intervals | None = None,
) -> Column:  # fmt: skip
    """A measure of the features of two sets: the samples, and the real images or the teacher's. patches: of crops of that side. interval:
    the measure with its interval, where it has a cheaper one than a bootstrap of the whole."""

    def compute(given: Given) -> Found:
        own, others = given.own(network, patches), given.others(network, of, patches)
        return given.of_set(lambda rows: function(own[rows], others), interval and (lambda count: interval(own, others, count)))

    needs = {"real": of == "real", "teacher": of == "teacher", "fewest": fewest, "smallest": patches or 0}
    return Column(name, title, better, digits, compute, network, **needs)


def infinity(given: Given) -> Found:
    own, real = given.own("inception"), given.others("inception", "real")
    return Interval(fid_infinity(own, real).value, None, None, given.samples.count).as_dict()


def score(network: str) -> Callable[[Given], Found]:
    return lambda given: given.of_prompts(given.stored.scores(given.features[network], given.samples))


def latents(given: Given) -> Found:
    pairs = zip(given.samples.latents(), given.reference.latents(), strict=True)  # type: ignore[union-attr]
    return given.of_prompts(torch.cat([paired_error(own, other) for own, other in pairs]))


def pixels(given: Given) -> Found:
    found = []
    for number in range(given.samples.count):
        pair = asked.pictures([given.samples.image(number), given.reference.image(number)], 0, "lanczos")  # type: ignore[union-attr]
        own, other = (picture[None].double() / 127.5 - 1 for picture in pair)
        found.append(paired_error(own, other))
    return given.of_prompts(torch.cat(found))


def spread_of_latents(given: Given) -> Found:
    rows = torch.cat([part.float() for part in given.samples.latents()]).flatten(1)
    return bootstrap_mean(diversity_of_prompts(rows, given.groups) / rows.shape[1] ** 0.5).as_dict()


def spread(network: str) -> Callable[[Given], Found]:
    return lambda given: bootstrap_mean(diversity_of_prompts(given.own(network), given.groups, cosine=True)).as_dict()


def objects(given: Given) -> Found:
    """Share of the images in which a detector finds what its prompt asks for."""
    wanted = given.objects
    classes = sorted({name for one in wanted for name, _, _ in one})
    counts = given.stored.counts(given.features["detector"], given.samples, classes)
    right = []
    for number, found in enumerate(counts):
        asked_for = wanted[number // given.stored.per_prompt]
        has = {name: int(found[i]) for i, name in enumerate(classes)}
        right.append(all(low <= has[name] and (high is None or has[name] < high) for name, low, high in asked_for))
    return given.of_prompts(torch.tensor(right, dtype=torch.float64))


def vendi_score(given: Given) -> Found:
    return Interval(vendi(given.own("dinov2")), None, None, given.samples.count).as_dict()


def lpips_to_teacher(given: Given) -> Found:
    numbers = torch.arange(given.samples.count)
    pairs = torch.stack([numbers, numbers], 1)
    return given.of_prompts(given.stored.distances(given.features["lpips"], given.samples, pairs, given.reference))  # type: ignore[arg-type]


def lpips_spread(given: Given) -> Found:
    pairs, of = pairs_within(given.groups)
    return bootstrap_mean(means_of_groups(given.stored.distances(given.features["lpips"], given.samples, pairs, given.samples), of)).as_dict()


def precision(own: torch.Tensor, real: torch.Tensor) -> float:
    return manifolds(own, real).precision


def recall(own: torch.Tensor, real: torch.Tensor) -> float:
    return manifolds(own, real).recall


def kid_in_thousandths(own: torch.Tensor, others: torch.Tensor) -> float:
    return 1000 * kid(own, others)


def fid_whole(own: torch.Tensor, others: torch.Tensor, replicates: int) -> Interval:
    return fid_interval(own, others, replicates=replicates)


def kid_whole(own: torch.Tensor, others: torch.Tensor, replicates: int) -> Interval:
    found = kid_interval(own, others)
    return Interval(1000 * found.mean, *(None if end is None else 1000 * end for end in (found.low, found.high)), found.count)


def cmmd_whole(own: torch.Tensor, others: torch.Tensor, replicates: int) -> Interval:
    return cmmd_interval(own, others)


COLUMNS = (
    Column("paired_latents", "paired error, latents", "lower", 4, latents, teacher=True),
    Column("paired_pixels", "paired error, pixels", "lower", 4, pixels, teacher=True),
    Column("diversity_latents", "diversity, latents", "higher", 3, spread_of_latents, several=True),
    of_sets("fid", "FID", "inception", "real", frechet_distance, 2, interval=fid_whole),
    Column("fid_infinity", "FID at N = infinity", "lower", 2, infinity, "inception", real=True, fewest=40),
    of_sets("kid", "KID x 1000", "inception", "real", kid_in_thousandths, 3, interval=kid_whole),
    of_sets("precision", "precision", "inception", "real", precision, 3, "higher", fewest=4),
    of_sets("recall", "recall", "inception", "real", recall, 3, "higher", fewest=4),
    of_sets("fid_to_teacher", "FID to the teacher", "inception", "teacher", frechet_distance, 2, interval=fid_whole),
    of_sets("patch_fid_to_teacher", "patch FID to the teacher", "inception", "teacher", frechet_distance, 2, patches=PATCH, interval=fid_whole),
    of_sets("fd_dinov2", "FD, DINOv2", "dinov2", "real", frechet_distance, 1, interval=fid_whole),
    of_sets("fd_dinov2_to_teacher", "FD to the teacher, DINOv2", "dinov2", "teacher", frechet_distance, 1, interval=fid_whole),
    Column("vendi", "Vendi, DINOv2", "higher", 2, vendi_score, "dinov2", fewest=2),
    Column("diversity_dinov2", "diversity, DINOv2", "higher", 3, spread("dinov2"), "dinov2", several=True),
    of_sets("cmmd", "CMMD", "clip", "real", cmmd, 3, interval=cmmd_whole),
    of_sets("cmmd_to_teacher", "CMMD to the teacher", "clip", "teacher", cmmd, 3, interval=cmmd_whole),
    Column("clip_score", "CLIP score", "higher", 2, score("clip_score"), "clip_score"),
    Column("lpips_to_teacher", "LPIPS to the teacher", "lower", 4, lpips_to_teacher, "lpips", teacher=True),
    Column("diversity_lpips", "diversity, LPIPS", "higher", 3, lpips_spread, "lpips", several=True),
    Column("pickscore", "PickScore", "higher", 2, score("pickscore"), "pickscore"),
    Column("hpsv2", "HPS v2.1", "higher", 4, score("hpsv2"), "hpsv2"),
    Column("objects", "objects as asked", "higher", 3, objects, "detector", asks=True),
    Column("image_reward", "ImageReward", "higher", 3, score("image_reward"), "image_reward"),
)


def measured(given: Given) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """({name: interval}, {name: why it is not measured}) of one cell."""
    found, missing = {}, {}
    for column in COLUMNS:
        why = column.missing(given)
        if why is None:
            found[column.name] = column.compute(given)
        else:
            missing[column.name] = why
    return found, missing

