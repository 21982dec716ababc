"""Multi-view models: an SD UNet whose self-attention reads all views of an object, folded in the batch, as in
Wonder3D."""

import pytest
import torch

import tiny_pipelines
from reflow.errors import UserError
from reflow.flow import ChordTable, DiscreteVP, Windows, WindowSolver, chord_loss
from reflow.sampling import PiecewiseFlowScheduler
from reflow.weights.delta import make_delta, merge
from reflow_kernels import window_chord

VIEWS, OBJECTS = 3, 2
SHAPE = (OBJECTS * VIEWS, 4, 8, 8)


class AcrossViews:
    """Self-attention whose keys and values are those of all views of the same object; rows are object by object."""

    def __init__(self, views):
        self.views = views

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        rows, places, _ = hidden_states.shape
        objects = rows // self.views

        def heads(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = attn.to_q(hidden_states).reshape(objects, self.views * places, -1)
        together = hidden_states.reshape(objects, self.views * places, -1)
        key, value = attn.to_k(together), attn.to_v(together)
        out = torch.nn.functional.scaled_dot_product_attention(heads(query), heads(key), heads(value))
        out = out.transpose(1, 2).flatten(-2).reshape(rows, places, -1)
        return attn.to_out[1](attn.to_out[0](out))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def look_across(unet):
    unet.set_attn_processor(
        {
            name: AcrossViews(VIEWS) if name.endswith("attn1.processor") else processor
            for name, processor in unet.attn_processors.items()
        }
    )


@pytest.fixture(scope="module")
def multiview():
    """(multi-view UNet with a merged delta, the delta's report, the custom and the student's delta state).

    Like Wonder3D's it takes the picture's latents beside the noise, 8 channels, and each view's camera as a class.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = tiny_pipelines.sd15_unet(layers_per_block=1)
        unet = tiny_pipelines.sd15_unet(
            layers_per_block=1, in_channels=8, class_embed_type="projection", projection_class_embeddings_input_dim=10
        ).eval()
    base = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    delta = make_delta(base, {key: t + 0.02 * normal(*t.shape, seed=1) for key, t in base.items()})
    custom = {key: tensor.clone() for key, tensor in unet.state_dict().items()}
    with pytest.raises(UserError, match="do not fit the delta"):
        merge(custom, delta)
    merged, report = merge(custom, delta, allow=["conv_in.weight", "class_embedding.*"])
    unet.load_state_dict(merged)
    look_across(unet)
    return unet, report, custom, delta


def conditioned(unet):
    """network(z, timestep) as the solver and the loss call it, with picture, cameras and prompt of every view."""
    picture, cameras, prompt = normal(*SHAPE, seed=2), normal(SHAPE[0], 10, seed=3), normal(SHAPE[0], 5, 32, seed=4)
    return lambda z, timestep: unet(
        torch.cat([z, picture], 1), timestep, prompt, class_labels=cameras, return_dict=False
    )[0]


def test_the_delta_of_the_plain_model_applies(multiview):
    unet, report, custom, delta = multiview
    assert report.mismatched == ["conv_in.weight"]
    assert report.skipped and all(key.startswith("class_embedding.") for key in report.skipped)
    now = unet.state_dict()
    for key in report.matched:
        torch.testing.assert_close(now[key], custom[key] + delta[key], rtol=0, atol=1e-7)
    for key in report.mismatched + report.skipped:
        assert torch.equal(now[key], custom[key])


@torch.no_grad()
def test_the_views_of_one_object_see_each_other(multiview):
    unet, *_ = multiview
    network, z, timestep = conditioned(unet), normal(*SHAPE, seed=5), torch.full((SHAPE[0],), 499)
    other = z.clone()
    other[1] += 1.0
    change = (network(other, timestep) - network(z, timestep)).flatten(1).abs().amax(1)
    assert (change[:VIEWS] > 1e-5).all() and (change[VIEWS:] < 1e-6).all()


def test_one_window_is_solved_and_one_step_of_training_taken(multiview):
    unet, *_ = multiview
    before = {key: tensor.clone() for key, tensor in unet.state_dict().items()}
    network, z_start = conditioned(unet), normal(*SHAPE, seed=6)
    window = torch.zeros(SHAPE[0], dtype=torch.long)
    base = tiny_pipelines.ddim(timestep_spacing="trailing")
    schedule, windows = DiscreteVP.from_config(base.config), Windows.uniform(2)
    z_end = WindowSolver(schedule, windows, 5).solve(network, z_start, window)

    # All views of an object move together, so the window is the first half of ten steps of stock DDIM.
    base.set_timesteps(10)
    state = z_start
    with torch.no_grad():
        for timestep in base.timesteps[:5]:
            state = base.step(network(state, timestep), timestep, state).prev_sample
    assert (z_end - state).abs().max() <= 1e-5 * state.abs().max()

    table = ChordTable(schedule, windows, "ddim_eps")
    tau = torch.tensor([0.1, 0.4]).repeat_interleave(VIEWS)  # one time for all views of an object
    t = table.time(window, tau)
    z_t, velocity, _ = window_chord(z_start, z_end, tau, table.dt[window])

    def loss():
        return chord_loss(network(z_t, 1000 * t - 1), velocity, z_t, table, window, t).loss

    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    first = loss()
    first.backward()
    attention = [p for name, p in unet.named_parameters() if ".attn1.to_k." in name]
    assert attention and all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in attention)
    optimizer.step()
    with torch.no_grad():
        assert loss() < first
    unet.load_state_dict(before)


@torch.no_grad()
def test_few_steps_for_all_views_at_once(multiview):
    """As many steps as windows are stock DDIM's for multi-view networks too."""
    unet, *_ = multiview
    network, results = conditioned(unet), []
    ours = PiecewiseFlowScheduler.from_config(tiny_pipelines.ddim().config, num_time_windows=2)
    for scheduler in (ours, tiny_pipelines.ddim(timestep_spacing="trailing")):
        scheduler.set_timesteps(2)
        state = normal(*SHAPE, seed=6)
        for timestep in scheduler.timesteps:
            state = scheduler.step(network(state, timestep), timestep, state).prev_sample
        results.append(state)
    assert (results[0] - results[1]).abs().max() <= 1e-5 * results[1].abs().max()
