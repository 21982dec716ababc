"""A training of one process can be reached by nobody, and the ranks of one machine by nobody else's."""

import os
import pathlib
import subprocess
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "soak"))

import nursery

from reflow.ranks import free_port
from reflow.training import meeting

PROBE = """
import psutil, torch
import torch.distributed as dist
from reflow.training import engine
device = engine.init_distributed()
total = torch.ones(2, device=device)
dist.all_reduce(total)
dist.barrier()
network = engine.Engine(torch.nn.Linear(4, 4), __import__("reflow.recipes.sections", fromlist=["Train"]).Train(batch_size=2, micro_batch=2), 1)
network.backward(network(torch.ones(2, 4, device=device)).sum())
network.step(1e-3)
heard = sorted({c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN"})
print("LISTENS", *heard)
"""


def test_one_process_listens_on_loopback_at_most():
    given = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=given, timeout=120)
    heard = next(line for line in done.stdout.splitlines() if line.startswith("LISTENS")).split()[1:]
    assert set(heard) <= {"127.0.0.1", "::1"}, heard


def meet(rank, port, out):
    """A rank of two, as a launcher on this machine starts it: what it then listens on, and a sum over both."""
    import psutil
    import torch
    import torch.distributed as dist

    from reflow.training import engine

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    total = torch.ones(1, device=engine.init_distributed())
    dist.all_reduce(total)
    heard = sorted({c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN"})
    pathlib.Path(out).write_text(f"{int(total)} {' '.join(heard)}")
    dist.barrier()
    os._exit(0)


def test_ranks_of_one_machine_listen_on_loopback_alone(tmp_path):
    nursery.ready()
    port, places = free_port(), [tmp_path / "0", tmp_path / "1"]
    children = [nursery.CONTEXT.Process(target=meet, args=(rank, port, str(place))) for rank, place in enumerate(places)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    assert [place.read_text() for place in places] == ["2 127.0.0.1"] * 2


@pytest.mark.parametrize(("address", "agent", "ours"), [
    ("127.0.0.1", "", True), ("localhost", "", True), ("127.3.2.1", "", True), ("::1", "", True), ("node1", "", False), ("10.0.0.1", "", False),
    ("127.0.0.1", "True", False),
])  # fmt: skip
def test_ranks_meet_on_loopback_where_the_launcher_says_so(monkeypatch, address, agent, ours):
    """Several machines, and torchrun's own agent, keep torch's store."""
    for name, value in {"MASTER_ADDR": address, "TORCHELASTIC_USE_AGENT_STORE": agent, "MASTER_PORT": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meeting.dist, "TCPStore", lambda host, *_, **__: host)
    assert meeting.store(None) == ("127.0.0.1" if ours else None)


COMMANDS = """
import os, pathlib, socket, sys, tempfile

LOOPBACK = {"127.0.0.1", "::1", "localhost"}
reached = []

def watch(event, args):
    if event in ("socket.connect", "socket.bind", "socket.sendto"):
        place = args[1][0] if isinstance(args[1], tuple) else "localhost"  # a path is a socket of this machine
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        place = args[0]
    else:
        return
    if place not in LOOPBACK:
        frame = sys._getframe(1)
        reached.append(f"{event} {place!r} at {frame.f_code.co_filename}:{frame.f_lineno}")

sys.addaudithook(watch)
try:
    socket.getaddrinfo("hub.invalid", 443)
except OSError:
    pass
assert len(reached) == 1, "the watch sees nothing"
reached.clear()

from reflow import cli
from reflow.evaluation import suite

suite.TIMING_BATCH, suite.TIMING_ROUNDS, suite.PATH_STEPS = 4, 1, 8  # how long an image takes is not asked here

class Left(Exception): pass
def leave(code): raise Left(code)
cli.leave = leave
os.chdir(tempfile.mkdtemp())
small = ["--set", "train.batch_size=4", "--set", "train.micro_batch=4", "--set", "train.warmup=0", "--set", "validate.images=1", "--set", "validate.pairs=1",
         "--set", "validate.every=4", "--set", "stages.0.samples=4", "--set", "stages.1.samples=4", "--set", "stages.2.samples=4",
         *(word for i in range(3) for word in ("--set", f"stages.{i}.pairs=8"))]
for words in (
    ["recipe", "digits"],
    ["train", "--recipe", "digits-quick", "--dry-run"],
    ["train", "--recipe", "digits-quick", "--run-dir", "run", *small],
    ["sample", "--run-dir", "run", "--prompt", "a seven", "--out", "images"],
    ["export", "--run-dir", "run", "--out", "student"],
    ["export", "--run-dir", "run", "--format", "delta", "--out", "delta.safetensors"],
    ["merge", "--base", "builtin", "--delta", "delta.safetensors", "--out", "merged"],
    ["sample", "--model", "student", "--prompt", "a seven", "--out", "more"],
    ["evaluate", "--run-dir", "run", "--samples", "60", "--seeds", "1"],
    ["env"],
):
    try:
        cli.main(words)
    except Left as left:
        assert left.args[0] == 0, words
print("REACHED", reached)
"""


def test_no_command_looks_beyond_this_machine():
    """Nothing here names a hub id, so nothing asks a name server, connects or listens beyond loopback, though the hub is not switched off."""
    off = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    given = {key: value for key, value in os.environ.items() if key not in off}
    done = subprocess.run([sys.executable, "-c", COMMANDS], capture_output=True, text=True, env=given, timeout=300)
    assert "REACHED []" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
