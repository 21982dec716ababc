"""A window solve as one CUDA graph: every network call and every step replayed with one launch from the host.

Pays where launching dominates (SD1.5 and small batches); see kernels/README.md for what is and is not measured.
Time runs from t=1 (noise) to t=0 (data).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .solver import WindowSolver

WARM_UP = 3
MOST = 4  # recorded solves, each of which keeps its buffers and the network's intermediate results


def form(*tensors: Tensor) -> tuple[Any, ...]:
    """What a recorded solve is bound to: shape, dtype, device and layout of every tensor."""
    return tuple((tuple(t.shape), t.dtype, t.device, t.stride()) for t in tensors)


class CapturedSolve:
    """`solver.solve` recorded once for one form of batch, with buffers that stay where they are.

    network(model_input, timestep, *inputs) -> output is the frozen teacher; `inputs` are its other tensors
    (conditioning), one row for each row the network gets: B, or 2B with guidance. z_start [B, ...], window [B] and
    inputs give shapes, dtypes, devices and layouts; later calls must have the same. The network's weights are read in
    place: change their values, never their storage.

    Raises ValueError on a device that is not CUDA, and in a call whose form differs from the recorded one.
    """

    def __init__(
        self,
        solver: WindowSolver,
        network: Callable[..., Tensor],
        z_start: Tensor,
        window: Tensor,
        *inputs: Tensor,
        input_dtype: torch.dtype | None = None,
    ) -> None:
        if z_start.device.type != "cuda":
            raise ValueError(
                f"A solve can be captured as a CUDA graph only on a GPU, and z_start is on {z_start.device}; "
                "call solver.solve there."
            )
        self.buffers = tuple(tensor.detach().clone() for tensor in (z_start, window, *inputs))
        self.form = form(z_start, window, *inputs)
        z, k, *rest = self.buffers

        def solve() -> Tensor:
            return solver.solve(lambda z_in, timestep: network(z_in, timestep, *rest), z, k, input_dtype=input_dtype)

        with torch.cuda.device(z_start.device), torch.no_grad():
            # Lazy initialisation (library handles, autotuning of convolutions) must be over before the recording.
            side = torch.cuda.Stream(z.device)  # type: ignore[no-untyped-call]  # torch gives it no types
            side.wait_stream(torch.cuda.current_stream(z.device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    solve()
            torch.cuda.current_stream(z.device).wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.z_end = solve()

    def __call__(self, z_start: Tensor, window: Tensor, *inputs: Tensor) -> Tensor:
        """z at the windows' clean ends, as `solver.solve` gives it, in a tensor of its own. No host sync."""
        given = form(z_start, window, *inputs)
        if given != self.form:
            raise ValueError(
                f"This solve was recorded for tensors of shape, dtype, device and strides {self.form} and is called "
                f"with {given}; record another, or call solver.solve."
            )
        for buffer, tensor in zip(self.buffers, (z_start, window, *inputs), strict=True):
            buffer.copy_(tensor)
        with torch.cuda.device(z_start.device):
            self.graph.replay()
            return self.z_end.clone()


class CapturedSolves:
    """Solves of any form, each recorded when it comes for the second time, and how often that was of use.

    A form that comes once, as a measurement's or a validation's, is solved plainly and takes no graph; so does every
    form beyond the first `most`. counts: calls by "captured" (recorded, then replayed), "replayed" and "plain".
    capture: makes one recorded solve, as `CapturedSolve` does.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        *,
        input_dtype: torch.dtype | None = None,
        most: int = MOST,
        capture: Callable[..., Callable[..., Tensor]] = CapturedSolve,
    ) -> None:
        self.network, self.input_dtype, self.most, self.capture = network, input_dtype, most, capture
        self.counts = {"captured": 0, "replayed": 0, "plain": 0}
        self.forget()

    def forget(self) -> None:
        """Drop what was recorded, where the network's weights have moved."""
        self._seen: set[tuple[Any, ...]] = set()
        self._recorded: dict[tuple[Any, ...], Callable[..., Tensor]] = {}

    def __call__(self, solver: WindowSolver, z_start: Tensor, window: Tensor, *inputs: Tensor) -> Tensor:
        """z at the end of the windows, as `solver.solve` gives it."""
        key = (solver, *form(z_start, window, *inputs))
        if key in self._recorded:
            self.counts["replayed"] += 1
        elif key in self._seen and len(self._recorded) < self.most:
            made = self.capture(solver, self.network, z_start, window, *inputs, input_dtype=self.input_dtype)
            self._recorded[key] = made
            self.counts["captured"] += 1
        else:
            self._seen.add(key)
            self.counts["plain"] += 1
            return solver.solve(lambda z, t: self.network(z, t, *inputs), z_start, window, input_dtype=self.input_dtype)
        return self._recorded[key](z_start, window, *inputs)
