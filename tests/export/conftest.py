"""Small pipelines shared by the tests of this room."""

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
