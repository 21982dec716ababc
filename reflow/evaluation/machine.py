"""What numbers were measured on: processor, memory, system, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from reflow.errors import UserError

PACKAGES = ("reflow", "torch", "diffusers", "transformers", "deepspeed", "triton", "numpy", "scikit-learn")


def describe() -> dict[str, Any]:
    """Machine and versions, ready for JSON. Packages that are not installed are left out."""
    machine: dict[str, Any] = {
        "processor": processor(),
        "cores": cores(),
        "memory_gib": memory(),
        "system": f"{platform.system()} {platform.release()}",
    }
    if torch.cuda.is_available():
        machine["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version_of(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"machine": machine, "versions": versions}


def usable(device: str) -> str:
    """The device as `--device` names it. Raises UserError for one that PyTorch cannot use here."""
    try:
        place = torch.device(device)
    except RuntimeError:
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device} is neither cpu nor cuda; write one of them or leave it out.")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device {device} needs a GPU that PyTorch can use, and there is none; write cpu or leave it out."
        )
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {device} is not there: PyTorch can use {torch.cuda.device_count()} GPUs, counted from 0; write cuda."
        )
    return device


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def memory() -> float | None:
    """Gibibytes of memory, None where the system does not tell."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def version_of(name: str) -> str:
    """Of an installed package; of torch with its build, which a wheel from the package index leaves out of its metadata.

    Raises importlib.metadata.PackageNotFoundError.
    """
    return torch.__version__ if name == "torch" else importlib.metadata.version(name)
