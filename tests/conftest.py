"""Shared by every room: the device under test and quiet libraries."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny tensors: a second thread only waits, and two busy processes on two cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu" if os.environ.get("REFLOW_TEST_DEVICE", "cpu") == "cpu" else "cuda")
if os.environ.get("REFLOW_TEST_DEVICE", "cpu") == "cpu":
    # diffusers imports triton, and its CPU interpreter must be asked for before that; only tests/ops uses it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device the tests run on: REFLOW_TEST_DEVICE, by default the CPU."""
    return torch.device(os.environ.get("REFLOW_TEST_DEVICE", "cpu"))
