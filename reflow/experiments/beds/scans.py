"""Scans that a bed's mixture is fitted to: the bundled 8x8 digits, or 28x28 ones (MNIST) from a file or folder that the user names.

Read are, with or without .gz, the four files of the original distribution (train-images-idx3-ubyte and train-labels-idx1-ubyte are needed);
an .npz with x_train and y_train, as Keras keeps it; a .parquet with columns image and label, or a folder with one whose name holds
"train", as the data set lies on the hub; a folder of folders 0 to 9 with .png files. Nothing is ever downloaded.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reflow.errors import UserError
from reflow.experiments.beds.mixture import CLASSES, LowRankMixture, fitted

SIDE = 28
# parts of a class and axes of a part, by the side of the scans
FITS = {8: (2, 6), SIDE: (4, 20)}
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
HELP = (
    f"give --data a folder with {IMAGES} and {LABELS} (.gz too), with a train .parquet, or with folders 0 to 9 of .png files; or an .npz "
    "with x_train and y_train"
)


@lru_cache(maxsize=4)
def read(place: str) -> tuple[Tensor, Tensor]:
    """Scans [N, side * side] from -1 to 1 in fp64 and their classes [N]; place "": the bundled ones. Raises UserError for what is none."""
    if not place:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        return torch.from_numpy(bunch.images).double().flatten(1) / 8 - 1, torch.from_numpy(bunch.target).long()
    try:
        images, labels = _found(Path(place).expanduser())
        _check(images, labels)
    except (OSError, EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{place} holds no {SIDE}x{SIDE} digits ({error}); {HELP}.") from error
    return torch.from_numpy(images.reshape(len(images), -1).astype(np.float64) / 127.5 - 1), torch.from_numpy(labels.astype(np.int64))


@lru_cache(maxsize=4)
def mixture(place: str) -> LowRankMixture:
    """Of the scans, in fp64. Raises UserError for scans that it cannot be fitted to."""
    images, labels = read(place)
    try:
        return fitted(images, labels, *_fit(images))
    except ValueError as error:
        raise UserError(f"The mixture cannot be fitted to {place or 'the bundled scans'}: {error}.") from error


@lru_cache(maxsize=4)
def digest(place: str) -> str:
    """Which scans these are and how they are fitted, wherever they lie."""
    images, labels = read(place)
    told = hashlib.sha256(images.to(torch.float32).numpy().tobytes() + labels.numpy().tobytes())
    return f"{told.hexdigest()[:12]}-{'-'.join(map(str, _fit(images)))}"


def _fit(images: Tensor) -> tuple[int, int]:
    return FITS[round(images.shape[1] ** 0.5)]


def _found(place: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 28, 28] or [N, 784] and labels [N], uint8."""
    if place.is_file():
        if place.suffix == ".npz":
            with np.load(place, allow_pickle=False) as kept:
                return kept["x_train"], kept["y_train"]
        if place.suffix == ".parquet":
            return _parquet(place)
        raise ValueError(f"it ends in {place.suffix or 'nothing'}")
    if not place.is_dir():
        raise ValueError("it is not there")
    idx = [next((p for p in (place / name, place / f"{name}.gz") if p.exists()), None) for name in (IMAGES, LABELS)]
    if all(idx):
        return _idx(idx[0], 3), _idx(idx[1], 1)
    tables = sorted(p for p in place.rglob("*.parquet") if "train" in p.name)
    if tables:
        parts = [_parquet(table) for table in tables]
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    if all((place / str(digit)).is_dir() for digit in range(CLASSES)):
        return _folders(place)
    raise ValueError("none of the known files is in it")


def _idx(path: Path, dims: int) -> np.ndarray:
    """A file of the original distribution: magic 0, 0, 8 (bytes), number of dimensions, big-endian sizes, then the bytes."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if raw[:4] != bytes([0, 0, 8, dims]):
        raise ValueError(f"{path.name} does not begin as an IDX file of {dims} dimensions")
    shape = np.frombuffer(raw, ">i4", dims, 4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dims)
    if len(values) != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"{path.name} says {[int(n) for n in shape]} and holds {len(values)} bytes")
    return values.reshape(shape)


def _image(data: bytes | Path) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as picture:
        return np.asarray(picture.convert("L"))


def _parquet(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path, columns=["image", "label"]).to_pydict()
    images = [_image(cell["bytes"] if isinstance(cell, dict) else cell) for cell in table["image"]]
    return np.stack(images), np.asarray(table["label"])


def _folders(place: Path) -> tuple[np.ndarray, np.ndarray]:
    files = [(path, digit) for digit in range(CLASSES) for path in sorted((place / str(digit)).glob("*.png"))]
    if not files:
        raise ValueError("its folders 0 to 9 hold no .png")
    return np.stack([_image(path) for path, _ in files]), np.array([digit for _, digit in files])


def _check(images: np.ndarray, labels: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.size != len(images) * SIDE * SIDE:
        raise ValueError(f"images are {images.dtype} {list(images.shape)} instead of uint8 [N, {SIDE}, {SIDE}]")
    if labels.shape != (len(images),) or not len(labels) or labels.min() < 0 or labels.max() >= CLASSES:
        raise ValueError(f"labels {list(labels.shape)} of {len(images)} images must be one of 0 to 9 each")
