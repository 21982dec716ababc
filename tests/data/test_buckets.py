"""Aspect-ratio buckets: which sizes there are, what a cache of them holds, and that every micro-batch has one shape."""

import collections
import importlib.util
import json
import pathlib
import types

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from reflow.data import buckets, sampler
from reflow.data.cache import CachedDataset
from reflow.data.prepare import Preparation
from reflow.data.sources import open_source
from reflow.errors import UserError
from reflow.models import registry
from reflow.training import run
from reflow.training.solves import Solver

PLACE = pathlib.Path(__file__).parents[1] / "training" / "tiny.py"
spec = importlib.util.spec_from_file_location("tiny_for_buckets", PLACE)
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

# arXiv 2307.01952, appendix I: height x width
PUBLISHED = """512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408
704x1344 768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 1024x1024""".split()
PUBLISHED = {tuple(map(int, size.split("x"))) for size in PUBLISHED} | {
    tuple(map(int, s.split("x")))[::-1] for s in PUBLISHED
}
SIZES = [(8, 32), (16, 16), (32, 8)]  # height, width


@pytest.fixture(scope="module")
def base():
    return registry.family("digits").load()


@pytest.fixture(scope="module")
def cache(base, tmp_path_factory):
    """19 images: 7 square, 7 wide and 5 tall ones, and one that cannot be read."""
    place, rng = tmp_path_factory.mktemp("buckets"), np.random.default_rng(0)
    (place / "data").mkdir()
    for n in range(19):
        size = ((20, 20), (60, 20), (20, 60))[n % 3 if n < 15 else n % 2]
        Image.fromarray(rng.integers(0, 256, size[::-1], np.uint8)).save(place / "data" / f"{n:02d}.png")
        (place / "data" / f"{n:02d}.txt").write_text(f"number {n}")
    (place / "data" / "99.png").write_bytes(b"no image")
    (place / "data" / "99.txt").write_text("lost")
    work = Preparation(base, open_source(place / "data"), place / "out", sizes=SIZES, shard_size=4, batch_size=3)
    heard = collections.Counter()
    work.run(lambda kind, count: heard.update({kind: count}))
    assert heard == work.totals == {"sizes": 20, "captions": 20, "images": 20}
    return place / "out"


def test_the_table_is_sdxls_idea(base):
    sdxl = types.SimpleNamespace(cell=32)
    sizes = buckets.table(sdxl, 1024)
    assert len(sizes) == 33 and set(sizes) <= PUBLISHED
    assert {(w, h) for h, w in sizes} == set(sizes) and all(0.8 * 1024**2 < h * w <= 1024**2 for h, w in sizes)
    assert buckets.table(base, 16)[:5] == [(8, 24), (8, 28), (8, 32), (12, 20), (16, 16)]  # its cell is 4
    assert buckets.parse(["16x16", "32x8"], base) == SIZES[:2]
    found = buckets.nearest(SIZES, np.array([[100, 400], [90, 100], [300, 50], [-1, -1]]))
    assert found.tolist() == [0, 1, 2, 0]
    for text, words in (("8by8", "WIDTHxHEIGHT"), ("8x9", "multiple of 4")):
        with pytest.raises(UserError, match=words):
            buckets.parse([text], base)


XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""


def test_the_size_of_a_turned_picture_is_that_of_the_upright_one(tmp_path):
    """The numbers that choose a bucket are read from the header, those of the crop from the picture itself."""
    stored, turned = Image.new("L", (12, 4), 200), {}
    stored.paste(0, (0, 0, 6, 4))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("jpg", "png", "tif", "webp"):
            name = f"{orientation}.{kind}"
            stored.save(tmp_path / name, **({"tiffinfo": exif} if kind == "tif" else {"exif": exif}))
            turned[name] = orientation >= 5
        stored.save(tmp_path / f"{orientation}-lzw.tif", tiffinfo=exif, compression="tiff_lzw")
        turned[f"{orientation}-lzw.tif"] = orientation >= 5
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("XML:com.adobe.xmp", XMP)
    stored.save(tmp_path / "xmp.png", pnginfo=notes)
    stored.save(tmp_path / "xmp.jpg", xmp=XMP.encode())
    stored.save(tmp_path / "xmp.tif", tiffinfo={700: XMP.encode()})
    turned |= {f"xmp.{kind}": True for kind in ("png", "jpg", "tif")}
    source = open_source(tmp_path, caption="")
    told = source.sizes(range(len(source))).tolist()
    for number, size in enumerate(told):
        name = source.key(number)
        assert (name, size) == (name, [12, 4] if turned[name] else [4, 12])
        pixels = np.asarray(source.image(number).convert("L"), int)
        assert (name, list(pixels.shape)) == (name, size)
        halves = np.array_split(pixels, 2, axis=int(not turned[name]))
        assert (name, sorted(round(half.mean(), -1) for half in halves)) == (name, [0, 200])
        assert (name, max(half.std() for half in halves) < 25) == (name, True)
    assert len(told) == 43


def test_blocks_hold_one_group_and_an_epoch_holds_every_item():
    counts, block = (5, 12, 1), 4
    epoch = [sampler.items_of(3, 1, [i], counts, block)[0] for i in range(6 * block)]  # 2 + 3 + 1 blocks
    group = np.searchsorted(np.cumsum(counts), epoch, side="right").reshape(-1, block)
    assert (group == group[:, :1]).all() and set(epoch) == set(range(18))
    later = sampler.items_of(3, 1, list(range(6 * block, 12 * block)), counts, block)
    assert later != epoch and set(later) == set(range(18))
    assert sampler.items_of(3, 1, [40, 7], counts, block) == [later[40 - 24], epoch[7]]
    assert sampler.items_of(3, 1, [5, 9], (40,), block) == [sampler.item_of(3, 1, i, 40) for i in (5, 9)]


def test_a_cache_of_buckets_records_what_was_done(base, cache):
    data = CachedDataset(cache, base)
    assert data.counts == (7, 7, 5) and [g.shape for g in data.groups] == [buckets.latent_shape(base, s) for s in SIZES]
    assert all(words for words in data.words(torch.arange(len(data))))
    ids = [data.conditioning(torch.tensor([g.first])).time_ids[0].tolist() for g in data.groups]
    assert ids == [[20, 60, 1, 0, 8, 32], [20, 20, 0, 0, 16, 16], [60, 20, 0, 1, 32, 8]]
    pixels = Image.open(cache.parent / "data" / "01.png").resize(
        (32, 8), Image.Resampling.LANCZOS, box=(0, 2.5, 60, 17.5)
    )
    want = base.encode_images(torch.from_numpy(np.asarray(pixels, np.float32))[None, None] / 127.5 - 1)
    torch.testing.assert_close(data.latent(torch.tensor([0])), want, rtol=1e-4, atol=1e-4)
    assert data.null.time_ids.tolist()[0][4:] == [8, 32] and data.shape == buckets.latent_shape(base, (8, 32))
    with pytest.raises(ValueError, match="several latent shapes"):
        data.latent(torch.tensor([0, 10]))
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["counts"]["skipped"] == 1 and json.loads((cache / "skipped.jsonl").read_text())["file"] == "99.png"
    assert {s["file"] for s in manifest["shards"]["latents"]} >= {
        "latents-32x8-00000.arrow",
        "latents-8x32-00001.arrow",
    }


def test_training_on_buckets_sees_one_shape_at_a_time_and_every_image(cache, tmp_path, monkeypatch):
    shapes, real = [], Solver.drawn

    def drawn(self, draws):
        items, dropped, noise = real(self, draws)
        shapes.append((tuple(noise.shape), items.tolist()))
        return items, dropped, noise

    monkeypatch.setattr(Solver, "drawn", drawn)
    settings = [
        "data.source=cache",
        f"data.path={cache}",
        "stages.0.samples=64",
        "stages.1.samples=16",
        "validate.every=64",
        "validate.steps=[4]",
        "validate.teacher_steps=4",
        "stages.0.chords_per_solve=2",
        "teacher.guidance_scale=2.0",
    ]
    assert run.train(tiny.recipe(tmp_path, *settings), tmp_path / "run") == 0
    trained = [s for s in shapes if len(s[1]) in (2, 4)]
    assert len({shape[1:] for shape, _ in trained}) == 3
    assert set(sum((items for _, items in trained), [])) == set(range(19))
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if r.get("loss") is not None]
    fixed = [w["mse"] for r in records for w in r.get("windows", []) if isinstance(w, dict) and "mse" in w]
    assert losses and np.isfinite(losses).all() and fixed and np.isfinite(fixed).all()
    shapes.clear()  # trajectories from noise: a half or a whole one a micro-batch
    noise = ["objective.starts=noise", "stages.0.samples=128", "stages.0.chords_per_solve=1", "stages.0.windows=2", "stages.1.windows=2"]
    assert run.train(tiny.recipe(tmp_path, *settings, *noise, "validate.every=0"), tmp_path / "noise") == 0
    assert len({shape[1:] for shape, _ in shapes}) == 3 and {len(items) for _, items in shapes} == {2}
    with pytest.raises(UserError, match=r"stages\.0 with stored pairs needs images of one size"):
        run.train(tiny.recipe(tmp_path, *settings, "stages.0.pairs=16"), tmp_path / "pairs")
