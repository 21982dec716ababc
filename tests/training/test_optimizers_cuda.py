"""What only a GPU can show of the optimizers: each parameter moves as AdamW's first step says, and nothing beside it does."""

import pytest
import torch

from reflow.recipes.sections import Train
from reflow.training import optimizers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SIZES = (35, 8192, 129, 4000)
GAP = 64  # elements between two parameters in one buffer


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "fused_adamw", "fused_adamw8bit"])
@pytest.mark.parametrize("scale", [0.1, 1e-3])
def test_a_first_step_moves_the_parameters_and_nothing_between_them(name, scale):
    train = Train(optimizer=name, learning_rate=1e-4, weight_decay=1e-2, betas=[0.9, 0.999], eps=1e-8)
    for _ in range(3):  # later ones get memory that held something
        flat, grads = (torch.zeros(sum(SIZES) + GAP * len(SIZES), device="cuda") for _ in range(2))
        parameters, place = [], 0
        for size in SIZES:
            part = slice(place, place + size)
            flat[part].normal_(0, 0.02)
            grads[part].normal_(0, scale)
            parameters.append(torch.nn.Parameter(flat[part]))
            parameters[-1].grad = grads[part]
            place += size + GAP
        p, g = flat.double(), grads.double()
        wanted = torch.where(g == 0, 0.0, p * (1 - 1e-4 * 1e-2) - 1e-4 * g / (g.abs() + 1e-8))
        optimizers.build(parameters, train).step()
        torch.testing.assert_close(flat.double(), wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["fused_adamw", "fused_adamw8bit"])
def test_a_pass_waits_for_nothing_and_equals_the_cpus(name):
    train = Train(optimizer=name, learning_rate=1e-3, weight_decay=1e-2, betas=[0.9, 0.999], eps=1e-8)
    ends = []
    for device in ("cuda", "cpu"):
        generator = torch.Generator().manual_seed(0)
        held = [torch.nn.Parameter(torch.randn(size, generator=generator).to(device)) for size in SIZES]
        optimizer = optimizers.build(held, train)
        averages = [p.detach().clone() for p in held]
        copies = [torch.zeros_like(p, dtype=torch.bfloat16) for p in held]
        optimizer.averages = {id(p): a for p, a in zip(held, averages)}
        optimizer.copies = {id(p): c for p, c in zip(held, copies)}
        for step in range(6):
            for p in held:
                p.grad = torch.randn(p.shape, generator=generator).to(device)
            optimizer.scale, optimizer.decay = torch.full((), 0.5, device=device), 0.9
            if step and device == "cuda":  # the first step makes the states
                torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        ends.append([t.detach().float().cpu() for t in (*held, *averages, *copies)])
    for one, two in zip(*ends, strict=True):
        # A copy is bf16; codes at the edge between two entries may fall to either side.
        torch.testing.assert_close(one, two, rtol=2**-7, atol=1e-4 if "8bit" in name else 1e-6)
