"""Noise- and v-prediction bases of both families: an untrained student is the teacher's own K-step DDIM, in the flow and in diffusers."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import tiny_pipelines
from reflow.flow import ChordTable, DiscreteVP, Windows, WindowSolver, network_time
from reflow.models import denoise, family


@pytest.mark.parametrize("prediction, kind", [("epsilon", "ddim_eps"), ("v_prediction", "ddim_v")])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_an_untrained_student_is_its_teachers_ddim(tmp_path, name, prediction, kind):
    pipe = tiny_pipelines.quiet(getattr(tiny_pipelines, name)(prediction))
    pipe.save_pretrained(tmp_path)
    base = family(name).load(tmp_path)
    assert base.prediction_type == prediction
    schedule, windows = DiscreteVP.from_config(base.scheduler_config), Windows.uniform(4)
    noise, text = torch.randn(2, *base.latent_shape(), generator=torch.Generator().manual_seed(0)), base.encode_prompts(["a cat", "b"])
    teacher = WindowSolver(schedule, windows, 1, prediction_type=prediction)
    table = ChordTable(schedule, windows, kind)
    solved = stepped = noise
    with torch.no_grad():
        for k in range(4):
            window = torch.full((2,), k)
            solved = teacher.solve(lambda z, t: denoise(base.unet, z, t, text), solved, window)
            t = torch.full((2,), windows.boundaries[k])
            a, b = (value.view(-1, 1, 1, 1) for value in table.velocity_coefficients(window, t))
            velocity = a * stepped + b * denoise(base.unet, stepped, network_time(t, "index"), text)
            stepped = stepped + (windows.boundaries[k + 1] - windows.boundaries[k]) * velocity
        pipe.scheduler = tiny_pipelines.ddim(prediction, timestep_spacing="trailing")
        stock = pipe(["a cat", "b"], num_inference_steps=4, guidance_scale=1.0, latents=noise, height=64, width=64, output_type="latent").images
    size = stock.abs().max()
    assert (solved - stock).abs().max() < 1e-5 * size and (stepped - stock).abs().max() < 1e-5 * size
    wrong = ChordTable(schedule, windows, {"ddim_eps": "ddim_v", "ddim_v": "ddim_eps"}[kind])
    a, b = (value.view(-1, 1, 1, 1) for value in wrong.velocity_coefficients(torch.zeros(2, dtype=torch.long), torch.ones(2)))
    first, _ = (value.view(-1, 1, 1, 1) for value in table.velocity_coefficients(torch.zeros(2, dtype=torch.long), torch.ones(2)))
    assert not torch.allclose(a, first, rtol=1e-2)
