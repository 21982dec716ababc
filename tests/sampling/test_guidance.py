"""Guidance schedules as users write them."""

import pytest

from reflow.errors import UserError
from reflow.sampling import guidance_callback, guidance_scales


@pytest.mark.parametrize(
    "written,steps,scales",
    [
        (7.5, 3, (7.5, 7.5, 7.5)),
        (1, 2, (1.0, 1.0)),
        ([7.5, 4], 4, (7.5, 4, 4, 4)),
        ((7.5, 4, 4, 4), 4, (7.5, 4, 4, 4)),
        ("7.5-4-4-4", 5, (7.5, 4, 4, 4, 4)),
        ("7.5,4", 3, (7.5, 4, 4)),
        (" 2.5, 1.5 ;1 ", 4, (2.5, 1.5, 1, 1)),
        ("4.5", 2, (4.5, 4.5)),
        ("1e1,2", 2, (10, 2)),
    ],
)
def test_schedules(written, steps, scales):
    assert guidance_scales(written, steps) == scales


@pytest.mark.parametrize(
    "written,word",
    [
        ([], "empty"),
        ("", "empty"),
        ("a lot", "cannot be read"),
        ([1, 2, 3], "names 3 values for 2 steps"),
        (-1.0, "negative"),
        (float("nan"), "not finite"),
        ("4,inf", "not finite"),
    ],
)
def test_mistakes(written, word):
    with pytest.raises(UserError, match=word):
        guidance_scales(written, 2)


def test_a_pipeline_cannot_guide_again_after_it_stopped():
    with pytest.raises(UserError, match="put the unguided steps last"):
        guidance_callback("4,1,4", 3)
