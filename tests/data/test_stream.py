"""Encoding on the fly gives what a cache gives, names what it cannot read, and trains and resumes to the bit."""

import importlib.util
import io
import json
import pathlib
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from reflow.data.cache import CachedDataset
from reflow.data.encode import Encoder
from reflow.data.prepare import Preparation
from reflow.data.sources import open_source
from reflow.data.stream import StreamDataset, stream
from reflow.errors import UserError
from reflow.models import registry
from reflow.recipes.sections import Data
from reflow.training import run

PLACE = pathlib.Path(__file__).parents[1] / "training" / "tiny.py"
spec = importlib.util.spec_from_file_location("tiny_for_stream", PLACE)
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)
SIZES = [(8, 32), (16, 16), (32, 8)]


@pytest.fixture(scope="module")
def base():
    return registry.family("digits").load()


@pytest.fixture
def tars(tmp_path, monkeypatch):
    """20 images in two tars, of three shapes; number 5 cannot be read."""
    monkeypatch.setenv("REFLOW_CACHE", str(tmp_path / "index"))
    (tmp_path / "tars").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "tars" / f"{shard}.tar", "w") as out:
            for n in range(10 * shard, 10 * shard + 10):
                stored = io.BytesIO()
                size = ((20, 20), (60, 20), (20, 60))[n % 3]
                Image.fromarray(np.random.default_rng(n).integers(0, 256, size[::-1], np.uint8)).save(stored, "PNG")
                content = stored.getvalue()
                if n == 5:
                    content = content[:70]  # the header is whole, the picture is not
                for name, data in ((f"{n:02d}.png", content), (f"{n:02d}.txt", f"number {n % 4}".encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    out.addfile(info, io.BytesIO(data))
    return tmp_path / "tars"


def test_streaming_equals_the_cache_and_an_unreadable_image_has_a_stand_in(base, tars, tmp_path, capsys):
    data = StreamDataset(open_source(tars), base, SIZES)
    work = Preparation(base, open_source(tars), tmp_path / "out", sizes=SIZES, shard_size=8, batch_size=2)
    work.run()
    cache = CachedDataset(tmp_path / "out", base)
    assert data.counts == (7, 7, 6) and cache.counts == (7, 7, 5) and data.shape == cache.shape
    keys = [data.source.key(int(n)) for n in data.numbers]
    first = keys.index("0.tar/05.png")
    assert data.groups[2].first <= first < data.groups[2].first + 6
    for group in range(3):
        items = torch.arange(5) + data.groups[group].first
        places = torch.arange(5) + cache.groups[group].first
        if group == 2:  # where the unreadable one lies the next one is taken: the cache does not have it at all
            after = [int(i) + (int(i) >= first) for i in items]
            places, items = torch.tensor([places[0], *places[1:]]), torch.tensor(after)
        torch.testing.assert_close(data.latent(items), cache.latent(places), rtol=1e-4, atol=1e-4)
        dropped = torch.tensor([False, True, False, False, True])
        mine, theirs = data.conditioning(items, dropped), cache.conditioning(places, dropped)
        assert torch.equal(mine.time_ids, theirs.time_ids)
        torch.testing.assert_close(mine.encoder_hidden_states, theirs.encoder_hidden_states, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.text_embeds, theirs.text_embeds, rtol=1e-4, atol=1e-5)
        assert torch.equal(data.null_rows(items).time_ids, mine.time_ids)
    assert capsys.readouterr().err == ""
    pair = torch.tensor([first, first + 1])
    latents = data.latent(pair)
    torch.testing.assert_close(latents[0], latents[1], rtol=1e-4, atol=1e-4)
    assert "0.tar/05.png" in capsys.readouterr().err
    assert torch.equal(data.conditioning(pair).time_ids[0], data.conditioning(pair).time_ids[1])
    strict = StreamDataset(open_source(tars), base, SIZES, max_bad_share=0.0)
    with pytest.raises(
        UserError, match=r"1 of 20 images .* data\.max_bad_share = 0 allows \(the last is 0\.tar/05\.png"
    ):
        strict.latent(pair)


def test_captions_are_encoded_once_and_nan_names_the_file(base, tars, monkeypatch):
    said, text = [], Encoder.text
    monkeypatch.setattr(Encoder, "text", lambda self, captions: said.append(captions) or text(self, captions))
    data = stream(Data(source="stream", path=str(tars), resolution=16), base)
    assert len(data.groups) == 1
    data.conditioning(torch.tensor([0, 4, 1]))
    data.conditioning(torch.tensor([8, 9]))
    assert said == [["number 0"], ["number 1"]] and data.words(torch.tensor([4, 9])) == ["number 0", "number 1"]
    monkeypatch.setattr(type(base), "encode_images", lambda _, pixels: torch.full((len(pixels), 2, 4, 4), float("nan")))
    with pytest.raises(UserError, match=r"0\.tar/07\.png"):
        data.latent(torch.tensor([7]))
    with pytest.raises(UserError, match="needs data.path"):
        stream(Data(source="stream"), base)


def test_training_streams_and_a_resumed_run_is_bit_equal(tars, tmp_path, monkeypatch):
    settings = [
        "data.source=stream",
        f"data.path={tars}",
        "data.buckets=true",
        "data.max_bad_share=0.1",
        "stages.0.samples=48",
        "stages.1.samples=16",
        "checkpoint.every=16",
        "teacher.guidance_scale=2.0",
    ]
    recipe = tiny.recipe(tmp_path, *settings)
    assert run.train(recipe, tmp_path / "whole") == 0
    encoded, latents = [], Encoder.latents

    def failing(self, pixels, numbers):
        if len(encoded) == 9:
            raise KeyboardInterrupt
        encoded.append(numbers)
        return latents(self, pixels, numbers)

    monkeypatch.setattr(Encoder, "latents", failing)
    with pytest.raises(KeyboardInterrupt):
        run.train(recipe, tmp_path / "cut")
    assert (tmp_path / "cut" / "checkpoints" / "latest").read_text().startswith("stage-1")
    monkeypatch.setattr(Encoder, "latents", latents)
    assert run.train(recipe, tmp_path / "cut") == 0
    whole, cut = (load_file(tmp_path / name / "stage-2" / "unet_ema.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    losses = [json.loads(line).get("loss") for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert np.isfinite([loss for loss in losses if loss is not None]).all()
