"""The features of FID and KID: the pool before the last layer of the 2015 Inception network, 2048 wide."""

from __future__ import annotations

from pathlib import Path

import torch

from reflow.evaluation.features.feature import exact, need_images
from reflow.evaluation.features.files import digest_of, fill, state_of, weights_file
from reflow.evaluation.features.inception_network import Inception

PUBLISHED = "6726825d"  # how the sha256 of the published file begins, as its name says


class InceptionFeature:
    name = "inception"
    kind = "features"

    def __init__(self, path: Path, device: torch.device) -> None:
        file = weights_file(self.name, path)
        self._network = fill(self.name, Inception(), state_of(self.name, file), file).to(device)
        self._device = device
        self.digest = digest_of([file])
        weights = "the published weights of 2015-12-05" if self.digest.startswith(PUBLISHED) else "weights that are not the published file"
        self.implementation = (
            f"reflow's FID Inception (network and TensorFlow 1 resize to 299 as torch-fidelity 0.4.0), {weights}, pool of 2048, fp32, "
            f"torch {torch.__version__}"
        )

    def features(self, images: torch.Tensor) -> torch.Tensor:
        with exact():
            return self._network(need_images(images).to(self._device)).float().cpu()
