"""Commands in this process, and a run directory of seconds to give them."""

import argparse
import importlib
import pathlib
import sys

import pytest

for room in ("training", "helpers"):
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / room))

import tiny

from reflow.cli import COMMANDS


@pytest.fixture(scope="session")
def reflow():
    """reflow("sample", "--model", ...): the command's own parser and `run`, in this process. Returns the exit code."""

    def call(name, *argv):
        module = importlib.import_module(COMMANDS[name][0])
        parser = argparse.ArgumentParser(prog=f"reflow {name}")
        module.arguments(parser)
        return module.run(parser.parse_args([str(word) for word in argv]))

    return call


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    """A finished run of the tiny recipe: stages of 4 and 2 windows."""
    from reflow.training import run

    folder = tmp_path_factory.mktemp("cli")
    assert run.train(tiny.recipe(folder), folder / "run") == 0
    return folder / "run"
