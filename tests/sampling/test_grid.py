"""The grid of all samples: gaps, labels that fit, and sizes from a digit to too many."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from reflow.sampling.pictures import GAP, GRID_SIDE, LINE, fitted, grid

FONT = ImageFont.load_default(size=LINE - 4)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("side, count, columns, tile", [(16, 3, 2, 128), (100, 4, None, 100), (1024, 9, None, 1024), (1024, 100, None, 368)])
def test_pictures_stand_apart_with_their_labels_below(mode, side, count, columns, tile):
    pictures = [Image.new(mode, (side, side), 100 if mode == "L" else (100,) * 3) for _ in range(count)]
    whole = np.asarray(grid(pictures, [("a prompt " * 9, f"4 steps, seed {i}") for i in range(count)], columns).convert("L"))
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    assert max(whole.shape) <= GRID_SIDE
    body = (whole == 100).sum(0)
    # Runs of picture columns are as many as the grid has, `tile` wide, a gap apart.
    edges = np.flatnonzero(np.diff(np.concatenate(([0], (body >= tile // 2).astype(int), [0]))))
    starts, ends = edges[::2], edges[1::2]
    assert len(starts) == columns and set(ends - starts) == {ends[0] - starts[0]} and abs(ends[0] - starts[0] - tile) <= 2
    assert set(starts[1:] - ends[:-1]) <= {GAP}
    assert whole.shape[0] == GAP + rows * ((ends[0] - starts[0]) + 2 * LINE + GAP)
    below = whole[GAP + ends[0] - starts[0] :][: 2 * LINE]
    assert (below[:LINE] < 80).any() and (below[LINE:] < 80).any()
    for start, end in zip(ends, starts[1:], strict=False):  # nothing runs into the next picture's room
        assert (below[:, start:end] == 255).all()


def test_a_thousand_pictures_go_without_labels():
    pictures = [Image.new("L", (16, 16), 0) for _ in range(10_000)]
    whole = np.asarray(grid(pictures, [("long " * 20, "x")] * 10_000))
    assert max(whole.shape) <= GRID_SIDE and whole.shape[0] == whole.shape[1] and (whole == 0).mean() > 0.7


def test_a_line_is_cut_to_its_room():
    pen = ImageDraw.Draw(Image.new("L", (1, 1)))
    for text, width in (("short", 200), ("a very long prompt of many words", 90), ("Ünïcödé " * 30, 60), ("two\nlines", 100), ("", 10)):
        got = fitted(text, width, FONT)
        assert pen.textlength(got, FONT) <= width and "\n" not in got
    assert fitted("short", 200, FONT) == "short"
    assert fitted("a very long prompt", 60, FONT).endswith("...") and fitted("a very long prompt", 60, FONT).startswith("a v")
