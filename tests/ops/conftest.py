"""The kernels run through Triton's interpreter on a CPU, and natively on a GPU (REFLOW_TEST_DEVICE=cuda)."""

import contextlib
import os
import sys
from pathlib import Path

if os.environ.get("REFLOW_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported; "auto" stays PyTorch on CPU tensors
os.environ.pop("REFLOW_KERNELS_BACKEND", None)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import pytest
import torch


def hasten_interpreter():
    """Spare the interpreter a second look at a module it has patched already (5 ms a device function call)."""
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_once(fn):
        modules = [value for value in fn.__globals__.values() if value is language or value is language.core]
        if modules and not any(language.core.is_builtin(module.load) for module in modules):
            return interpreter._LangPatchScope()
        return patch(fn)

    interpreter._patch_lang = patch_once


if os.environ.get("TRITON_INTERPRET") == "1":
    with contextlib.suppress(ImportError, AttributeError):  # another version's interpreter: slower, nothing else
        hasten_interpreter()


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Uninitialised memory is NaN: an element that a kernel forgot to write fails the test that looks at it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def no_plans():
    """No plan of another test, which may have been made under other settings."""
    from reflow_kernels import plans

    plans.forget()
    yield
    plans.forget()
