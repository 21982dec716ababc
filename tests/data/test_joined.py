"""Several places as one data set: shares, shapes, and a run that resumes to the bit."""

import importlib.util
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from reflow.data.joined import Joined
from reflow.data.latents import LatentDataset
from reflow.data.sampler import items_of
from reflow.errors import UserError
from reflow.models.conditioning import Conditioning
from reflow.recipes import reading
from reflow.training import run
from reflow.training.engine import Engine

PLACE = pathlib.Path(__file__).parents[1] / "training" / "tiny.py"
spec = importlib.util.spec_from_file_location("tiny_for_joined", PLACE)
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


def part(count, first, shape=(1, 2, 2)):
    """Items whose latent and caption are their number."""
    values = torch.arange(first, first + count, dtype=torch.float32)
    rows = Conditioning(values[:, None, None].repeat(1, 3, 2))
    return LatentDataset(values[:, None, None, None].expand(-1, *shape).contiguous(), torch.arange(count), rows, Conditioning(torch.full((1, 3, 2), -1.0)))


def test_every_item_comes_as_often_as_its_place_repeats():
    data = Joined([part(3, 0), part(5, 10), part(2, 20, (1, 4, 2))], [2, 1, 3])
    assert len(data) == 3 * 2 + 5 + 2 * 3 and data.counts == (11, 6) and data.shape == (1, 2, 2)
    everything = [data.latent(torch.tensor([item]))[0, 0, 0, 0].item() for item in range(len(data))]
    for value in (0, 1, 2):
        assert everything.count(value) == 2
    assert sorted(everything) == [0, 0, 1, 1, 2, 2, 10, 11, 12, 13, 14, 20, 20, 20, 21, 21, 21]
    # A whole epoch of the sampler, in blocks of one shape.
    items = items_of(0, 0, list(range(12)), (11,), 4)
    assert sorted(items[:11]) == list(range(11))


def test_rows_come_in_the_order_asked_for_whatever_part_they_are_of():
    data = Joined([part(3, 0), part(5, 10)], [2, 1])
    items = torch.tensor([10, 0, 6, 2, 5, 10, 1])
    want = torch.tensor([14.0, 0, 10, 2, 2, 14, 1])
    assert torch.equal(data.latent(items)[:, 0, 0, 0], want)
    dropped = torch.tensor([False, True, False, False, True, False, False])
    got = data.conditioning(items, dropped).encoder_hidden_states[:, 0, 0]
    assert torch.equal(got, torch.where(dropped, torch.tensor(-1.0), want))
    assert (data.null_rows(items).encoder_hidden_states == -1).all() and len(data.null_rows(items)) == 7
    assert torch.equal(data.conditioning(items).encoder_hidden_states[:, 0, 0], want)


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("REFLOW_CACHE", str(tmp_path / "index"))
    for name, count in (("a", 3), ("b [2]", 4)):
        (tmp_path / name).mkdir()
        for n in range(count):
            Image.fromarray(np.random.default_rng(n).integers(0, 256, (16, 16), np.uint8)).save(tmp_path / name / f"{n}.png")
            (tmp_path / name / f"{n}.txt").write_text(f"{name} {n}")
    return f'[{{path = "{tmp_path / "a"}", repeats = 4}}, {{path = "{tmp_path / "b [2]"}"}}]'


def test_a_run_on_several_places_resumes_to_the_bit(places, tmp_path, monkeypatch):
    settings = ("data.source=stream", f"data.sources={places}", "checkpoint.every=16")
    recipe = tiny.short(tmp_path, *settings)
    assert run.train(recipe, tmp_path / "whole") == 0
    told = reading.load(str(tmp_path / "whole" / "recipe.toml"))
    assert told == recipe and [(p.path.rpartition("/")[2], p.repeats) for p in told.data.places] == [("a", 4), ("b [2]", 1)]
    with monkeypatch.context() as patch:
        step, calls = Engine.step, []

        def stops(self, rate):
            calls.append(1)
            if len(calls) == 6:  # four micro-batches a step: in the second one
                raise KeyboardInterrupt
            return step(self, rate)

        patch.setattr(Engine, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            run.train(recipe, tmp_path / "cut")
    assert (tmp_path / "cut" / "checkpoints" / "latest").read_text() == "stage-1-000000016"
    assert run.train(recipe, tmp_path / "cut") == 0
    whole, cut = (load_file(tmp_path / name / "stage-1" / "unet_ema.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.parametrize("settings, words", [
    (('data.sources=[{path = "a"}]',), "'digits', which lies in one place"),
    (("data.source=stream", "data.path=x", 'data.sources=[{path = "a"}]'), "beside data.path = 'x'"),
    (("data.source=stream", 'data.sources=[{path = "a", repeat = 2}]'), "did you mean 'repeats'"),
    (("data.source=stream", 'data.sources=[{path = "a", repeats = 0}]'), "data.sources.0.repeats"),
    (("data.source=stream", "data.sources=[{repeats = 2}]"), "'data.sources.0.path' is missing"),
])  # fmt: skip
def test_what_cannot_be_joined_is_a_sentence(settings, words):
    with pytest.raises(UserError, match=words):
        reading.load("digits", list(settings))
