"""Silence for warnings of libraries that the user did not ask for. Call before diffusers, transformers or bitsandbytes are imported."""

from __future__ import annotations

import logging
import os
import warnings

import torch


def quiet_libraries() -> None:
    """Keep our own messages and errors; drop import-time notes about optional packages, hub clients and pending deprecations."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        # DeepSpeed, which accelerate imports too, would look for an accelerator and warn that it found none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        for module in (r"torch\..*", r"diffusers\..*", r"transformers\..*", r"deepspeed\..*", r"bitsandbytes\..*", r"xformers\..*",
                       r"huggingface_hub\..*", r"tensorboard\..*"):
            warnings.filterwarnings("ignore", category=category, module=module)
    for name in ("transformers", "diffusers", "xformers", "bitsandbytes", "torch.distributed", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
