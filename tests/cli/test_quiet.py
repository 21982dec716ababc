"""Quiet libraries: their notes go, what the user asked for and the bars of downloads stay."""

import os
import warnings

import pytest
import transformers
from huggingface_hub.utils import are_progress_bars_disabled

from reflow.quiet import quiet_imports, quiet_libraries


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
