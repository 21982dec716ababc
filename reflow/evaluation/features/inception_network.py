"""The Inception network of FID: Inception-v3 as TensorFlow had it in 2015, with the names of its published PyTorch weights.

It differs from torchvision's Inception-v3 in three places: average pools leave the padding out of the mean, the last block has a maximum
pool, and batch norms have eps 1e-3 with other weights. Layers are a table; tensors' names follow from it (Szegedy et al. 2016; Heusel et
al. 2017). Checked against torch-fidelity 0.4.0's network of the same weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

SIZE = 299  # pixels
WIDTH = 2048

Kernel = int | tuple[int, int]
Step = tuple[Any, ...]  # (name, outputs, kernel) and a stride where it is not 1


class Convolution(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


def _padding(kernel: Kernel, stride: int) -> Kernel:
    """What keeps the size; none where the stride halves it."""
    if stride > 1:
        return 0
    return kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)


class Block(nn.Module):
    """Paths side by side, their outputs concatenated. A path is a chain of steps, the last of which may be several side by side; the last
    path starts with a pool: the mean or the maximum of 3 x 3, or "halving", the maximum at stride 2 and nothing after it."""

    def __init__(self, inputs: int, paths: list[list[Step | list[Step]]], pool: str, pooled: int = 0) -> None:
        super().__init__()
        self.pool = pool
        chains = [*paths, [("branch_pool", pooled, 1)] if pooled else []]
        self.chains: list[list[list[str]]] = []
        self.outputs = 0 if pooled else inputs
        for chain in chains:
            width, names = inputs, []
            for step in chain:
                together = step if isinstance(step, list) else [step]
                for name, outputs, kernel, *rest in together:
                    stride = rest[0] if rest else 1
                    self.add_module(name, Convolution(width, outputs, kernel, stride, _padding(kernel, stride)))
                width, names = sum(one[1] for one in together), [*names, [one[0] for one in together]]
            self.chains.append(names)
            self.outputs += width if chain else 0

    def _pooled(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool == "halving":
            return F.max_pool2d(x, 3, 2)
        if self.pool == "maximum":
            return F.max_pool2d(x, 3, 1, 1)
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = []
        for number, chain in enumerate(self.chains, 1):
            y = self._pooled(x) if number == len(self.chains) else x
            for together in chain:
                y = torch.cat([self.get_submodule(name)(y) for name in together], 1)
            found.append(y)
        return torch.cat(found, 1)


def _grid35(inputs: int, pooled: int) -> Block:
    return Block(
        inputs,
        [
            [("branch1x1", 64, 1)],
            [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ],
        "mean",
        pooled,
    )


def _to_grid17(inputs: int) -> Block:
    return Block(
        inputs,
        [[("branch3x3", 384, 3, 2)], [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)]],
        "halving",
    )


def _grid17(inputs: int, width: int) -> Block:
    row, column = (1, 7), (7, 1)
    double = [("branch7x7dbl_1", width, 1), ("branch7x7dbl_2", width, column), ("branch7x7dbl_3", width, row), ("branch7x7dbl_4", width, column)]
    return Block(
        inputs,
        [
            [("branch1x1", 192, 1)],
            [("branch7x7_1", width, 1), ("branch7x7_2", width, row), ("branch7x7_3", 192, column)],
            [*double, ("branch7x7dbl_5", 192, row)],
        ],
        "mean",
        192,
    )


def _to_grid8(inputs: int) -> Block:
    long = [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3, 2)]
    return Block(inputs, [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)], [*long]], "halving")


def _grid8(inputs: int, pool: str) -> Block:
    return Block(
        inputs,
        [
            [("branch1x1", 320, 1)],
            [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
            [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]],
        ],
        pool,
        192,
    )


class Inception(nn.Module):
    """uint8 or float images [B, 3, H, W] from 0 to 255 to pooled features [B, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        width, self.blocks = 192, []
        for name, make, argument in (
            ("5b", _grid35, 32), ("5c", _grid35, 64), ("5d", _grid35, 64), ("6a", _to_grid17, None), ("6b", _grid17, 128), ("6c", _grid17, 160),
            ("6d", _grid17, 160), ("6e", _grid17, 192), ("7a", _to_grid8, None), ("7b", _grid8, "mean"), ("7c", _grid8, "maximum"),
        ):  # fmt: skip
            block = make(width) if argument is None else make(width, argument)  # type: ignore[operator]
            self.add_module(f"Mixed_{name}", block)
            self.blocks.append(f"Mixed_{name}")
            width = block.outputs
        self.fc = nn.Linear(WIDTH, 1008)  # of the published file; unused

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (resized_as_tensorflow(images.float(), SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))


def resized_as_tensorflow(images: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear resizing of TensorFlow 1 without aligned corners: output pixel i reads at i * (old / new), with no shift of half a pixel and
    no smoothing where it shrinks. FIDs of images resized in another way do not compare (Parmar et al. 2022)."""
    for axis in (3, 2):
        old = images.shape[axis]
        place = torch.arange(size, dtype=torch.float32, device=images.device) * torch.tensor(old / size, dtype=torch.float32)
        low = place.long()
        shape = [1] * images.ndim
        shape[axis] = size
        below, above = images.index_select(axis, low), images.index_select(axis, (low + 1).clamp_max(old - 1))
        images = below + (above - below) * (place - low).reshape(shape)
    return images
