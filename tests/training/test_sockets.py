"""A training of one process can be reached by nobody."""

import os
import subprocess
import sys

PROBE = """
import psutil, torch
import torch.distributed as dist
from reflow.training import engine
device = engine.init_distributed()
total = torch.ones(2, device=device)
dist.all_reduce(total)
dist.barrier()
network = engine.Engine(torch.nn.Linear(4, 4), __import__("reflow.recipes.settings", fromlist=["Train"]).Train(batch_size=2, micro_batch=2), 1)
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
