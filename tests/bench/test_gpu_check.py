"""scripts/gpu_check.sh: it refuses without a GPU, and what it would run is what the benchmarks understand."""

import argparse
import importlib
import os
import pathlib
import shlex
import subprocess
import sys

import pytest
import torch

from bench.__main__ import COMMANDS

ROOT = pathlib.Path(__file__).resolve().parents[2]
PARTS = ("tests", "ops", "step", "tail", "solver", "sample")


def run(*arguments, **environment):
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), *arguments]
    given = {**os.environ, "REFLOW_PYTHON": sys.executable, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=given, timeout=120)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_refuses_without_a_gpu(tmp_path):
    done = run("--part", "ops", OUT=str(tmp_path / "out"))
    assert done.returncode == 2 and done.stderr.strip().endswith("on the CPU.") and "CUDA GPU" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_unknown_part_is_refused():
    done = run("--part", "nothing", "--dry-run")
    assert done.returncode == 2 and done.stderr.startswith("usage:")


def test_every_command_is_understood(tmp_path):
    whole = run("--dry-run", OUT=str(tmp_path)).stdout.splitlines()
    assert len(whole) == 5
    assert sum(seconds_of(line) for line in whole) <= 540
    for part in PARTS:
        lines = run("--part", part, "--dry-run", OUT=str(tmp_path)).stdout.splitlines()
        assert len(lines) == 1 and seconds_of(lines[0]) <= 600
        words = shlex.split(lines[0])
        if part == "tests":
            files = words[words.index("scripts/test.sh") + 1 :]
            assert "REFLOW_TEST_DEVICE=cuda" in words and files and all((ROOT / file).is_dir() for file in files)
            continue
        name, *options = words[words.index("bench") + 1 :]
        parser = argparse.ArgumentParser()
        importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
        parsed = parser.parse_args(options)
        assert name == part and parsed.device == "cuda" and parsed.out == tmp_path
        assert 0 < parsed.budget < seconds_of(lines[0])


def seconds_of(line):
    """The hard limit of a printed command."""
    words = shlex.split(line)
    assert words[0] == "timeout"
    return int(next(word for word in words[1:] if not word.startswith("-")))
