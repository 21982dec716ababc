"""Several captions of an image: lines and orders of tags, as items of their own in a cache and in a stream."""

import itertools
import pickle

import pytest
import torch
from PIL import Image

from reflow.data.cache import CachedDataset
from reflow.data.prepare import Preparation
from reflow.data.sources import open_source
from reflow.data.stream import StreamDataset
from reflow.data.variants import captions, shuffled
from reflow.models import registry


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("variants")
    for n, text in enumerate(("the digit three\n\na handwritten three\n", "one, two, three, four, five, six", "seven")):
        Image.new("L", (20 + 4 * n, 20), 60 * n).save(path / f"{n}.png")
        (path / f"{n}.txt").write_text(text)
    return path


def test_lines_are_captions_and_a_text_without_lines_is_one():
    assert captions("a\n\n b \r\na", True, 1, 0) == ["a", "b"] and captions("a\nb", False, 1, 0) == ["a\nb"]
    assert captions("", True, 3, 0) == [""]


def test_orders_of_tags_are_few_fixed_and_keep_their_front():
    text = "one, two, three, four, five, six"
    found = captions(text, False, 20, 2)
    assert found[0] == text and len(found) == len(set(found)) > 10
    assert all(order.startswith("one, two, ") and sorted(order.split(", ")) == sorted(text.split(", ")) for order in found)
    assert captions("seven", False, 20, 0) == ["seven"] and captions("a, b", False, 50, 0) == ["a, b", "b, a"]
    # The same in every process, on every machine.
    assert shuffled(text, 1, 0) == "two, five, four, one, six, three"


def test_every_caption_is_an_item_with_its_images_pixels(folder):
    plain, source = open_source(folder), open_source(folder, caption_lines=True, shuffle_tags=3, keep_tags=1)
    assert [source.key(n) for n in range(len(source))] == ["0.png", "0.png#2", "1.png", "1.png#2", "1.png#3", "2.png"]
    assert source.caption(0) == "the digit three" and source.caption(1) == "a handwritten three" and source.caption(5) == "seven"
    assert source.image(3).size == plain.image(1).size == (24, 20)
    rows = source.sizes(range(1, 6)).tolist()
    assert rows == [plain.sizes(range(3)).tolist()[place] for place in (0, 1, 1, 1, 2)]
    assert len({open_source(folder, shuffle_tags=n).digest() for n in (1, 2, 3)}) == 3
    assert [pickle.loads(pickle.dumps(source)).caption(n) for n in range(6)] == [source.caption(n) for n in range(6)]


def test_a_cache_and_a_stream_hold_the_same_items(folder, tmp_path):
    base = registry.family("digits").load()
    options = dict(caption_lines=True, shuffle_tags=2)
    sizes = [(16, 16), (8, 32)]
    Preparation(base, open_source(folder, **options), tmp_path / "out", sizes=sizes).run()
    cache, stream = CachedDataset(tmp_path / "out", base), StreamDataset(open_source(folder, **options), base, sizes)
    assert len(cache) == len(stream) == 5
    items = torch.arange(5)
    for one in itertools.chain(items.split(1)):
        torch.testing.assert_close(cache.latent(one), stream.latent(one), rtol=1e-4, atol=1e-4)
        a, b = cache.conditioning(one), stream.conditioning(one)
        torch.testing.assert_close(a.encoder_hidden_states, b.encoder_hidden_states, rtol=1e-4, atol=1e-4)
