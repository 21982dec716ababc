"""A detector of the user's own, for prompts that say how many of what: --features detector=MODULE:FUNCTION.

FUNCTION(device) gives an object with `count(images, class_names) -> int [B, C]`, how often each class stands in each uint8 image
[B, 3, H, W]. That decides GenEval's tasks of one object, two objects and counts (Ghosh et al. 2023), not those of colour and place. No
detector comes with reflow: thresholds are the detector's own and belong into its `implementation`.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path

import torch

from reflow.errors import UserError, short
from reflow.evaluation.features.feature import need_images
from reflow.evaluation.features.needed import refuse


class Detector:
    """kind "count". digest: sha256 of the module's source; implementation and digest of the user's object are told where it has them."""

    name = "detector"
    kind = "count"

    def __init__(self, path: Path, device: torch.device) -> None:
        module_name, sign, function = str(path).partition(":")
        if not sign or not function.isidentifier():
            raise refuse(self.name, path, "this is no MODULE:FUNCTION")
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise refuse(self.name, path, f"the module {module_name} cannot be imported ({short(str(error))})") from error
        make = getattr(module, function, None)
        if not callable(make):
            raise refuse(self.name, path, f"the module {module_name} has no function {function}")
        self._counter = make(device)
        if not callable(getattr(self._counter, "count", None)):
            raise refuse(self.name, path, f"what {function}(device) gives has no count(images, class_names)")
        source = inspect.getsourcefile(module)
        own = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else ""
        self.digest = str(getattr(self._counter, "digest", own))
        self.implementation = str(getattr(self._counter, "implementation", f"the user's {path}"))

    def count(self, images: torch.Tensor, class_names: Sequence[str]) -> torch.Tensor:
        """int64 [B, C] on the CPU. Raises UserError where the user's object gives anything else."""
        found = torch.as_tensor(self._counter.count(need_images(images), list(class_names))).cpu()
        if found.shape != (len(images), len(class_names)) or found.is_floating_point() or found.is_complex() or bool((found < 0).any()):
            raise UserError(
                f"--features detector: count(images, class_names) gave {found.dtype} {list(found.shape)}; it is to give whole numbers of 0 or more, "
                f"{len(images)} images by {len(class_names)} classes."
            )
        return found.long()
