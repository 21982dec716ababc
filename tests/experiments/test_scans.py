"""28x28 digits that a user names: every way they lie on disks, and what is none of them."""

import gzip
import io
import struct

import numpy as np
import pytest
import torch

from reflow.errors import UserError
from reflow.experiments.beds import measure, scans
from reflow.experiments.beds.exact import ExactBed
from reflow.experiments.opened import opened
from reflow.experiments.store import Store


@pytest.fixture(scope="module")
def drawn():
    """Blobs at a place of their class: 900 images [N, 28, 28] and labels, uint8."""
    draw, labels = np.random.default_rng(0), (np.arange(900) % 10).astype(np.uint8)
    y, x = np.mgrid[0:28, 0:28]
    cy, cx = (7 + 7 * (labels % 3) + draw.normal(0, 1, 900)), (5 + 6 * (labels // 3) + draw.normal(0, 1, 900))
    bright = np.exp(-((y - cy[:, None, None]) ** 2 + (x - cx[:, None, None]) ** 2) / (8 * draw.uniform(0.7, 1.4, (900, 1, 1))))
    return (bright * 255).astype(np.uint8), labels


def idx(images, labels, place, packed=""):
    for name, values in ((scans.IMAGES, images), (scans.LABELS, labels)):
        raw = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}i", *values.shape) + values.tobytes()
        (place / f"{name}{packed}").write_bytes(gzip.compress(raw) if packed else raw)
    return place


def png(image):
    from PIL import Image

    held = io.BytesIO()
    Image.fromarray(image).save(held, "PNG")
    return held.getvalue()


def parquet(images, labels, place):
    import pyarrow
    import pyarrow.parquet

    (place / "mnist").mkdir(parents=True)
    table = pyarrow.table({"image": [{"bytes": png(i), "path": None} for i in images], "label": labels.astype(np.int64)})
    pyarrow.parquet.write_table(table, place / "mnist" / "train-00000-of-00001.parquet")
    return place


def folders(images, labels, place):
    for n, (image, label) in enumerate(zip(images, labels)):
        (place / str(label)).mkdir(exist_ok=True)
        (place / str(label) / f"{n:05d}.png").write_bytes(png(image))
    return place


def npz(images, labels, place):
    np.savez(place / "mnist.npz", x_train=images, y_train=labels)
    return place / "mnist.npz"


WAYS = {"idx": idx, "idx.gz": lambda *args: idx(*args, packed=".gz"), "parquet": parquet, "folders": folders, "npz": npz}


@pytest.mark.parametrize("way", WAYS)
def test_scans_are_read_as_they_lie(tmp_path, drawn, way):
    images, labels = drawn[0][:60], drawn[1][:60]
    found, classes = scans.read(str(WAYS[way](images, labels, tmp_path)))
    order = np.argsort(labels, kind="stable") if way == "folders" else np.arange(60)
    assert np.array_equal(classes.numpy(), labels[order]) and found.dtype == torch.float64
    assert np.array_equal(((found + 1) * 127.5).round().numpy().astype(np.uint8).reshape(-1, 28, 28), images[order])


def test_a_bed_of_such_scans(tmp_path, drawn):
    """The same machine in 784 dimensions: the untrained student and finer steps; the data count by what they are and not by their place."""
    place, again = (tmp_path / name for name in ("a", "b"))
    for folder in (place, again):
        folder.mkdir()
        idx(*drawn, folder)
    at = opened("time-density", tmp_path / "out", bed="mnist", data=str(place), quick=True)
    assert at.path("json").name == "time-density-mnist.json" and scans.digest(str(place)) == scans.digest(str(again)) != scans.digest("")
    ref = measure.reference(at.bed, Store(tmp_path), samples=30, steps=60)
    assert ref.fine.shape == (30, 784)
    found = [measure.of_teacher(at.bed, n, ref) for n in (1, 4, 16)]
    assert found[0]["paired"] > found[1]["paired"] > found[2]["paired"] and found[2]["agreement"] > 0.9
    assert ExactBed().mixture.means.shape[1] == 64


@pytest.mark.parametrize("spoil, said", [
    (lambda place: (place / scans.LABELS).unlink(), "none of the known files is in it"),
    (lambda place: (place / scans.IMAGES).write_bytes(bytes([0, 0, 8, 3]) + bytes(12) + b"x"), "says \\[0, 0, 0\\] and holds 1 bytes"),
    (lambda place: (place / scans.IMAGES).write_bytes(b"PK"), "does not begin as an IDX file"),
    (lambda place: idx(np.zeros((3, 28, 28), np.uint8), np.array([1, 2, 12], np.uint8), place), "must be one of 0 to 9"),
    (lambda place: idx(np.zeros((3, 27, 28), np.uint8), np.array([1, 2, 1], np.uint8), place), "instead of uint8"),
])  # fmt: skip
def test_what_is_none_is_a_sentence(tmp_path, drawn, spoil, said):
    idx(*drawn, tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=f"holds no 28x28 digits .*{said}.*give --data a folder"):
        scans.read(str(tmp_path))


def test_too_few_scans_and_no_place_are_sentences(tmp_path, drawn):
    idx(drawn[0][:300], drawn[1][:300], tmp_path)
    with pytest.raises(UserError, match="cannot be fitted to .*30 scans of a 0, and 4 parts of 20 axes need more than 80"):
        scans.mixture(str(tmp_path))
    with pytest.raises(UserError, match="--bed mnist needs the scans: give --data"):
        opened("ablation", tmp_path, bed="mnist")
    with pytest.raises(UserError, match="--data goes with --bed mnist"):
        opened("ablation", tmp_path, data=str(tmp_path))
