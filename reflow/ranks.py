"""The ranks of a run: waiting for each other, agreeing on what they train, a port to meet at."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Mapping

import torch
import torch.distributed as dist

from reflow.errors import UserError


def barrier() -> None:
    """Return once every rank is here. NCCL, which waits by a sum on a GPU, is told this rank's own instead of guessing it from the rank."""
    dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def free_port() -> int:
    """A port of this machine that nobody has, below those that systems lend to outgoing connections (from 32768 on): one of these may be
    lent away before a launcher, which takes seconds to start, comes to listen on it."""
    chance = random.SystemRandom()
    while True:
        port = chance.randrange(20_000, 32_768)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def need_equal(told: Mapping[str, str]) -> None:
    """Refuse a run whose ranks do not work on the same. told: by name what must be equal on all of them; every rank calls it.

    Raises UserError on all ranks that names the first one that differs from rank 0, and in what.
    """
    said: list[tuple[str, dict[str, str]] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, (socket.gethostname(), dict(told)))
    (first, wanted), *others = [item for item in said if item is not None]
    for rank, (host, found) in enumerate(others, 1):
        wrong = [f"{name}: {found.get(name, 'none')} there, {value} on rank 0" for name, value in wanted.items() if found.get(name) != value]
        if wrong:
            raise UserError(f"Rank {rank} on {host} does not train what rank 0 on {first} does ({'; '.join(wrong)}). Give every rank the same "
                            f"command, the same version of reflow and the same files, then start again.")
