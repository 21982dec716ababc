"""Waiting for other ranks, and joining and leaving them: what NCCL asks for is given, and gloo sees none of it."""

import atexit
import pathlib
import socket

import pytest
import torch
import torch.distributed as dist

from reflow import ranks
from reflow.training import engine

REFLOW = pathlib.Path(ranks.__file__).parent


@pytest.mark.parametrize("backend, told", [("nccl", [3]), ("gloo", None)])
def test_a_barrier_names_the_device_where_nccl_would_guess_it(monkeypatch, backend, told):
    said = []
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(dist, "barrier", lambda **options: said.append(options))
    ranks.barrier()
    assert said == [{"device_ids": told}]


def test_all_of_reflow_waits_in_one_way():
    users = [path.relative_to(REFLOW).as_posix() for path in REFLOW.rglob("*.py") if "dist.barrier(" in path.read_text()]
    assert users == ["ranks.py"]


def test_a_group_on_a_gpu_is_used_once_at_its_start_and_left_at_the_end(monkeypatch):
    device, done = engine.init_distributed(), []
    monkeypatch.setattr(atexit, "register", done.append)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: done.append(tensor.device.type))
    engine.settle(device)
    assert done == [device.type, engine.leave_group]
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("left"))
    engine.leave_group()
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    engine.leave_group()
    assert done[2:] == ["left"]


def test_a_free_port_is_none_that_the_system_lends_and_none_that_is_taken(monkeypatch):
    assert all(20_000 <= ranks.free_port() < 32_768 for _ in range(50))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ranks.free_port()))
        taken.listen()
        drawn = iter([taken.getsockname()[1], taken.getsockname()[1], 20_001, 20_002, 20_003])
        monkeypatch.setattr(ranks.random.SystemRandom, "randrange", lambda *_: next(drawn))
        assert ranks.free_port() in (20_001, 20_002, 20_003)
