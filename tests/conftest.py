"""Shared by every room: the device under test and quiet libraries."""

import argparse
import importlib
import os
import random

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny tensors: a second thread only waits, and two busy processes on two cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu" if os.environ.get("REFLOW_TEST_DEVICE", "cpu") == "cpu" else "cuda")
if os.environ.get("REFLOW_TEST_DEVICE", "cpu") == "cpu":
    # diffusers imports triton, and its CPU interpreter must be asked for before that; only tests/ops uses it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

# Comparisons are of fp32; cuDNN's own default for fp32 convolutions on a GPU is TF32.
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device the tests run on: REFLOW_TEST_DEVICE, by default the CPU."""
    return torch.device(os.environ.get("REFLOW_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="session")
def reflow():
    """reflow("sample", "--model", ...): the command's own parser and `run`, in this process. Returns the exit code."""
    from reflow.cli import COMMANDS

    def call(name, *argv):
        module = importlib.import_module(COMMANDS[name][0])
        parser = argparse.ArgumentParser(prog=f"reflow {name}")
        module.arguments(parser)
        return module.run(parser.parse_args([str(word) for word in argv]))

    return call


@pytest.fixture(scope="session")
def sd15():
    """A small pipeline of the real class; a test that changes it takes a copy first."""
    return _tiny_pipeline("sd15")


@pytest.fixture(scope="session")
def sdxl():
    """As `sd15`."""
    return _tiny_pipeline("sdxl")


def _tiny_pipeline(name: str):
    tiny_pipelines = importlib.import_module("tiny_pipelines")
    return tiny_pipelines.quiet(getattr(tiny_pipelines, name)())


# Files of a minute and more, longest first: with two workers, what starts last should be short.
LONG = ("training/test_launched.py", "training/test_run.py", "training/test_recipes.py", "training/test_parity.py", "training/test_memory.py",
        "training/test_nodes.py", "bench/test_quick_suite.py", "cli/test_fresh_process.py", "ops/test_ops_aot.py")  # fmt: skip


# On a GPU: what only it can tell, then the kernels and the flow, then the rest; compiling for other GPUs needs none.
ON_A_GPU = ("ops/test_ops_cuda.py", "flow/test_flow_captured.py", "tests/ops/", "tests/flow/", "tests/training/")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", metavar="SEED", type=int, help="run files, and the tests within each, in an order drawn from this number")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.getoption("--shuffle")
    if seed is not None:
        # Whole files: what their tests share is made once in any order.
        files = sorted({item.path for item in items})
        turn = {path: random.Random(f"{seed} {path.name}").random() for path in files}
        chance = random.Random(seed)
        chance.shuffle(items)
        items.sort(key=lambda item: turn[item.path])
        return
    gpu = os.environ.get("REFLOW_TEST_DEVICE") == "cuda"

    def place(item: pytest.Item) -> int:
        path, parts = item.path.as_posix(), ON_A_GPU if gpu else LONG
        if gpu and path.endswith("test_ops_aot.py"):
            return len(parts) + 1
        return next((n for n, name in enumerate(parts) if name in path), len(parts))

    items.sort(key=place)
