"""What a file of weights must be before anything is made of it: whole, of plain floating-point tensors, and finite.

Everything that opens a .safetensors file of a model goes through `opened`, so that no header is believed before it is looked at.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from reflow.errors import UserError, short
from reflow.quiet import quiet_imports
from reflow.weights import sums

HEADER = 2**25  # bytes; the largest models' headers and the longest lists of training tags take a tenth
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
AGAIN = "Write or download it again."
REMEDY = "Download or export the folder again, or point the recipe at a complete one."
PICKLES = "REFLOW_PICKLES"
CONVERT = (
    "Pickles can run code when they are read; convert weights that you trust with diffusers' "
    "UNet2DConditionModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
)
# What torch says of a pickle that asks for more than tensors; its first lines advise to run the code.
ASKS = re.compile(r"Unsupported \w+: (?:GLOBAL )?([^\n]+?) was not an allowed")


def reason_of(error: BaseException) -> str:
    """Why a reader of weights gave up, on one line, without any advice to run what a pickle holds."""
    text = str(error).strip()
    found = ASKS.search(text)
    if found:
        return f"it asks for {short(found[1])}"
    if "weights_only" in text or "Weights only" in text:
        return "it holds more than tensors"
    return short(text.splitlines()[0].rstrip(".")) if text else type(error).__name__


@contextlib.contextmanager
def opened(file: str | Path, remedy: str = AGAIN) -> Iterator[Any]:
    """A .safetensors file, open for reading. Raises UserError with `remedy` where it is missing, damaged or has too large a header, and
    where reading it fails inside the `with`."""
    try:
        with open(file, "rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
        if size > HEADER:
            raise ValueError(f"it names a header of {size:,} bytes, and none has more than {HEADER:,}")
        with safe_open(str(file), framework="pt") as reader:
            yield reader
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{file} is missing. {remedy}") from error
        reason = error.strerror if isinstance(error, OSError) and error.strerror else reason_of(error)
        raise UserError(f"{file} is damaged or cut short ({reason}). {remedy}") from error


def load(file: str | Path, remedy: str = AGAIN) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, mapped from the disk; text metadata) of a .safetensors file. Raises UserError as `opened` does, and where checksums that
    the file brings are not those of its tensors."""
    with opened(file, remedy) as reader:
        sums.verify(Path(file))
        return {key: reader.get_tensor(key) for key in reader.keys()}, dict(reader.metadata() or {})


def on_meta(make: Callable[[], torch.nn.Module], file: str | Path) -> torch.nn.Module:
    """The network that `make` builds of a config, without memory for its weights. Raises UserError where the libraries cannot build it."""
    quiet_imports()
    try:
        with torch.device("meta"):
            return make()
    except Exception as error:
        raise UserError(f"{file} describes no network that can be built ({reason_of(error)}). {REMEDY}") from error


def need_weights(tensors: Iterable[tuple[str, torch.Tensor]], place: str) -> None:
    """Raises UserError where a tensor of a network's weights is no plain floating-point one, or not finite."""
    named = list(tensors)
    for name, tensor in named:
        if tensor.dtype not in FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{place}: {short(name)} is stored as {kind}, and weights are read in fp16, bf16 or fp32. Give an unquantised file.")
    need_finite(named, place)


def need_finite(tensors: Iterable[tuple[str, torch.Tensor]], place: str) -> None:
    """Raises UserError that counts the named floating-point tensors with a NaN or an infinity; one pass, no copies."""
    bad = []
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta and not torch.isfinite(torch.stack(tensor.detach().aminmax())).all():
            bad.append(name)
    if bad:
        raise UserError(
            f"{len(bad)} tensors of {place} are not finite, the first is {short(bad[0])}: its weights are damaged, or were cast to fp16 beyond "
            f"its range. {REMEDY}"
        )


def pickles_allowed() -> bool:
    """Whether the user asked for pickles to be read (with torch's weights_only reader) by REFLOW_PICKLES=1."""
    return os.environ.get(PICKLES) == "1"
