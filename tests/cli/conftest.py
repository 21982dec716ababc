"""A run directory of seconds for commands."""

import pathlib
import sys

import pytest

for room in ("training", "helpers"):
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / room))

import tiny


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    """A finished run of the tiny recipe: stages of 4 and 2 windows."""
    from reflow.training import run

    folder = tmp_path_factory.mktemp("cli")
    assert run.train(tiny.recipe(folder), folder / "run") == 0
    return folder / "run"
