"""The configs of flow bases that ship for planning: sizes that are published, shifts, and the plans of the recipes that name them."""

import json

import pytest
import torch

from reflow.errors import UserError
from reflow.models import family
from reflow.models.folder import read_scheduler
from reflow.models.shipped import CONFIGS, FOLDERS, shipped
from reflow.recipes import reading
from reflow.training import plan
from reflow.training.counts import count

# Billions of weights as the checkpoints hold them, SD3.5's table of positions included, which is no parameter; published as 2.5, 8.1, 12, 20 and 1.6.
SIZES = {"sd35-medium": (2.470, 3.0), "sd35-large": (8.146, 3.0), "flux-dev": (11.901, 3.1582), "qwen-image": (20.430, 2.0008), "sana-1600m": (1.604, 3.0)}
FLOWS = {folder: (name, repo) for name, known in FOLDERS.items() if not name.startswith("sd1") and name != "sdxl" for repo, folder in known.items()}
RECIPES = {"sd35-medium-reflow": "sd35-medium", "flux-dev-reflow-lora": "flux-dev", "qwen-image-reflow-lora": "qwen-image", "sana-reflow": "sana-1600m"}


def test_every_folder_of_configs_is_somebodys():
    named = {folder for known in FOLDERS.values() for folder in known.values()}
    assert named == {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    assert FLOWS.keys() == SIZES.keys() and shipped("nobody") is None
    assert shipped("sd3", "mine/fine-tune").name == "sd35-medium"


@pytest.mark.parametrize("name", SIZES)
def test_networks_have_their_published_sizes_and_the_bases_their_shifts(name):
    of, repo = FLOWS[name]
    base = family(of).load(shipped(of, repo), parts=())
    assert base.path.name == name and base.resolution == 1024
    with torch.device("meta"):
        network = base.hollow()
    weights = sum(tensor.numel() for tensor in network.state_dict().values())
    assert weights / 1e9 == pytest.approx(SIZES[name][0], rel=1e-3)
    assert base.shift(1024) == pytest.approx(SIZES[name][1], abs=1e-4)
    text = base.example(torch.bfloat16)
    assert len(text) == 1 and all(tensor.shape[1:] == shape for tensor, shape in zip(text.tensors, base.example_rows().values(), strict=True))


@pytest.mark.parametrize("name, forward", [pytest.param("flux-dev", 74.4e12, marks=pytest.mark.slow), ("sana-1600m", 2.97e12)])
def test_a_pass_costs_what_it_is_known_to(name, forward):
    of, repo = FLOWS[name]
    base = family(of).load(shipped(of, repo), parts=())
    got = count(base.network_config, base.latent_shape(1024), 0, torch.bfloat16, base=base)
    assert got.forward == pytest.approx(forward, rel=2e-3) and got.backward > 2 * got.forward and got.checkpointed < got.saved / 5


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_of_a_flow_fits_its_base(name):
    recipe = reading.load(name)
    base, note = plan.find_base(recipe)
    assert f"configs of {RECIPES[name]} that ship with reflow" in note and base.path.name == RECIPES[name]
    # The shift of the windows is the base's own at the size that its data are prepared at.
    assert recipe.student.shift == pytest.approx(base.shift(1024), abs=5e-5)
    assert (recipe.student.network_time, recipe.student.prediction_type, recipe.objective.starts) == ("flow", "velocity", "noise")
    assert recipe.data.caption_drop == 0 and recipe.stages[-1].windows == 4
    with torch.device("meta"):
        layers = [layer for layer, module in base.hollow().named_modules() if isinstance(module, torch.nn.Linear)]
    for target in recipe.model.lora_targets if recipe.model.lora_rank else ():
        assert any(layer.endswith(f".{target}") for layer in layers), target
    # Whole trajectories of the first stage's windows, so that none is solved twice.
    assert recipe.train.micro_batch % recipe.stages[0].windows == 0


def test_a_scheduler_may_hold_infinities_as_sanas_does(tmp_path):
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads((CONFIGS / "sana-1600m" / "scheduler" / "scheduler_config.json").read_text())
    file.write_text(json.dumps({**config, "lambda_min_clipped": float("-inf")}))
    assert "-Infinity" in file.read_text()
    assert read_scheduler(tmp_path, "transformer")["flow_shift"] == 3.0
    for key, value in (("flow_shift", float("inf")), ("lambda_min_clipped", float("nan"))):
        file.write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError, match="scheduler_config.json"):
            read_scheduler(tmp_path, "transformer")
