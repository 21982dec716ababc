"""The captured solve: the same numbers as the plain one, without a host sync."""

import pytest
import torch

from reflow.flow import ChordTable, DiscreteVP, Windows, WindowSolver
from reflow.flow.captured import CapturedSolve, CapturedSolves, form
from reflow_kernels import aligned_v_loss, window_chord

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def case(device, guidance=None):
    torch.manual_seed(0)
    schedule, windows = DiscreteVP.from_config(BETAS), Windows.uniform(4)
    solver = WindowSolver(schedule, windows, 4, guidance_scale=guidance, device=device)
    layer = torch.nn.Conv2d(4, 4, 3, padding=1).to(device).requires_grad_(False)
    rows = 6 if guidance is None else 12

    def network(z, t, text):
        return layer(z) + 1e-3 * t.view(-1, 1, 1, 1) + text.view(-1, 4, 1, 1)

    def draw():
        return torch.randn(6, 4, 8, 8, device=device), torch.randint(0, 4, (6,), device=device), torch.randn(rows, 4, device=device)

    return solver, network, draw


def test_a_cpu_is_told_what_to_do_instead():
    solver, network, draw = case(torch.device("cpu"))
    with pytest.raises(ValueError, match="only on a GPU.*solver.solve"):
        CapturedSolve(solver, network, *draw())


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_replay_equals_the_plain_solve_and_never_syncs(device, guidance):
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    solver, network, draw = case(device, guidance)
    captured = CapturedSolve(solver, network, *draw())
    for _ in range(3):
        z, window, text = draw()
        plain = solver.solve(lambda a, b, text=text: network(a, b, text), z, window)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            replayed = captured(z, window, text)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(replayed, plain, rtol=0, atol=0)
    with pytest.raises(ValueError, match="recorded for shapes"):
        captured(z[:3], window[:3], text)


def test_solver_chord_loss_and_backward_never_sync(device):
    if device.type != "cuda":
        pytest.skip("the sync debug mode watches CUDA")
    solver, network, draw = case(device)
    table = ChordTable(DiscreteVP.from_config(BETAS), Windows.uniform(4), "ddim_eps", device=device)

    def step(z, window, text, tau):
        z_end = solver.solve(lambda a, b, text=text: network(a, b, text), z, window)
        z_t, velocity, model_input = window_chord(z, z_end, tau, table.dt[window])
        coefficients = table.velocity_coefficients(window, table.time(window, tau))
        output = network(model_input, tau, text).requires_grad_()
        aligned_v_loss(output, velocity, direction_weight=1.0, sample=z_t, sample_coef=coefficients[0], output_coef=coefficients[1]).loss.backward()

    tau = torch.rand(6, device=device)
    step(*draw(), tau)  # compiles the kernels
    inputs = draw()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs, tau)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Recorded:
    """Stands for a recorded solve on a machine without graphs: bound to one form, and solves plainly."""

    made = 0

    def __init__(self, solver, network, *tensors, input_dtype=None):
        Recorded.made += 1
        self.solver, self.network, self.input_dtype, self.form = solver, network, input_dtype, form(*tensors)

    def __call__(self, z, window, *inputs):
        assert form(z, window, *inputs) == self.form
        return self.solver.solve(lambda a, b: self.network(a, b, *inputs), z, window, input_dtype=self.input_dtype)


def solves(device, **options):
    solver, network, draw = case(device)
    kind = CapturedSolve if device.type == "cuda" else Recorded
    return CapturedSolves(network, capture=kind, **options), solver, network, draw


def test_a_form_is_recorded_when_it_comes_again_and_only_so_many_are(device):
    made, solver, network, draw = solves(device, most=2)

    def ask(rows, cast=lambda t: t):
        z, window, text = (cast(t[:rows]) if t.is_floating_point() else t[:rows] for t in draw())
        plain = solver.solve(lambda a, b: network(a, b, text), z, window)
        assert torch.equal(made(solver, z, window, text), plain)
        return made.counts

    # Validation's comes first and once, and takes no graph.
    assert ask(2) == {"captured": 0, "replayed": 0, "plain": 1}
    assert ask(6) == {"captured": 0, "replayed": 0, "plain": 2}
    assert ask(6) == {"captured": 1, "replayed": 0, "plain": 2}
    assert ask(6) == {"captured": 1, "replayed": 1, "plain": 2}
    ask(4), ask(4)
    assert made.counts == {"captured": 2, "replayed": 1, "plain": 3}
    # Two are recorded, so others stay plain, and those that are go on.
    ask(3), ask(3), ask(3), ask(4)
    assert made.counts == {"captured": 2, "replayed": 2, "plain": 6}
    # Another layout, and another solver, are another form.
    ask(6, lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
    assert made.counts["plain"] == 7
    made.forget()
    ask(6), ask(6)
    assert made.counts == {"captured": 3, "replayed": 2, "plain": 8}


def test_what_a_recorded_solve_is_bound_to(device):
    z = torch.randn(2, 3, 4, 5, device=device)
    same = form(z, z)
    assert form(z.clone(), z + 1) == same
    for other in (z[:1], z.double(), z.mT, z.contiguous(memory_format=torch.channels_last), z[..., :4]):
        assert form(z, other) != same
    assert form(z) != same
