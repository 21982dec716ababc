"""Silence for notes of libraries that the user did not ask about; their errors and everything of ours stay.

Nothing heavy is imported at the top, so that `reflow --help` needs neither torch nor transformers. What the user set
in the environment is left alone.
"""

from __future__ import annotations

import logging
import os
import warnings

LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "diffusers",
    "huggingface_hub",
    "peft",
    "tensorboard",
    "torch",
    "transformers",
    "xformers",
)
# diffusers and transformers take their level from the environment.
LOGGERS = ("bitsandbytes", "torch.distributed", "torch.utils.cpp_extension", "torch.utils.flop_counter", "xformers")


def quiet_name_clash() -> None:
    """Drop the one line of bitsandbytes that comes of our folder kernels/, which it takes for the client of that name where the checkout
    is the working directory or on PYTHONPATH. It asks for that client at import, for a 4-bit product that reflow never uses.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_no_clash)


def _no_clash(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward from kernels-community")


def quiet_libraries() -> None:
    """Drop notes about optional packages, hub clients and pending deprecations. Call before the libraries are imported;
    imports nothing itself.
    """
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        for name in LIBRARIES:
            warnings.filterwarnings("ignore", category=category, module=rf"{name}(\..*)?$")
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_imports() -> None:
    """Call right before diffusers, transformers or accelerate are imported for loading a model; imports transformers.

    No line about the PIL fallback of image processors, no bar for each part's "Loading weights"; the bars of downloads
    stay. A TRANSFORMERS_VERBOSITY that the user set is left alone.
    """
    import torch

    if not torch.cuda.is_available():
        # DeepSpeed, which accelerate may import, would look for an accelerator and warn that it found none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if os.environ.get("TRANSFORMERS_VERBOSITY", "error") != "error":
        return
    import transformers
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars

    downloads_shown = not are_progress_bars_disabled()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if downloads_shown:
        enable_progress_bars()
