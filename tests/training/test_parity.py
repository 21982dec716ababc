"""Training with the fused ops is training with the plain ones."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.mark.parametrize("steps", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_so_many_steps_with_triton_and_with_torch_agree(tmp_path, steps):
    pytest.importorskip("triton")
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "REFLOW_KERNELS_BACKEND")
    environment = {k: v for k, v in os.environ.items() if k not in group} | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run([sys.executable, str(HERE / "parity_worker.py"), str(tmp_path), str(steps)], env=environment, capture_output=True, text=True,
                              timeout=500)
    assert (tmp_path / "parity.json").exists(), finished.stderr
    found = json.loads((tmp_path / "parity.json").read_text())
    for triton, control in zip(found["triton"], found["control"], strict=True):
        # Beside what grows from step to step the sums of the loss themselves are rounded otherwise.
        assert 0 < triton < 1e-3 and triton < 10 * control + 2e-5, found
