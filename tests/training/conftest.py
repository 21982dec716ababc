"""Training tests: the launcher, and one process group of one rank for everything that runs in the test process."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from reflow.ranks import free_port

sys.path.insert(0, str(pathlib.Path(__file__).parent))

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def launch():
    """launch(script, *args, ranks=2): the deepspeed launcher on this machine, one CPU thread a rank. Returns the finished process."""

    def start(script, *args, ranks=2, **kwargs):
        group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        env = {k: v for k, v in os.environ.items() if k not in group}
        env.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PATH=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
        if torch.cuda.device_count() < ranks:
            env.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
        port = free_port()
        command = [str(pathlib.Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(port),
                   str(script), *map(str, args)]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200, **kwargs)

    return start


@pytest.fixture(scope="session")
def digits_base():
    """The committed digits model in fp32."""
    from reflow.models import registry

    return registry.family("digits").load()


@pytest.fixture(scope="session", autouse=True)
def loaded_once():
    import tiny

    tiny.load_once()
