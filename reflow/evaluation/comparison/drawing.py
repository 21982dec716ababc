"""All samples of a comparison: every missing batch of every cell, on one device or on several side by side."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from reflow.evaluation.comparison.samples import Cell, Samples
from reflow.evaluation.contenders.contender import Contender
from reflow.quiet import quiet_libraries


class Spec(Protocol):
    """What a contender is opened from; it travels to other processes."""

    @property
    def label(self) -> str: ...

    def files(self) -> list[Path]:
        """Files and folders that decide its images."""

    def open(self, device: str, dtype: str) -> Contender: ...


@dataclass(frozen=True)
class Drawing:
    """What is drawn: of every spec its cells, `count` samples each. root: the folder of samples; what: all else that decides a sample
    (the prompts, the seed), which their folders remember."""

    root: Path
    specs: tuple[tuple[Spec, tuple[Cell, ...]], ...]
    prompts: tuple[str, ...]
    per_prompt: int
    seed: int
    dtype: str
    batch: int
    what: Mapping[str, Any]

    @property
    def count(self) -> int:
        return len(self.prompts) * self.per_prompt

    def samples(self, cell: Cell, contender: Mapping[str, Any] | None = None) -> Samples:
        """A cell's samples; contender: its description, which they must be of, where they are written or read."""
        what = {**self.what, "model": cell.label, "steps": cell.steps, "guidance": cell.guidance}
        return Samples(self.root, cell, self.count, what if contender is None else {**what, "contender": contender})

    def prompts_of(self, numbers: range) -> list[str]:
        return [self.prompts[number // self.per_prompt] for number in numbers]


def draw(drawing: Drawing, devices: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Draw what is missing; returns each contender's `describe()` by label. Several devices take batches in turn, a process each."""
    plan = missing(drawing)
    todo = steps(plan)
    interval = 0.5 if sys.stderr.isatty() else 20.0
    with tqdm(total=todo, desc="drawing", unit=" steps", dynamic_ncols=True, mininterval=interval, disable=not todo) as bar:
        if len(devices) == 1:
            return work(drawing, plan, devices[0], 0, 1, bar)
        start = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(len(devices), mp_context=start) as pool:
            jobs = [pool.submit(work, drawing, plan, device, rank, len(devices), None) for rank, device in enumerate(devices)]
            with following(drawing, todo, jobs, bar):
                told = [job.result() for job in jobs]
        return told[0]


Plan = dict[Cell, list[range]]  # the batches of each cell that are still to be drawn


def missing(drawing: Drawing) -> Plan:
    return {cell: drawing.samples(cell).missing(drawing.batch) for _, own in drawing.specs for cell in own}


def steps(plan: Plan) -> int:
    return sum(len(batch) * cell.steps for cell, batches in plan.items() for batch in batches)


@contextmanager
def following(drawing: Drawing, todo: int, jobs: Sequence[Any], bar: Any) -> Iterator[None]:
    """The bar follows what other processes have written until all of them are done."""
    while wait(jobs, timeout=2.0).not_done:
        bar.update(todo - steps(missing(drawing)) - bar.n)
    yield
    bar.update(todo - bar.n)


def work(drawing: Drawing, plan: Plan, device: str, rank: int, ranks: int, bar: Any) -> dict[str, dict[str, Any]]:
    """The share of one process: every `ranks`-th batch of each cell in the plan, which was made before any process began."""
    quiet_libraries()
    told: dict[str, dict[str, Any]] = {}
    for spec, own in drawing.specs:
        contender = spec.open(device, drawing.dtype)
        try:
            told[contender.label] = contender.describe()
            for cell in own:
                contender.check(cell.steps, cell.guidance)
            for cell in own:
                samples = drawing.samples(cell, told[contender.label]).open()
                for numbers in plan[cell][rank::ranks]:
                    prompts, seeds = drawing.prompts_of(numbers), [drawing.seed + number for number in numbers]
                    if bar is not None:
                        bar.set_postfix_str(str(cell), refresh=False)
                    samples.put(numbers, contender.draw(prompts, seeds, cell.steps, cell.guidance), prompts, drawing.seed)
                    if bar is not None:
                        bar.update(len(numbers) * cell.steps)
        finally:
            contender.close()
    return told
