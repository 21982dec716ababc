"""The evaluation of a digits run: all methods from the same noises, against the root teacher and the real scans.

Time runs from t=1 (noise) to t=0 (data). The teacher's samples are drawn once and serve every run of the same base.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from reflow.data import digits
from reflow.data.digits import prompts
from reflow.errors import UserError
from reflow.evaluation import classifier as judge
from reflow.evaluation import machine
from reflow.evaluation.intervals import t_interval
from reflow.evaluation.measures.frechet import frechet_distance
from reflow.evaluation.methods import (
    Method,
    fine_windows,
    noises,
    student_method,
    student_steps,
    teacher_method,
    trajectory,
)
from reflow.evaluation.metrics import diversity, paired_error, straightness, window_straightness
from reflow.evaluation.runs import Run
from reflow.models.conditioning import Conditioning
from reflow.models.family import Base
from reflow.quiet import quiet_libraries

FLOOR_SPLITS = 20
PATH_STEPS = 32
TIMING_BATCH, TIMING_ROUNDS = 64, 5
FEWEST = 60
UNEQUAL = 3000  # samples of `frechet_unequal`: against all scans, to compare with measurements of that size


@dataclass(frozen=True)
class Settings:
    """How much is measured. samples: images for each method and sampling seed; unequal: allow more of them than scans;
    paths: trajectories for straightness; guidance: of the teacher and of students that have learnt none (None: none, or
    what the students have learnt)."""

    samples: int = 1797
    seeds: int = 3
    teacher_steps: int = 32
    paths: int = 256
    unequal: bool = False
    batch: int = 128
    guidance: float | None = None


@dataclass(frozen=True)
class Drawn:
    """Samples of one method and one sampling seed, on the CPU: latents, images in [-1,1], the classifier's features and
    the digits that it reads."""

    latents: torch.Tensor
    images: torch.Tensor
    features: torch.Tensor
    read: torch.Tensor


class Suite:
    """Evaluates runs of one base. Raises UserError for fewer samples than can be measured, and for more than there are
    scans unless the settings allow unequal sets."""

    def __init__(
        self, base: Base, settings: Settings, *, guidance_scale: float = 1.0, student_guidance: float = 1.0,
        workers: int | None = None,
    ) -> None:
        """guidance_scale: of the teacher; student_guidance: of the students, 1 where they have learnt the teacher's."""
        self.base, self.settings, self.guidance_scale = base, settings, guidance_scale
        self.student_guidance = student_guidance
        self.device = next(base.unet.parameters()).device
        scans, labels = digits.images()
        if settings.samples > len(scans) and not settings.unequal:
            raise UserError(
                f"--samples {settings.samples} is more than the {len(scans)} real scans, and the Fréchet distance of "
                f"sets of different size is biased; write at most {len(scans)}, or add --unequal-sets to compare with "
                "all scans nevertheless."
            )
        if settings.samples < FEWEST:
            raise UserError(f"--samples {settings.samples} is too few to measure by; write at least {FEWEST}.")
        self.judge = judge.load_classifier(self.device)
        order = torch.randperm(len(scans), generator=torch.Generator().manual_seed(0))
        # The digits asked for are those of the scans compared with, so both sets hold the classes in equal parts.
        self.labels = labels[order[torch.arange(settings.samples) % len(scans)]]
        self.scan_labels = labels[order[: settings.samples]]
        self.all_features = self.features(scans)
        self.scan_features = self.all_features[order[: settings.samples]]
        self.text = base.encode_prompts(prompts(torch.arange(10)))
        # Small networks gain nothing from threads inside an operation; whole batches side by side do.
        self.workers = workers or (machine.cores() if self.device.type == "cpu" else 1)
        self.teacher_draws: dict[int, list[Drawn]] = {}
        self.pictures: dict[tuple[str, int], torch.Tensor] = {}

    def features(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([self.judge.features(part.to(self.device)).cpu() for part in images.split(256)])

    def conditioning(self, labels: torch.Tensor) -> Conditioning:
        return self.text.select(labels.to(self.device))

    def parallel(self, job: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """job of each item, in order, on the worker threads with one thread inside each operation."""
        before = torch.get_num_threads()
        if self.workers == 1:
            return [job(item) for item in items]
        try:
            torch.set_num_threads(1)
            with ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                return list(pool.map(job, items))
        finally:
            torch.set_num_threads(before)

    def draw(self, method: Method, bar: tqdm) -> list[Drawn]:
        """Samples of every sampling seed."""
        rows = list(torch.arange(self.settings.samples).split(self.settings.batch))
        jobs = [(seed, part) for seed in range(self.settings.seeds) for part in rows]
        bar.set_postfix_str(f"{method.label}, {method.steps} steps", refresh=False)

        @torch.no_grad()
        def job(item: tuple[int, torch.Tensor]) -> Drawn:
            seed, part = item
            noise = noises(seed, part.tolist(), self.base.latent_shape()).to(self.device)
            latents = method.draw(noise, self.conditioning(self.labels[part]))
            images = self.base.decode(latents)
            features = self.judge.features(images)
            read = self.judge.head(features).argmax(1)
            if not torch.isfinite(latents).all():
                who = f"{method.label} at {method.steps} steps"
                raise UserError(
                    f"Samples of the {who} are not finite; its weights are damaged, train that stage again."
                )
            bar.update(method.steps * len(part))
            return Drawn(latents.cpu(), images.cpu(), features.cpu(), read.cpu())

        parts, count = self.parallel(job, jobs), len(rows)
        return [joined(parts[i : i + count]) for i in range(0, len(parts), count)]

    def row(self, method: Method, draws: list[Drawn], milliseconds: float) -> dict[str, Any]:
        """The measures of one method; no paired error for the reference itself."""
        real = diversity(self.scan_features, self.scan_labels)
        row = {
            **named(method),
            "frechet": over_seeds(self.frechet(draws)),
            "diversity": over_seeds(diversity(d.features, self.labels) / real for d in draws),
            "prompt_accuracy": over_seeds(float((d.read == self.labels).double().mean()) for d in draws),
            "milliseconds_per_image": milliseconds,
        }
        if len(draws) * self.settings.samples >= UNEQUAL:
            pooled = torch.cat([d.features for d in draws])[:UNEQUAL]
            row["frechet_unequal"] = t_interval([frechet_distance(pooled, self.all_features)]).as_dict()
        reference = self.teacher_draws[self.settings.teacher_steps]
        for space in ("images", "latents") if draws is not reference else ():
            row[f"paired_{space}"] = t_interval(errors(draws, reference, space)).as_dict()
        return row

    def evaluate(self, run: Run) -> dict[str, Any]:
        """All measures of one run, ready for JSON."""
        quiet_libraries()
        start, settings = time.perf_counter(), self.settings
        learnt = self.guidance_scale if self.student_guidance == 1 else 1.0
        if any(run.recipe.guidance_of(student.stage) != learnt for student in run.students):
            raise ValueError("The suite's teacher and the run's have different guidance scales")
        unets = [student.network(self.base, self.device) for student in run.students]
        pairs = [(run.students[i], unets[i], steps) for i, steps in student_steps(run.students)]
        students = [student_method(self.base, *pair, guidance_scale=self.student_guidance) for pair in pairs]
        counts = sorted({settings.teacher_steps, *(method.steps for method in students)}, reverse=True)
        teachers = [teacher_method(self.base, steps, self.guidance_scale) for steps in counts]
        todo = [m for m in (*teachers, *students) if m.student or m.steps not in self.teacher_draws]
        total = sum(m.steps for m in todo) * settings.samples * settings.seeds
        # In a log file a line now and then, as in training.
        interval = 0.5 if sys.stderr.isatty() else 20.0
        with tqdm(total=total, desc="evaluating", unit=" evaluations", dynamic_ncols=True, mininterval=interval) as bar:
            for method in teachers:
                if method.steps not in self.teacher_draws:
                    self.teacher_draws[method.steps] = self.draw(method, bar)
            drawn = [self.draw(method, bar) for method in students]
        sampled = time.perf_counter()
        milliseconds = self.time_methods([*teachers, *students])
        timed = time.perf_counter()
        everything = [*((m, self.teacher_draws[m.steps]) for m in teachers), *zip(students, drawn, strict=True)]
        rows = [self.row(m, d, ms) for (m, d), ms in zip(everything, milliseconds, strict=True)]
        differences = [self.difference(m, d) for m, d in zip(students, drawn, strict=True)]
        straight = self.straightness(run, unets)
        self.pictures = {(m.label, m.steps): d[0].images for m, d in everything}
        seconds = {"sampling": sampled - start, "timing": timed - sampled, "measures": time.perf_counter() - timed}
        return {
            "recipe": run.recipe.name,
            "teacher_sampler": "Euler" if self.base.prediction_type == "velocity" else "DDIM",
            "training_seed": run.recipe.train.seed,
            "settings": asdict(settings),
            "weights": {f"stage-{s.stage + 1}": s.digest() for s in run.students},
            "sampling_seeds": list(range(settings.seeds)),
            "real_scans": len(self.scan_features),
            "classifier": {"held_out_accuracy": self.held_out_accuracy(), "features": judge.FEATURES},
            "floor": self.floor(),
            "methods": rows,
            "differences": differences,
            "straightness": straight,
            "timing": {"batch": TIMING_BATCH, "device": self.device.type, "threads": 1},
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
        }

    def difference(self, method: Method, draws: list[Drawn]) -> dict[str, Any]:
        """A student less the teacher's own sampler with as many steps: paired errors sample by sample, Fréchet distances
        sampling seed by sampling seed; and its Fréchet distance less that of the reference (`frechet_to_reference`)."""
        reference, own = self.teacher_draws[self.settings.teacher_steps], self.teacher_draws[method.steps]
        result = named(method)
        for space in ("images", "latents"):
            interval = t_interval(errors(draws, reference, space) - errors(own, reference, space))
            result[space] = {**interval.as_dict(), "excludes_zero": interval.excludes_zero}
        for name, rival in (("frechet", own), ("frechet_to_reference", reference)):
            interval = t_interval([a - b for a, b in zip(self.frechet(draws), self.frechet(rival), strict=True)])
            result[name] = {**interval.as_dict(), "excludes_zero": interval.excludes_zero}
        return result

    def frechet(self, draws: list[Drawn]) -> list[float]:
        """Distance to the real scans of each sampling seed."""
        return [frechet_distance(d.features, self.scan_features) for d in draws]

    @torch.no_grad()
    def straightness(self, run: Run, unets: list[torch.nn.Module]) -> list[dict[str, Any]]:
        """Straightness of paths of at least 32 steps and chord deviation inside each window, of student and teacher."""
        count = min(self.settings.paths, self.settings.samples)
        noise, results, taught = noises(0, range(count), self.base.latent_shape()), [], {}
        for student, unet in zip(run.students, unets, strict=True):
            fine = fine_windows(student.windows, PATH_STEPS)
            for who, network in ((None, self.base.unet), (student, unet)):
                if who is None and fine in taught:
                    path = taught[fine]
                else:
                    scale = self.guidance_scale if who is None else self.student_guidance
                    follow = partial(trajectory, self.base, network, who, fine, guidance_scale=scale)
                    parts = torch.arange(count).split(64)
                    jobs = [(noise[rows], self.conditioning(self.labels[rows])) for rows in parts]
                    path = torch.cat(self.parallel(lambda job, follow=follow: follow(*job).cpu(), jobs), 1)
                    taught.setdefault(fine, path)
                inside = window_straightness(path, fine.boundaries, student.windows)
                results.append(
                    {
                        "method": "teacher" if who is None else student.label,
                        "windows": len(student.windows),
                        "steps": len(fine),
                        "path": t_interval(straightness(path, fine.boundaries)).as_dict(),
                        "window_deviation": [t_interval(window).as_dict() for window in inside],
                        "window_deviation_mean": t_interval(inside.mean(0)).as_dict(),
                    }
                )
        return results

    def floor(self) -> dict[str, Any]:
        """Fréchet distance between disjoint random parts of the real scans: what finite sets alone cost.

        Both parts hold the digits in equal numbers, as the sets compared in the table do. Between two samples of one
        distribution it goes as 1/size + 1/size', so `expected_at_samples` is the mean scaled by that law to the sizes
        compared in the table. `sd` is the spread over random splits.
        """
        features, labels = self.all_features, digits.images()[1]
        generator = torch.Generator().manual_seed(0)

        def between(share: float) -> tuple[int, list[float]]:
            values = []
            for _ in range(FLOOR_SPLITS):
                pair = disjoint_parts(labels, share, generator)
                values.append(frechet_distance(*(features[part] for part in pair)))
            return len(pair[0]), values

        compared = 1 / self.settings.samples + 1 / len(self.scan_features)
        share = min(0.5, self.settings.samples / len(features))
        (size, values), (smaller_size, smaller) = between(share), between(share / 2)
        return {
            "set_size": size,
            "mean": statistics.mean(values),
            "sd": statistics.stdev(values),
            "splits": FLOOR_SPLITS,
            "smaller_set_size": smaller_size,
            "smaller_mean": statistics.mean(smaller),
            "expected_at_samples": statistics.mean(values) * size * compared / 2,
        }

    def held_out_accuracy(self) -> float:
        """Of the committed classifier, on the scans that it was not trained on."""
        scans, labels = digits.images()
        held_out = digits.split()[1]
        return judge.accuracy(self.judge, scans[held_out].to(self.device), labels[held_out])

    def time_methods(self, methods: list[Method]) -> list[float]:
        """Milliseconds an image, batch 64, with decoding, without text encoding: median over rounds of all methods."""
        before = torch.get_num_threads()
        noise = noises(0, range(TIMING_BATCH), self.base.latent_shape()).to(self.device)
        conditioning = self.conditioning(torch.arange(TIMING_BATCH) % 10)
        taken: list[list[float]] = [[] for _ in methods]
        try:
            if self.device.type == "cpu":
                torch.set_num_threads(1)
            for turn in range(TIMING_ROUNDS + 1):
                for method, times in zip(methods, taken, strict=True):
                    start = time.perf_counter()
                    self.base.decode(method.draw(noise, conditioning))
                    if self.device.type == "cuda":
                        torch.cuda.synchronize()
                    if turn:  # the first round warms up
                        times.append(time.perf_counter() - start)
        finally:
            torch.set_num_threads(before)
        return [1000 * statistics.median(times) / TIMING_BATCH for times in taken]


def disjoint_parts(labels: torch.Tensor, share: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two disjoint random sets of rows, each with `share` of every class, rounded down; share is at most 1/2."""
    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        count = int(share * len(rows))
        parts[0].append(rows[:count])
        parts[1].append(rows[count : 2 * count])
    return torch.cat(parts[0]), torch.cat(parts[1])


def named(method: Method) -> dict[str, Any]:
    student = method.student
    return {
        "method": method.label,
        "stage": None if student is None else student.stage + 1,
        "windows": None if student is None else len(student.windows),
        "steps": method.steps,
    }


def joined(parts: list[Drawn]) -> Drawn:
    return Drawn(*(torch.cat([getattr(p, name) for p in parts]) for name in ("latents", "images", "features", "read")))


def errors(draws: list[Drawn], reference: list[Drawn], space: str) -> torch.Tensor:
    """Paired errors of all sampling seeds [seeds * samples]."""
    pairs = zip(draws, reference, strict=True)
    return torch.cat([paired_error(getattr(d, space), getattr(r, space)) for d, r in pairs])


def over_seeds(values: Iterable[float]) -> dict[str, Any]:
    values = list(values)
    return {**t_interval(values).as_dict(), "values": values}
