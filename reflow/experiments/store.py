"""Students that experiments share: tensors under the hash of what made them, beside the experiments' own folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from reflow.errors import UserError
from reflow.outputs import written
from reflow.weights.files import make_folder, save_tensors


def elsewhere(device: str) -> str:
    """The type of a device as keys name it: "" for the CPU, which they do not name."""
    kind = device.partition(":")[0]
    return "" if kind == "cpu" else kind


def described(made: Any) -> dict[str, Any]:
    """The fields of what is kept, ready for JSON and for the hash that names it; the device by its type, where it is not the CPU."""

    def bare(fields: dict[str, Any]) -> dict[str, Any]:
        named = {key: bare(value) if isinstance(value, dict) else value for key, value in fields.items() if key != "device"}
        kind = elsewhere(fields.get("device", "cpu"))
        return {**named, "device": kind} if kind else named

    return bare(asdict(made))


class Store:
    """A folder of NAME.safetensors. Two processes that make the same thing write the same file; a reader sees a whole one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made = 0  # by this process, not found there

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def tensors(self, name: str, make: Callable[[], dict[str, Tensor]], about: str = "") -> dict[str, Tensor]:
        """What is kept under the name, or made now and kept. about: written into the file, to say what it is."""
        if not self.has(name):
            self.keep(name, make(), about)
        try:
            return load_file(self._path(name))
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{self._path(name)} cannot be read ({error}); remove it, and the same command makes it anew.") from error

    def of_seeds(
        self,
        seed: int,
        seeds: Iterable[int],
        name: Callable[[int], str],
        make: Callable[[list[int]], list[dict[str, Tensor]]],
        about: Callable[[int], str],
    ) -> dict[str, Tensor]:
        """What is kept under the name of a seed; where it is not there, made now together with the others of `seeds` that are missing, since
        networks that differ in their seed alone are trained side by side at little more than the cost of one."""
        if not self.has(name(seed)):
            missing = [one for one in sorted({seed, *seeds}) if not self.has(name(one))]
            for one, made in zip(missing, make(missing), strict=True):
                self.keep(name(one), made, about(one))
        return self.tensors(name(seed), dict)

    def keep(self, name: str, made: dict[str, Tensor], about: str = "") -> None:
        self.made += 1
        make_folder(self.folder)
        with written(self._path(name), shared=True) as place:
            save_tensors({key: value.contiguous() for key, value in made.items()}, place, {"about": about})

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
