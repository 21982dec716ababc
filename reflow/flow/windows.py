"""Windows: the pieces of time inside which a student is straight.

Time runs from t=1 (noise) to t=0 (data); window 0 is the noisiest and t_start > t_end in each. A boundary belongs to
the window that starts there: windows are half-open, (t_end, t_start] (PeRFlow, arXiv 2405.07510, code).
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedule import shifted

MOST = 1000  # windows, as many as train steps that they are made of
# A time this close above a boundary still counts as the boundary (PeRFlow: 0.1 of a train step).
TOLERANCE = 1e-4


@functools.lru_cache(maxsize=256)
def _inner_edges(boundaries: tuple[float, ...], device: torch.device) -> Tensor:
    # Cached per device: building it in each lookup would copy from the host in each training step.
    return torch.tensor(boundaries[1:-1][::-1], dtype=torch.float64).to(device)


@dataclass(frozen=True)
class Windows:
    """K windows given by K+1 descending boundaries, as (1, .75, .5, .25, 0). Raises ValueError for anything else."""

    boundaries: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.boundaries) > MOST + 1:
            raise ValueError(f"{len(self.boundaries) - 1} windows were asked for; there are at most {MOST}.")
        values = tuple(float(value) for value in self.boundaries)
        object.__setattr__(self, "boundaries", values)
        if len(values) < 2:
            raise ValueError(f"Windows need at least two boundaries, from noise to data, not {list(values)}.")
        if not all(math.isfinite(value) and 0.0 <= value <= 1.0 for value in values):
            raise ValueError(f"Window boundaries {list(values)} must lie between 0 (data) and 1 (noise).")
        if any(left - right <= TOLERANCE for left, right in itertools.pairwise(values)):
            raise ValueError(
                f"Window boundaries {list(values)} must descend from noise to data in steps wider than {TOLERANCE}; "
                "write for example (1, .75, .5, .25, 0)."
            )

    @classmethod
    def uniform(cls, count: int, t_noise: float = 1.0, t_clean: float = 0.0) -> Windows:
        """`count` windows of equal width between t_noise and t_clean."""
        if not 1 <= count <= MOST:
            raise ValueError(f"{count} windows were asked for; at least one is needed, and there are at most {MOST}.")
        inner = (t_noise + (t_clean - t_noise) * k / count for k in range(1, count))
        return cls((float(t_noise), *inner, float(t_clean)))

    @classmethod
    def shifted(cls, count: int, shift: float) -> Windows:
        """`count` windows whose boundaries lie evenly before the time shift of a flow: t_k = shifted(1 - k/K)."""
        even = cls.uniform(count).boundaries
        return cls(tuple(shifted(u, shift) for u in even))

    def __len__(self) -> int:
        return len(self.boundaries) - 1

    @property
    def t_start(self) -> tuple[float, ...]:
        """Noisy end of each window."""
        return self.boundaries[:-1]

    @property
    def t_end(self) -> tuple[float, ...]:
        """Clean end of each window."""
        return self.boundaries[1:]

    def merge(self, factor: int = 2) -> Windows:
        """Each `factor` neighbours become one window: 2K -> K by default. Raises ValueError if some are left over."""
        if factor < 1 or len(self) % factor:
            raise ValueError(f"{len(self)} windows cannot be merged by {factor}; the count must be a multiple of it.")
        return Windows(self.boundaries[::factor])

    def lookup(self, t: Tensor) -> Tensor:
        """Window number of each time, any shape, as a LongTensor on the device of t and without a host sync.

        The first window, from noise to data, with t_end < t - 1e-4; times outside all windows get the nearest one.
        """
        query = (t.double() - TOLERANCE).contiguous()
        edges = _inner_edges(self.boundaries, t.device)
        return len(self) - 1 - torch.searchsorted(edges, query)

    def half(self, name: str) -> tuple[int, ...]:
        """Numbers of the windows inside the "noisy" (t in [.5, 1]) or the "clean" (t in [0, .5]) half.

        Raises ValueError if a window reaches across t = .5.
        """
        if name not in ("noisy", "clean"):
            raise ValueError(f'Half "{name}" is not known; write "noisy" (t from 1 to .5) or "clean" (t from .5 to 0).')
        for k, (start, end) in enumerate(zip(self.t_start, self.t_end, strict=True)):
            if start > 0.5 + TOLERANCE and end < 0.5 - TOLERANCE:
                raise ValueError(
                    f"Window {k} runs from {start:g} to {end:g}, across t = 0.5, so it is in neither half; "
                    "use an even number of uniform windows or put a boundary at 0.5."
                )
        noisy = tuple(k for k, end in enumerate(self.t_end) if end >= 0.5 - TOLERANCE)
        return noisy if name == "noisy" else tuple(k for k in range(len(self)) if k not in noisy)


def snap(t: Tensor, grid: int, t_start: Tensor | None = None, t_end: Tensor | None = None) -> Tensor:
    """The next time towards noise on {1/grid, 2/grid, ..., 1}: PeRFlow's t = 1 - floor(U grid)/grid with U = 1 - t.

    t any shape, its dtype is kept. Give the bounds of each time's window (shape of t) to stay in (t_end, t_start]
    whatever the rounding and also where a boundary is off the grid. Take tau again from the snapped time, so that the
    chord point and the network's time agree.
    """
    if grid < 1:
        raise ValueError(f"The time grid has {grid} points; it needs at least one, usually 1000 or 200.")
    # a thousandth of a tick is the rounding of an fp32 time that is on the grid already
    ticks = torch.ceil(t.double() * grid - 1e-3).clamp(1, grid)
    if t_end is not None:
        ticks = torch.maximum(ticks, torch.floor(t_end.double() * grid + 1e-3) + 1)
    snapped = (ticks / grid).to(t.dtype)
    return snapped if t_start is None else torch.minimum(snapped, t_start.to(t.dtype))
