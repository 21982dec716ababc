"""Ranks that do not do the same, cannot meet, are stopped or are gone: all end with the cause, and a slow one is waited for."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch.distributed as dist

import tiny
from reflow import ranks
from reflow.errors import UserError
from reflow.training import beat, engine, pulse

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "soak"))

import nursery


@pytest.mark.parametrize("name", ["the recipe", "the data", "the base's weights", "the code of reflow", "torch"])
def test_a_rank_that_does_something_else_is_refused_by_name(monkeypatch, name):
    told = {"the recipe": "a", "the data": "b", "the base's weights": "c", "the code of reflow": "d", "torch": "e"}
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)

    def gather(out, mine):
        out[:] = [mine, ("node1", dict(told)), ("node2", {**told, name: "x"})]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(UserError, match=rf"Rank 2 on node2 does not train what rank 0 .*\({name}: x there, {told[name]} on rank 0\)"):
        ranks.need_equal(told)
    monkeypatch.setattr(dist, "all_gather_object", lambda out, mine: out.__setitem__(slice(None), [mine, ("b", told), ("c", told)]))
    ranks.need_equal(told)


def test_a_port_that_is_taken_is_a_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        code = "from reflow.training import engine; engine.init_distributed()"
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | group, capture_output=True, text=True, timeout=120)
    assert "UserError: Rank 0 cannot meet the others at 127.0.0.1:" in done.stderr and "another process listens on that port" in done.stderr


def test_the_beat_tells_of_a_process_that_is_stopped_and_of_one_that_is_gone(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    assert beat.state_of(process.pid) == "runs"
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    assert beat.state_of(process.pid) == "stopped"
    process.kill()
    process.wait()
    assert beat.state_of(process.pid) == "gone"


def two_ranks(folder, disturb):
    """A training on two ranks, with `disturb(pid of rank 1)` once it trains; what rank 0 does then."""
    recipe = folder / "tiny.toml"
    recipe.write_text(tiny.TINY)
    run_dir, sets = folder / "run", ("stages.0.samples=640", "stages.1.samples=16", "checkpoint.every=160", "log.every=16", "validate.every=0",
                                     "train.rank_patience=4")
    words = ["train", "--recipe", str(recipe), "--run-dir", str(run_dir), *(w for s in sets for w in ("--set", s))]
    done = []
    worker = threading.Thread(target=lambda: done.append(nursery.run(words, folder, ranks=2)))
    worker.start()
    while not (run_dir / "checkpoints" / "latest").exists():
        assert worker.is_alive(), done
        time.sleep(0.05)
    process = json.loads((run_dir / pulse.FOLDER / "1").read_text())["process"]
    disturb(process, run_dir)
    worker.join(120)
    assert done, "the ranks wait for each other"
    return done[0], run_dir


def test_a_stopped_rank_ends_the_others_with_its_name(tmp_path):
    ended, run_dir = two_ranks(tmp_path, lambda process, _: os.kill(process, signal.SIGSTOP))
    assert ended.codes[0] == 1 and "reflow: rank 1 (process " in ended.said and "is stopped (by a signal" in ended.said, ended.said[-500:]
    assert (run_dir / "checkpoints" / "latest").exists() and not list((run_dir / "stage-1").glob("*.safetensors"))


@pytest.mark.slow
def test_a_slow_rank_is_waited_for(tmp_path):
    def slow(process, _):
        """Stopped for less than the patience, again and again: a rank at a fraction of its speed."""
        for _ in range(3):
            for number in (signal.SIGSTOP, signal.SIGCONT):
                if psutil.pid_exists(process):
                    os.kill(process, number)
                    time.sleep(1)

    ended, run_dir = two_ranks(tmp_path, slow)
    assert set(ended.codes) == {0}, ended.said[-500:]
    assert not (run_dir / pulse.FOLDER).exists()


def test_one_rank_watches_nobody(tmp_path):
    engine.init_distributed()
    with pulse.Pulse(tmp_path, 45) as alone:
        assert alone.beat is None
    assert not list(tmp_path.iterdir())
