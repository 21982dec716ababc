"""LPIPS (Zhang et al. 2018), version 0.1: how far two images are apart for people, by weighted features of AlexNet or VGG16.

sum over layers of the mean over places of w_l . (f^_l(a) - f^_l(b))^2, f^ being channels of unit length. The backbone's weights are
torchvision's file; the weights w of the paper come with torchmetrics. No torchvision is needed. Images stay at their size.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from reflow.errors import UserError
from reflow.evaluation.features.feature import exact, need_images
from reflow.evaluation.features.files import digest_of, fill, state_of, weights_file
from reflow.evaluation.features.needed import refuse

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Layers as torchvision numbers them: (channels, kernel, stride, padding) of a convolution, "relu", or (kernel, stride) of a maximum pool.
ALEXNET = [(64, 11, 4, 2), "relu", (3, 2), (192, 5, 1, 2), "relu", (3, 2), (384, 3, 1, 1), "relu", (256, 3, 1, 1), "relu", (256, 3, 1, 1), "relu"]
VGG16: list[tuple[int, ...] | str] = []
for _count, _channels in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
    VGG16 += [step for _ in range(_count) for step in ((_channels, 3, 1, 1), "relu")] + [(2, 2)]
# The layers after which features are read, and the name of the paper's weights for them.
READ = {"alex": (ALEXNET, (1, 4, 7, 9, 11)), "vgg": (VGG16[:-1], (3, 8, 15, 22, 29))}


def backbone(net: str) -> nn.Sequential:
    """The convolutional layers of torchvision's alexnet or vgg16, numbered as there."""
    layers: list[nn.Module] = []
    width = 3
    for step in READ[net][0]:
        if step == "relu":
            layers.append(nn.ReLU())
        elif len(step) == 2:
            layers.append(nn.MaxPool2d(*step))
        else:
            channels, kernel, stride, padding = step
            layers.append(nn.Conv2d(width, channels, kernel, stride, padding))
            width = channels
    return nn.Sequential(*layers)


def linear_weights(net: str) -> tuple[list[torch.Tensor], Path]:
    """(w_l [channels] of each layer, the file that torchmetrics brings). Raises UserError where it is not installed."""
    spec = find_spec("torchmetrics")
    file = Path(str(spec.origin)).parent / "functional" / "image" / "lpips_models" / f"{net}.pth" if spec else None
    if file is None or not file.is_file():
        raise UserError(
            "--features lpips: LPIPS' own weights come with torchmetrics, which is not installed here; pip install 'reflow[evaluate]' adds it."
        )
    held = torch.load(file, map_location="cpu", weights_only=True)
    return [held[f"lin{i}.model.1.weight"].flatten() for i in range(len(READ[net][1]))], file


class Lpips:
    name = "lpips"
    kind = "distance"

    def __init__(self, path: Path, device: torch.device) -> None:
        file = weights_file(self.name, path)
        state = {key.removeprefix("features."): tensor for key, tensor in state_of(self.name, file).items() if key.startswith("features.")}
        if "0.weight" not in state:
            raise refuse(self.name, file, "it holds no alexnet or vgg16 of torchvision")
        net = "alex" if state["0.weight"].shape[-1] == 11 else "vgg"
        self._network = fill(self.name, backbone(net), state, file).to(device)
        self._linear, linear_file = linear_weights(net)
        self._linear = [weight.to(device) for weight in self._linear]
        self._read, self._device = READ[net][1], device
        self.digest = digest_of([file, linear_file])
        self.implementation = f"reflow's LPIPS 0.1 on {'AlexNet' if net == 'alex' else 'VGG16'}, weights w of torchmetrics ({linear_file.name}), fp32"

    def _features(self, images: torch.Tensor) -> list[torch.Tensor]:
        shift, scale = (torch.tensor(values, device=self._device)[:, None, None] for values in (SHIFT, SCALE))
        x = (images.to(self._device).float() / 127.5 - 1 - shift) / scale
        found = []
        for number, layer in enumerate(self._network):
            x = layer(x)
            if number in self._read:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def distances(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        if need_images(images).shape != need_images(others).shape:
            raise ValueError(f"LPIPS needs images of one shape, got {list(images.shape)} and {list(others.shape)}")
        with exact():
            pairs = zip(self._features(images), self._features(others), self._linear, strict=True)
            return torch.stack([((a - b).square() * w[:, None, None]).sum(1).mean((1, 2)) for a, b, w in pairs]).sum(0).float().cpu()
