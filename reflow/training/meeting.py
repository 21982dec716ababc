"""Where the ranks of a run meet: on loopback where all are on this machine, so that nobody else can speak to them."""

from __future__ import annotations

import ipaddress
import os
import socket
from datetime import timedelta

import torch.distributed as dist


def on_loopback() -> bool:
    """Whether the launcher's address is this machine's own; a name other than localhost is not looked up."""
    address = os.environ.get("MASTER_ADDR", "")
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def store(patience: timedelta) -> dist.Store | None:
    """What the ranks of this machine meet at; None where torch's own is to be used: on several machines, or under torchrun, which has one.

    torch's listens on every interface and takes commands from anyone. Raises OSError where the port is taken, RuntimeError where rank 0 is
    not there within `patience`.
    """
    if not on_loopback() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    port, first = int(os.environ["MASTER_PORT"]), os.environ["RANK"] == "0"
    heard = socket.create_server(("127.0.0.1", port), backlog=1024).detach() if first else None
    return dist.TCPStore("127.0.0.1", port, int(os.environ["WORLD_SIZE"]), first, patience, master_listen_fd=heard)


def reason(error: Exception) -> str:
    """Why the ranks could not meet, as a sentence."""
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
    cure = ("another process listens on that port; give the launcher another one (deepspeed --master_port 29501 ...)" if "EADDRINUSE" in why or
            "in use" in why else "start all ranks with the same address and port, which each of them can reach (deepspeed --master_addr, --master_port)")
    return f"Rank {os.environ.get('RANK')} cannot meet the others at {place}: {cure}. What the system says: {why}"
