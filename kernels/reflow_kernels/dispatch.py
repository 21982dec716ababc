"""Which backend runs an op, and why.

``backend`` is "auto", "triton" or "torch". The order of precedence is the environment variable
REFLOW_KERNELS_BACKEND, the op's own argument, then :func:`configure`. "auto" takes Triton on a GPU and PyTorch
elsewhere. The choice and its reason are logged once; a fallback on a GPU is a warning, and an error under ``strict``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType
from typing import Any

import torch

logger = logging.getLogger("reflow_kernels")

BACKENDS = ("auto", "triton", "torch")
ENVIRONMENT = "REFLOW_KERNELS_BACKEND"
OPS = ("aligned_v_loss", "guided_step", "window_chord", "cfg_combine", "fused_adamw", "fused_adamw8bit")
MINIMUM_CAPABILITY = (7, 0)

_said: set[tuple[str, ...]] = set()
_settings: tuple[str, bool] = ("auto", False)  # backend and strictness of calls that name none


def configure(*, backend: str | None = None, strict: bool | None = None) -> None:
    """Set the process-wide backend and strictness that ops use when they are called without their own."""
    global _settings
    _settings = (
        _settings[0] if backend is None else _checked(backend, "backend"),
        _settings[1] if strict is None else bool(strict),
    )


def settings() -> tuple[str, bool]:
    """The process-wide (backend, strict)."""
    return _settings


def is_strict(strict: bool) -> bool:
    return strict or _settings[1]


def select(op: str, device: torch.device, backend: str = "auto", strict: bool = False) -> str:
    """ "triton" or "torch" for this call. Raises RuntimeError where the asked backend cannot run."""
    asked, source = _asked(backend)
    chosen, reason, fallback = _resolve(asked, source, device.type, device.index)
    if fallback and is_strict(strict):
        raise RuntimeError(f"{op} cannot use Triton on {device}: {reason}. Install what is missing, or drop strict.")
    say_once(logging.WARNING if fallback else logging.INFO, f"{op} uses the {chosen} backend: {reason}")
    return chosen


def watched() -> bool:
    """Whether a mode, a trace or a transform wants to see the ops, which only torch.library's dispatcher shows it."""
    return _tracing() or bool(_modes()) or _transform() is not None


def eager_on_cpu(*tensors: torch.Tensor) -> bool:
    """Whether these are plain tensors on the CPU whose values may be asked for without waiting and without a trace."""
    if torch.compiler.is_compiling() or watched():
        return False
    return all(type(tensor) in PLAIN and tensor.device.type == "cpu" for tensor in tensors)


def runs_directly(op: str, backend: str, strict: bool, leading: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether a call may run without torch.library's dispatcher, which takes the CPU longer than a kernel's launch and,
    on a small batch, than the reference's arithmetic: plain tensors in eager mode, on a GPU with Triton or on a CPU,
    and no mode or transform that wants to see the op.
    """
    if torch.compiler.is_compiling() or watched():
        return False
    # The dispatcher writes out a view that stands for its negative, as the imaginary part of a conjugate does.
    if any(type(value) not in PLAIN or value.is_neg() for value in (leading, *others) if value is not None):
        return False
    return select(op, leading.device, backend, strict) == "triton" or leading.device.type == "cpu"


PLAIN = (torch.Tensor, torch.nn.Parameter)
# Where a version of PyTorch lacks one of these, every call takes the dispatcher.
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_transform = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: True)
_tracing = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]  # public, untyped


def triton_module(name: str) -> ModuleType:
    """The module that holds an op's kernels, imported at the first use so that Triton stays optional."""
    return importlib.import_module(f"{__package__}.{name}_kernels")


def backend_report(device: torch.device | str | None = None) -> list[tuple[str, str, str]]:
    """(op, backend, reason) for every op on ``device`` (default: the GPU if there is one, else the CPU)."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        asked, source = _asked("auto")
        backend, reason, _ = _resolve(asked, source, device.type, device.index)
    except (RuntimeError, ValueError) as error:
        backend, reason = "none", str(error)
    return [(op, backend, reason) for op in OPS]


def say_once(level: int, message: str) -> None:
    """Log a message the first time it is said in this process."""
    key = (str(level), message)
    if key not in _said:
        _said.add(key)
        logger.log(level, message)


# CPython keeps the variables in a dictionary; os.environ.get of a name that is not set raises twice on the way.
_variables: Any = getattr(os.environ, "_data", os.environ)
_variable: Any = os.environ.encodekey(ENVIRONMENT) if _variables is not os.environ else ENVIRONMENT


def override() -> object:
    """What the environment asks for now, as it is stored there; None where it asks for nothing."""
    return _variables.get(_variable)


def _asked(backend: str) -> tuple[str, str]:
    """The backend somebody asked for, and who asked."""
    wanted = os.environ.get(ENVIRONMENT, "")
    if wanted:
        return _checked(wanted, ENVIRONMENT), ENVIRONMENT
    if _checked(backend, "backend") != "auto":
        return backend, "the backend argument"
    return _settings[0], "reflow_kernels.configure"


def _checked(backend: str, name: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{name} is {backend!r}; expected one of 'auto', 'triton', 'torch'.")
    return backend


@functools.cache
def _resolve(asked: str, source: str, device_type: str, index: int | None) -> tuple[str, str, bool]:
    """(backend, reason, is this a fallback from what the device could do)."""
    if asked == "torch":
        return "torch", f"{source} asks for it", False
    obstacle = _obstacle(device_type, index)
    if asked == "triton":
        if obstacle is not None:
            raise RuntimeError(f"{source} asks for the triton backend, but {obstacle}. Use 'auto' or 'torch' instead.")
        return "triton", f"{source} asks for it", False
    if device_type == "cuda":
        if obstacle is None:
            return "triton", "the tensors are on a GPU", False
        return "torch", obstacle, True
    return "torch", f"the tensors are on the device type {device_type!r}", False


def _obstacle(device_type: str, index: int | None) -> str | None:
    """Why Triton cannot run on this device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cpu":
        return None if interpreting() else "the tensors are on the CPU and TRITON_INTERPRET=1 is not set"
    if device_type != "cuda":
        return f"the tensors are on the device type {device_type!r}, which these kernels do not run on"
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < MINIMUM_CAPABILITY:
        return f"compute capability {torch.cuda.get_device_capability(index)} is below {MINIMUM_CAPABILITY}"
    return None


def interpreting() -> bool:
    """True where Triton's CPU interpreter was asked for; it must be so before triton is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
