"""Quiet libraries: their notes go, what the user asked for and the bars of downloads stay."""

import os
import pathlib
import subprocess
import sys
import warnings

import pytest
import transformers
from huggingface_hub.utils import are_progress_bars_disabled

from reflow.quiet import quiet_imports, quiet_libraries

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def verbosity(monkeypatch):
    """Settings of this process, put back afterwards."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        monkeypatch.delenv(name, raising=False)
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    yield monkeypatch
    transformers.logging.set_verbosity(before)


def test_loading_bars_go_and_download_bars_stay(verbosity):
    transformers.utils.logging.enable_progress_bar()
    quiet_imports()
    assert transformers.logging.get_verbosity() == transformers.logging.ERROR
    assert not transformers.utils.logging.is_progress_bar_enabled() and not are_progress_bars_disabled()


def test_a_verbosity_that_the_user_set_stands(verbosity):
    verbosity.setenv("TRANSFORMERS_VERBOSITY", "info")
    quiet_libraries()
    quiet_imports()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert transformers.logging.get_verbosity() == transformers.logging.WARNING


@pytest.mark.parametrize(
    "module, shown", [("diffusers.utils.x", 0), ("peft", 0), ("reflow.export", 1), ("torchaudio", 1)]
)
def test_warnings_of_libraries_only(module, shown):
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        quiet_libraries()
        warnings.warn_explicit("a note", UserWarning, "file.py", 1, module=module)
    assert len(caught) == shown


# What follows `import bitsandbytes` on a processor with AVX512-BF16, on any other too.
CLASH = """
import logging
import bitsandbytes
log = logging.getLogger("bitsandbytes.backends.cpu.ops")
log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "cannot import name 'get_kernel' from 'kernels'")
log.warning("something else")
"""


@pytest.mark.parametrize("way, where", [("import reflow.sampling", "the checkout"), ("import reflow", "elsewhere")])
def test_no_import_of_ours_brings_the_note_of_the_clashing_name(way, where, tmp_path):
    """With the checkout on PYTHONPATH, from its own folder and from another: kernels/ is then importable as `kernels`."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "DS_ACCELERATOR": "cpu"}
    code = way + CLASH
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT if where == "the checkout" else tmp_path)
    assert done.returncode == 0 and "kernels-community" not in done.stderr and done.stderr.count("something else") == 1


@pytest.mark.launch
def test_nor_does_the_launcher(tmp_path):
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "1", "scripts/train.py", "--recipe", "digts"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)
    assert "There is no recipe called 'digts'" in done.stderr and "kernels-community" not in done.stdout + done.stderr
