"""How good a digits folder is: prompt accuracy, Fréchet distance at several step counts, memorisation.

python -m reflow.experiments.digits_quality [FOLDER]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from reflow.data import digits as data
from reflow.evaluation.classifier import accuracy, load_classifier
from reflow.evaluation.measures.frechet import frechet_distance
from reflow.evaluation.metrics import paired_error
from reflow.models import Base, denoise, family


@torch.no_grad()
def ddim(base: Base, labels: torch.Tensor, steps: int, *, seed: int = 0, batch: int = 250) -> torch.Tensor:
    """Images [N,1,16,16] of the canonical prompts of labels [N]: DDIM, guidance 1, from index 999 to index 0.

    Indices are max(round(1000 t) - 1, 0) at equal times from t=1 to t=0, so every step count is allowed and where it
    divides 1000 this is diffusers' DDIMScheduler with "trailing" spacing. Noise is drawn on the CPU, one seed for the
    whole set.
    """
    from diffusers import DDIMScheduler

    device = next(base.unet.parameters()).device
    alphas = DDIMScheduler.from_config(base.scheduler_config).alphas_cumprod.double()
    grid = [max(round(1000 * (1 - i / steps)) - 1, 0) for i in range(steps + 1)]
    noise = torch.randn((len(labels), *base.latent_shape()), generator=torch.Generator().manual_seed(seed))
    text = base.encode_prompts([data.caption(digit) for digit in range(10)])
    images = []
    for rows in torch.arange(len(labels)).split(batch):
        conditioning = text.select(labels[rows].to(device))
        sample = noise[rows].to(device)
        for start, end in zip(grid, grid[1:], strict=False):
            (a, s), (b, r) = ((alphas[i].sqrt().item(), (1 - alphas[i]).sqrt().item()) for i in (start, end))
            eps = denoise(base.unet, sample, torch.full((len(rows),), start, device=device), conditioning)
            sample = b * (sample - s * eps) / a + r * eps
        images.append(base.decode(sample).cpu())
    return torch.cat(images)


def nearest(images: torch.Tensor, scans: torch.Tensor, exclude_self: bool = False) -> torch.Tensor:
    """Root mean square pixel distance [N] of each image to its nearest scan."""
    distance = torch.cdist(images.flatten(1), scans.flatten(1)) / images[0].numel() ** 0.5
    if exclude_self:
        distance.fill_diagonal_(float("inf"))
    return distance.min(1).values


@torch.no_grad()
def evaluate(folder: Path | str, *, samples: int = 3000, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Measure the saved weights of a folder, cast to fp32: `measure` on DDIM with 32, 8, 4 and 2 steps."""
    base = family("digits").load(folder, device=device)
    decoded = torch.cat([base.decode(base.encode_images(part)).cpu() for part in data.images()[0].split(256)])
    return measure(lambda labels, steps: ddim(base, labels, steps, seed=seed), decoded, samples=samples, seed=seed)


def measure(
    draw: Callable[[torch.Tensor, int], torch.Tensor],
    decoded: torch.Tensor,
    *,
    samples: int,
    seed: int,
    paired: bool = False,
) -> dict[str, Any]:
    """Quality of `draw(labels [N], steps)` -> images [N,1,16,16] of one noise for every step count, and of the VAE's
    images `decoded` of all scans.

    Distances compare `samples` images with all scans by the features of the committed classifier; they fall with the
    count, so compare equal counts only. `halves_of_scans` is the distance between two random halves of the scans (898
    each), `resampled_scans` that of `samples` scans drawn with replacement: the least that a model repeating the
    scans would score. `paired`: also the mean RMS pixel distance of fewer steps to 32 from the same noise.
    """
    classifier = load_classifier()
    scans, scan_labels = data.images()
    real = classifier.features(scans)
    labels = data.balanced_labels(samples)
    result: dict[str, Any] = dict(samples=samples, seed=seed, accuracy={}, frechet_distance={})
    reference = None
    for steps in (32, 8, 4, 2):
        images = draw(labels, steps)
        result["accuracy"][str(steps)] = accuracy(classifier, images, labels)
        result["frechet_distance"][str(steps)] = round(frechet_distance(classifier.features(images), real), 3)
        if reference is None:
            reference = images
            gap = nearest(images, scans)
            result["nearest_scan_rms"] = dict(
                samples=round(gap.median().item(), 4),
                scans=round(nearest(scans, scans, exclude_self=True).median().item(), 4),
                samples_below_tenth_percentile_of_scans=round(
                    (gap < nearest(scans, scans, exclude_self=True).quantile(0.1)).double().mean().item(), 4
                ),
            )
        elif paired:
            result.setdefault("paired_error", {})[str(steps)] = round(paired_error(images, reference).mean().item(), 4)
    shuffled = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
    half = len(real) // 2
    result["frechet_distance"]["vae"] = round(frechet_distance(classifier.features(decoded), real), 3)
    result["frechet_distance"]["halves_of_scans"] = round(
        frechet_distance(real[shuffled[:half]], real[shuffled[half : 2 * half]]), 3
    )
    drawn = torch.randint(len(real), (samples,), generator=torch.Generator().manual_seed(seed))
    result["frechet_distance"]["resampled_scans"] = round(frechet_distance(real[drawn], real), 3)
    result["classifier_accuracy_on_scans"] = accuracy(classifier, scans, scan_labels)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", default="builtin")
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(evaluate(args.folder, samples=args.samples, device=args.device), indent=1))


if __name__ == "__main__":
    main()
