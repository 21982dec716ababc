"""What a solve asks of the device between two calls of the network."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reflow.flow import Windows, WindowSolver

VIEWS = {"aten.select.int", "aten.detach.default", "aten.view.default", "aten.alias.default"}


class Seen(TorchDispatchMode):
    """The operators that are called, but for views, and where the network was."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) not in VIEWS:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method, guidance", [("ddim", None), ("ddim", 3.0), ("ddim", "rows"), ("heun", 3.0)])
@pytest.mark.parametrize("cast", [None, torch.bfloat16])
def test_a_step_is_one_launch_beside_the_network(sd, device, method, guidance, cast):
    scale = torch.tensor([2.0, 3.0], device=device) if guidance == "rows" else guidance
    solver = WindowSolver(sd, Windows.uniform(4), 4, method=method, guidance_scale=scale, device=device)
    z, window = torch.randn(2, 3, 4, 4, device=device), torch.tensor([0, 2], device=device)
    with Seen() as seen:

        def network(x, t):
            assert len(x) == len(t) == (2 if guidance is None else 4) and x.dtype == (cast or torch.float32)
            seen.names.append("network")
            return x

        solver.solve(network, z, window, input_dtype=cast)
    between = " ".join(seen.names).split("network")[1:]
    if method == "ddim":
        assert [part.split() for part in between] == [["reflow_kernels.guided_step.default"]] * 4
    else:  # the corrector's mixture is three of its own
        assert all(part.split().count("reflow_kernels.guided_step.default") == 1 for part in between)
        assert all(not {"aten.cat.default", "aten.full.default"} & set(part.split()) for part in between)
