"""The wheel that an offline build makes: its metadata and the files that are no code."""

import email
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('out'))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built in a copy, since setuptools writes beside what it reads."""
    place = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    for name in ("reflow", "kernels"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(place / "out" / done.stdout.split()[-1]) as archive:
        yield archive


def test_metadata_say_what_it_is_and_nothing_that_is_not_so(wheel):
    name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    told = email.message_from_bytes(wheel.read(name))
    assert told["License-Expression"] == "Apache-2.0" and told["License-File"] == "LICENSE"
    classifiers = told.get_all("Classifier")
    # Beside a licence expression a licence classifier is an error of the index; the least version is that of requires-python.
    assert not any(c.startswith("License ::") for c in classifiers) and told["Requires-Python"] == ">=3.11"
    assert "Programming Language :: Python :: 3.11" in classifiers and "diffusion" in told["Keywords"]
    assert told.get_all("Project-URL") is None  # there is no public address
    assert told["Description-Content-Type"] == "text/markdown" and told.get_payload().startswith("# reflow")


def test_files_that_are_no_code_are_in_it(wheel):
    names = set(wheel.namelist())
    recipes = {f"reflow/recipes/{path.name}" for path in (ROOT / "reflow" / "recipes").iterdir() if path.suffix in (".toml", ".md")}
    assert recipes <= names and "reflow/recipes/KEYS.md" in names and "reflow_kernels/__init__.py" in names
    assert any(name.startswith("reflow/models/weights/") and name.endswith(".safetensors") for name in names)
    assert not any(name.startswith(("kernels/", "tests/", "bench/")) for name in names)
