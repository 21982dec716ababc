"""Four of the soak's kills (eight with the long tests), at another place in each kind of work; `scripts/soak.sh kills` tries a hundred."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "soak"))

import kills


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 6, 12])
def test_a_killed_command_goes_on_to_the_same_end(tmp_path, index):
    result = kills.trial(index, tmp_path)
    assert result["failed"] is None, result
    if not result["kind"].endswith("at a time"):  # which may be later than the end, on a machine that has just become faster
        assert result["kills"] == (2 if result["kind"].startswith("train") else 1), result
