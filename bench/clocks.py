"""The GPU's SM clock while peers run: through torch (pynvml) where that is installed, else the driver's own library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

_SM = 1  # NVML_CLOCK_SM


def reader(device: torch.device | str) -> tuple[Callable[[], float | None], str]:
    """(read, where from): ``read()`` is the SM clock in MHz, or None; "unreadable: why" where it cannot be read."""
    device = torch.device(device)
    if device.type != "cuda":
        return lambda: None, "unreadable: no GPU"
    reasons = []
    for name, make in (("torch.cuda.clock_rate", _from_torch), ("nvml", _from_nvml)):
        try:
            read = make(device)
            if read() > 0:
                return read, name
            reasons.append(f"{name}: 0 MHz")
        except Exception as error:  # noqa: BLE001 - drivers and containers fail in many ways; the row says which
            reasons.append(f"{name}: {type(error).__name__} {error}".strip()[:120])
    return lambda: None, "unreadable: " + "; ".join(reasons)


def _from_torch(device: torch.device) -> Callable[[], float]:
    return lambda: float(torch.cuda.clock_rate(device))


def _from_nvml(device: torch.device) -> Callable[[], float]:
    library = ctypes.CDLL("libnvidia-ml.so.1")
    handle, clock = ctypes.c_void_p(), ctypes.c_uint()

    def call(name: str, *arguments) -> None:
        code = getattr(library, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} returned {code}")

    call("nvmlInit_v2")
    # By UUID, since CUDA_VISIBLE_DEVICES renumbers devices for torch alone.
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    uuid = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(handle))

    def read() -> float:
        call("nvmlDeviceGetClockInfo", handle, ctypes.c_int(_SM), ctypes.byref(clock))
        return float(clock.value)

    return read
