"""What networks say of samples, computed once: features, scores and distances of every cell, in files that a later call finds again."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from reflow.evaluation.comparison import asked
from reflow.evaluation.comparison.samples import Samples
from reflow.outputs import written
from reflow.weights.files import save_tensors

BATCH = 32
HELD = 12  # sets of values in memory: 250 MB each for 30,000 images and Inception
Rows = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]  # images [B,3,H,W] uint8 and their numbers -> [B, ...] fp32


@dataclass
class Stored:
    """Values of images below `root`. size and resize: how an image is cut before a network sees it; size 0 leaves samples as they are."""

    root: Path
    prompts: Sequence[str]
    per_prompt: int
    size: int = 0
    resize: str = "lanczos"
    held: dict[str, torch.Tensor] = field(default_factory=dict)

    def of(self, key: dict[str, Any], paths: Sequence[Path], rows: Rows, size: int, what: str) -> torch.Tensor:
        """[N, ...] of these images, from the file of `key` where there is one, else computed and written."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        if name in self.held:
            return self.held[name]
        file = self.root / f"{name}.safetensors"
        if not file.is_file():
            self.root.mkdir(parents=True, exist_ok=True)
            found, interval = [], 0.5 if sys.stderr.isatty() else 20.0
            batches, total = list_of(paths, size, self.resize), -(-len(paths) // BATCH)
            for numbers, images in tqdm(batches, desc=what, total=total, mininterval=interval, leave=False):
                found.append(rows(images, numbers))
            with written(file, shared=True) as temporary:
                save_tensors({"values": torch.cat(found).contiguous()}, temporary, {"key": json.dumps(key, sort_keys=True)})
        while len(self.held) >= HELD:
            del self.held[next(iter(self.held))]
        self.held[name] = load_file(str(file))["values"]
        return self.held[name]

    def features(self, feature: Any, samples: Samples, patches: int | None = None) -> torch.Tensor:
        """[N, D] of a cell's samples; patches: of one seeded crop of each image instead of the whole."""
        key = {**self.key(feature, samples), "size": self.size, "resize": self.resize, "patches": patches}
        return self.of(key, self.paths(samples), rows_of(feature.features, patches), self.size, f"{feature.name} of {samples.cell}")

    def scores(self, feature: Any, samples: Samples) -> torch.Tensor:
        """[N] of a cell's samples and their prompts, at their full size."""

        def rows(images: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
            return feature.scores(images, [self.prompts[number // self.per_prompt] for number in numbers])

        return self.of(self.key(feature, samples), self.paths(samples), rows, 0, f"{feature.name} of {samples.cell}")

    def real(self, feature: Any, paths: Sequence[Path], size: int, digest: str) -> torch.Tensor:
        """[M, D] of the real images, cut to size; digest: of what they are."""
        key = {"feature": feature.name, "network": feature.digest, "real": digest, "size": size, "resize": self.resize}
        return self.of(key, paths, rows_of(feature.features, None), size, f"{feature.name} of real images")

    def distances(self, feature: Any, samples: Samples, pairs: torch.Tensor, other: Samples) -> torch.Tensor:
        """[P] distances of pairs [P, 2] of numbers, the first of `samples`, the second of `other`."""
        key = {**self.key(feature, samples), "other": self.key(feature, other), "pairs": hashlib.sha256(pairs.numpy().tobytes()).hexdigest()}
        left, right = [samples.image(int(i)) for i in pairs[:, 0]], [other.image(int(i)) for i in pairs[:, 1]]

        def rows(images: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
            beside = torch.stack(list(asked.pictures([right[number] for number in numbers], 0, self.resize)))
            return feature.distances(images, beside)

        return self.of(key, left, rows, 0, f"{feature.name} of {samples.cell}")

    def counts(self, feature: Any, samples: Samples, classes: Sequence[str]) -> torch.Tensor:
        """[N, C] how often each class stands in each of a cell's samples."""

        def rows(images: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
            return feature.count(images, classes)

        return self.of({**self.key(feature, samples), "classes": list(classes)}, self.paths(samples), rows, 0, f"{feature.name} of {samples.cell}")

    @staticmethod
    def key(feature: Any, samples: Samples) -> dict[str, Any]:
        return {"feature": feature.name, "network": feature.digest, "samples": samples.what, "count": samples.count}

    @staticmethod
    def paths(samples: Samples) -> list[Path]:
        return [samples.image(number) for number in range(samples.count)]


def rows_of(call: Callable[[torch.Tensor], torch.Tensor], patches: int | None) -> Rows:
    if patches is None:
        return lambda images, numbers: call(images)
    from reflow.evaluation.features.patches import patches as crops

    return lambda images, numbers: call(crops(images, numbers, size=patches))


def list_of(paths: Sequence[Path], size: int, resize: str) -> Iterator[tuple[range, torch.Tensor]]:
    """The images in batches with their numbers."""
    for first in range(0, len(paths), BATCH):
        part = paths[first : first + BATCH]
        yield range(first, first + len(part)), torch.stack(list(asked.pictures(part, size, resize)))
