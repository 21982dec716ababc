"""A window solve as one CUDA graph: every network call and every step replayed with one launch from the host.

Pays where launching dominates (SD1.5 and small batches); see kernels/README.md for what is and is not measured.
Time runs from t=1 (noise) to t=0 (data).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .solver import WindowSolver

WARM_UP = 3


class CapturedSolve:
    """`solver.solve` recorded once for one batch shape, with buffers that stay where they are.

    network(model_input, timestep, *inputs) -> output is the frozen teacher; `inputs` are its other tensors
    (conditioning), one row for each row the network gets: B, or 2B with guidance. z_start [B, ...], window [B] and
    inputs give shapes, dtypes and devices; later calls must have the same. The network's weights are read in place:
    change their values, never their storage.

    Raises ValueError on a device that is not CUDA, and in a call whose shapes differ from the recorded ones.
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
        z, k, *rest = self.buffers

        def solve() -> Tensor:
            return solver.solve(lambda z_in, timestep: network(z_in, timestep, *rest), z, k, input_dtype=input_dtype)

        # Lazy initialisation (library handles, autotuning of convolutions) must be over before the recording.
        side = torch.cuda.Stream(z.device)  # type: ignore[no-untyped-call]  # torch gives it no types
        side.wait_stream(torch.cuda.current_stream(z.device))
        with torch.cuda.stream(side), torch.no_grad():
            for _ in range(WARM_UP):
                solve()
        torch.cuda.current_stream(z.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph), torch.no_grad():
            self.z_end = solve()

    def fits(self, z_start: Tensor, window: Tensor, *inputs: Tensor) -> bool:
        """Whether a call with these tensors can be replayed."""
        given = (z_start, window, *inputs)
        if len(given) != len(self.buffers):
            return False
        return all(a.shape == b.shape and a.device == b.device for a, b in zip(given, self.buffers, strict=True))

    def __call__(self, z_start: Tensor, window: Tensor, *inputs: Tensor) -> Tensor:
        """z at the windows' clean ends, as `solver.solve` gives it, in a tensor of its own. No host sync."""
        if not self.fits(z_start, window, *inputs):
            recorded = [tuple(b.shape) for b in self.buffers]
            given = [tuple(t.shape) for t in (z_start, window, *inputs)]
            raise ValueError(
                f"This solve was recorded for shapes {recorded} and is called with {given}; record another, or call "
                "solver.solve."
            )
        for buffer, tensor in zip(self.buffers, (z_start, window, *inputs), strict=True):
            buffer.copy_(tensor)
        self.graph.replay()
        return self.z_end.clone()
