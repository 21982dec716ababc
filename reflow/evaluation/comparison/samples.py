"""Samples on disk: a folder for each cell of a comparison, PNG files by number, a file a batch with the latents and what they cost.

A batch is done when its latents file is there, which is written last, so that a comparison that was stopped goes on with the batches
that are missing. Sample number i has prompt i // per_prompt and the noise of the protocol's seed + i, in whatever batch it is drawn.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open

from reflow.errors import UserError
from reflow.evaluation.contenders.contender import Drawn
from reflow.outputs import written
from reflow.sampling.pictures import write_png
from reflow.weights.files import save_tensors

BATCH = re.compile(r"latents-(\d+)-(\d+)\.safetensors")


@dataclass(frozen=True)
class Cell:
    """One contender at a number of steps and a guidance scale."""

    label: str
    steps: int
    guidance: float

    @property
    def place(self) -> Path:
        """Below the folder of samples; names that would fall together are kept apart by a digest."""
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", self.label).strip("-.")[:60]
        name = plain if plain == self.label else f"{plain}-{hashlib.sha256(self.label.encode()).hexdigest()[:6]}"
        return Path(name) / f"steps-{self.steps}-guidance-{self.guidance:g}"

    def __str__(self) -> str:
        return f"{self.label}, {self.steps} step{'s' * (self.steps != 1)}, guidance {self.guidance:g}"


class Samples:
    """The samples of one cell: `count` of them, below `root`. `what` is all that decides them; samples of something else are refused."""

    def __init__(self, root: Path, cell: Cell, count: int, what: Mapping[str, Any]) -> None:
        self.folder, self.cell, self.count = root / cell.place, cell, count
        self.what = json.loads(json.dumps(what))

    def open(self) -> Samples:
        """Make the folder, or find it as it was left. Raises UserError where it holds samples of something else."""
        told = self.folder / "samples.json"
        if told.is_file():
            found = json.loads(told.read_text(encoding="utf-8"))
            changed = sorted(key for key in {*found, *self.what} if found.get(key) != self.what.get(key))
            if changed:
                raise UserError(
                    f"{self.folder} holds samples that were drawn otherwise ({', '.join(changed)} differ{'s' * (len(changed) == 1)}); write "
                    "another --out, or remove that folder."
                )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            with written(told, shared=True) as temporary:
                temporary.write_text(json.dumps(self.what, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return self

    def image(self, number: int) -> Path:
        return self.folder / f"{number:06d}.png"

    @property
    def batches(self) -> list[tuple[int, int, Path]]:
        """(first, end, file) of every batch that is done, in order."""
        found = ((BATCH.fullmatch(path.name), path) for path in self.folder.glob("latents-*.safetensors"))
        return sorted((int(match[1]), int(match[2]), path) for match, path in found if match)

    def missing(self, size: int) -> list[range]:
        """Batches of at most `size` that are still to be drawn."""
        done = {number for first, end, _ in self.batches for number in range(first, end)}
        left, found = [number for number in range(self.count) if number not in done], []
        while left:
            first = left[0]
            run = next((i for i, number in enumerate(left[:size]) if number != first + i), min(size, len(left)))
            found.append(range(first, first + run))
            left = left[run:]
        return found

    def put(self, numbers: range, drawn: Drawn, prompts: Sequence[str], seed: int) -> None:
        """Write a batch: first its images, then the file that says that it is there."""
        for number, prompt, image in zip(numbers, prompts, drawn.images, strict=True):
            self.image(number).unlink(missing_ok=True)  # of a batch that was cut off
            note = {"prompt": prompt, "seed": seed + number, "model": self.cell.label, "steps": self.cell.steps, "guidance": self.cell.guidance}
            write_png(Image.fromarray(image.permute(1, 2, 0).numpy()), self.image(number), note)
        cost = {"evaluations": str(drawn.evaluations), "seconds": json.dumps(asdict(drawn.seconds))}
        name = f"latents-{numbers[0]:06d}-{numbers[-1] + 1:06d}.safetensors"
        with written(self.folder / name) as temporary:
            save_tensors({"latents": drawn.latents.contiguous()}, temporary, cost)

    @cached_property
    def costs(self) -> list[dict[str, Any]]:
        """Of every batch: how many samples, evaluations of each, seconds of the whole batch by part."""
        found = []
        for first, end, path in self.batches:
            with safe_open(path, "pt") as file:
                told = file.metadata()
            found.append({"samples": end - first, "evaluations": int(told["evaluations"]), "seconds": json.loads(told["seconds"])})
        return found

    def latents(self) -> Iterator[torch.Tensor]:
        """The latents of every batch in order [B,...]."""
        for _, _, path in self.batches:
            with safe_open(path, "pt") as file:
                yield file.get_tensor("latents")
