"""The validation's pictures: what stands beside and above the images, what the files say, and the one before the first step."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

import tiny
import watch
from reflow.data import digits
from reflow.sampling.pictures import read_note
from reflow.training import loop, pictures, run, validation


def test_columns_carry_their_prompts_and_images_stay_as_they_are():
    images = torch.rand(3, 1, 32, 32) * 2 - 1
    with_words, without = (pictures.labelled_grid([("teacher, 32 steps", images), ("student, 4 steps", -images)], p) for p in (
        ["a handwritten seven", "x", "y"], ["", "", ""]))
    top = with_words.shape[0] - without.shape[0]
    assert top >= 20 and np.array_equal(with_words[top:], without) and (with_words[:top] < 128).any()
    side = 34 * 3
    assert with_words.shape[1] > 3 * side + 90 and without.shape[0] - 2 * side < 20
    shown = with_words[-side:, -side:][3:-3:3, 3:-3:3, 0]
    assert np.array_equal(shown, ((1 - images[2, 0]) * 127.5).round().byte().numpy())


def test_long_prompts_are_wrapped_and_cut_where_they_say_so():
    font = ImageFont.load_default(size=11)
    lines = pictures.wrapped("a bowl of ramen on a wooden table, close up, with a very long tail of other words that nobody reads", font, 96)
    assert len(lines) == pictures.LINES and lines[-1].endswith("...") and all(font.getlength(line) <= 96 for line in lines[:-1])
    assert pictures.wrapped("", font, 96) == [] and pictures.wrapped("a seven", font, 96) == ["a seven"]


@pytest.mark.parametrize("prompts", [[], ["a handwritten two", "a handwritten nine"]])
def test_files_carry_their_settings_and_there_is_one_before_the_first_step(tmp_path, monkeypatch, prompts):
    drawn, real = [], pictures.labelled_grid
    monkeypatch.setattr(pictures, "labelled_grid", lambda rows, words: (drawn.append((rows, words)), real(rows, words))[1])
    recipe = tiny.short(tmp_path, "validate.every=48", f"validate.prompts={prompts}", "validate.steps=[2, 4, 8]", "validate.teacher_steps=4",
                        "validate.guidance_scale=1.5")
    with watch.leaving_after(1):
        assert run.train(recipe, tmp_path / "run") == loop.LEFT_EARLY
    folder = tmp_path / "run" / "validation"
    assert [p.name for p in folder.iterdir()] == ["000000000-untrained.png"]
    assert run.train(recipe, tmp_path / "run") == 0  # a resumed stage does not begin again
    assert sorted(p.name for p in folder.iterdir()) == ["000000000-untrained.png", "000000048.png"] and len(drawn) == 2
    before, after = (read_note(folder / name) for name in ("000000000-untrained.png", "000000048.png"))
    words = prompts or [digits.captions(int(digits.images()[1][0]))[0]]
    assert before["prompts"] == after["prompts"] == words == drawn[0][1]
    assert before["rows"] == ["teacher, 4 steps", "untrained student, 4 steps", "untrained student, 8 steps"]
    assert after["rows"] == ["teacher, 4 steps", "student, 4 steps", "student, 8 steps"]
    assert (before["weights"], after["weights"], before["samples"], after["samples"]) == ("untrained", "EMA", 0, 48)
    assert after["stage"] == 1 and after["guidance_scale"] == 1.5 and after["windows"] == [1.0, 0.75, 0.5, 0.25, 0.0] and after["recipe"] == "tiny"
    # An untrained ddim_eps student is the teacher's own DDIM.
    torch.testing.assert_close(drawn[0][0][1][1], drawn[0][0][0][1], atol=2e-2, rtol=0)
    with Image.open(folder / "000000048.png") as picture:
        assert picture.size[0] > 96 * len(words)
    assert validation.counted(1) == "1 step"
