"""Two nodes of one rank each: the deepspeed launcher's hostfile path, started once a node as where machines cannot ssh to each other."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

import tiny
from reflow.errors import UserError
from reflow.ranks import free_port
from reflow.training import run

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_node_that_does_not_share_the_run_directory_is_named(tmp_path):
    run.engine.init_distributed()
    with pytest.raises(UserError, match=f"Rank 0 on {socket.gethostname()} does not see .*elsewhere.* all nodes share"):
        run.wait_until_shared(tmp_path / "elsewhere", patience=0.0)


@pytest.mark.slow
@pytest.mark.launch
def test_two_nodes_of_a_hostfile_train_one_run(tmp_path):
    tiny.recipe(tmp_path)
    (tmp_path / "hostfile").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    port = free_port()
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in group} | {
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    sets = [a for o in ("stages.0.samples=16", "stages.1.samples=32", "train.zero_stage=2", "checkpoint.every=16", "log.every=16") for a in ("--set", o)]

    def node(rank):
        return subprocess.Popen(
            ["deepspeed", "--hostfile", tmp_path / "hostfile", "--no_ssh", "--node_rank", str(rank), "--master_addr", "127.0.0.1",
             "--master_port", str(port), "scripts/train.py", "--recipe", tmp_path / "tiny.toml", "--run-dir", tmp_path / "run", *sets],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    nodes = [node(0), node(1)]
    said = [n.communicate(timeout=300)[0] for n in nodes]
    assert [n.returncode for n in nodes] == [0, 0], "\n".join(said)
    assert "Finished tiny" in said[0] and "Finished tiny" not in said[1]
    # Each node held half of the optimizer's states, and both halves are in the checkpoint.
    newest = tmp_path / "run" / "checkpoints" / (tmp_path / "run" / "checkpoints" / "latest").read_text()
    assert json.loads((newest / "state.json").read_text())["ranks"] == 2
    sizes = [(newest / f"shard-{rank:05d}.safetensors").stat().st_size for rank in (0, 1)]
    assert min(sizes) > 0.9 * max(sizes)
    records = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    # Every sample of the batch was counted once: each node took its 8 of 16.
    assert [sum(w["samples"] for w in r["windows"]) for r in records if r["event"] == "train"] == [16, 16, 16]
