"""Small pipelines shared by the tests of this room."""

import argparse
import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import tiny_pipelines


@pytest.fixture(scope="session")
def sd15():
    return tiny_pipelines.quiet(tiny_pipelines.sd15())


@pytest.fixture(scope="session")
def sdxl():
    return tiny_pipelines.quiet(tiny_pipelines.sdxl())


@pytest.fixture(scope="session")
def reflow():
    """reflow("merge", "--base", ...): the command's own parser and `run`, in this process. Returns the exit code."""
    from reflow.cli import COMMANDS

    def call(name, *argv):
        module = importlib.import_module(COMMANDS[name][0])
        parser = argparse.ArgumentParser(prog=f"reflow {name}")
        module.arguments(parser)
        return module.run(parser.parse_args([str(word) for word in argv]))

    return call
