"""`reflow env`: what this machine has, and which backend every fused op would use here and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "peft", "datasets")
# Packages that something works without, and what needs them.
OPTIONAL = {
    "triton": "fused ops on a GPU",
    "deepspeed": "training",
    "bitsandbytes": "the 8-bit optimizers",
    "xformers": "attention kernels, optional",
    "wandb": "log.wandb",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(args: argparse.Namespace) -> int:
    import torch

    import reflow
    from reflow.evaluation.machine import version_of
    from reflow_kernels import backend_report

    print(f"reflow {reflow.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in (*PACKAGES, *OPTIONAL):
        try:
            print(f"  {name:14} {version_of(name)}")
        except importlib.metadata.PackageNotFoundError:
            need = f" ({OPTIONAL[name]}: pip install {name})" if name in OPTIONAL else f": pip install {name}"
            print(f"  {name:14} not installed{need}")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        print(f"GPU {i}: {gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}, {toolkit}")
    if not torch.cuda.device_count():
        print(f"no GPU that PyTorch can use; {torch.get_num_threads()} CPU threads")
    print("fused ops:")
    for op, backend, reason in backend_report():
        print(f"  {op:14} {backend:7} {reason}")
    return 0
