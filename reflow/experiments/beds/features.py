"""A loss on what a picture looks like: features of the digits' classifier beside pseudo-Huber, as "2-rectified flow++" has LPIPS.

LPIPS has no meaning for 8x8 digits; the classifier that judges the digits model stands for it, read as LPIPS reads its network: activations of
every layer, of unit length over channels at each place, squared differences summed over channels and averaged over places. Compared are the
chord's end as the student sees it (z_t + (t_end - t) v^) and the true one, beside (1 - t) times pseudo-Huber in velocity (arXiv 2405.20320,
LPIPS-Huber). The last activations alone do not do: they say too little of pixels, and students leave the data (seen once, in no file).
Time runs from t=1 (noise) to t=0 (data).
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reflow.data import digits
from reflow.evaluation import classifier
from reflow.experiments.beds.exact import Correction, student
from reflow.experiments.beds.fitting import fit
from reflow.experiments.beds.students import Student, pool, version
from reflow.experiments.store import Store
from reflow.flow import network_time
from reflow.training import targets

SOURCES = ("experiments/beds/features.py",)


@lru_cache(maxsize=2)
def judge(device: torch.device) -> nn.Module:
    return classifier.load_classifier(device).eval().requires_grad_(False)


def look(x: Tensor) -> list[Tensor]:
    """Activations of each layer, [B, C, h, w] or [B, C], of unit length over C, of pixels [B, 64] as the classifier sees its scans."""
    h = F.interpolate(x.view(-1, 1, 8, 8), size=(digits.RESOLUTION, digits.RESOLUTION), mode="bicubic", align_corners=False)
    seen = []
    for layer in judge(x.device).body:
        h = layer(h)
        if isinstance(layer, nn.ReLU):
            seen.append(F.normalize(h, dim=1))
    return seen


def distance(x: Tensor, y: Tensor) -> Tensor:
    """[B]: how unlike x and y [B, 64] look; 0 for the same."""
    layers = zip(look(x), look(y), strict=True)
    return torch.stack([(a - b).square().sum(1).view(len(x), -1).mean(1) for a, b in layers]).mean(0)


def weights(spec: Student, store: Store) -> dict[str, Tensor]:
    """The weights of a student of one stage that is trained with the loss; from the store where they are there."""
    told = json.dumps([spec.resolved(), "features", version(*SOURCES)], sort_keys=True)
    name = hashlib.sha256(told.encode()).hexdigest()[:16]
    return store.tensors(name, lambda: _trained(spec, store), told)


def _trained(spec: Student, store: Store) -> dict[str, Tensor]:
    bed, stage, settings = spec.bed(), spec.stages[-1], spec.stages[-1].settings()
    network, table = Correction(bed.mixture.means.shape[1], spec.width, spec.sees_output, (spec.seed,)), spec.table()
    network = network.to(bed.device, bed.dtype)
    model, generator = student(bed, network), torch.Generator().manual_seed(7919 * spec.seed + 1)
    pairs = pool(spec, store)

    def loss(*_: Any) -> Tensor:
        rows = torch.randint(len(pairs[3]), (spec.batch,), generator=generator)
        draws = torch.rand((spec.batch, 1, 2), generator=generator).to(bed.device, bed.dtype)
        z_start, z_end, window, labels = (value[rows] for value in pairs)
        at = targets.points(z_start, z_end, window, draws, table, settings)
        output = model(at.model_input, network_time(at.t), labels)
        plain = targets.loss(output, at, table, settings, weight=1.0 - at.t).loss
        state, factor = table.velocity_coefficients(at.window, at.t)
        velocity = state[:, None] * at.z_t + factor[:, None] * output
        end = at.z_t + (table.t_end[at.window] - at.t)[:, None] * velocity
        return plain + distance(end, at.z_end).mean()

    return fit(network, stage.steps, loss, learning_rate=spec.learning_rate)[0]
