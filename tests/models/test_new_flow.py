"""The family of a flow that reflow/models/README.md shows, run as it stands there: read from a file, sampled as its pipeline samples, trained."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from transformers import LlamaTokenizerFast, UMT5Config, UMT5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import tiny_flows
from reflow import models
from reflow.data.latents import LatentDataset
from reflow.models import conditioning, registry
from reflow.recipes import reading
from reflow.sampling import sample, scheduler_for
from reflow.training import run

PAGE = Path(models.__file__).parent / "README.md"
PROMPTS = ["a cat", "a dog"]
RECIPE = """
name = "new flow"
[model]
family = "{file}"
base = "{base}"
[student]
prediction_type = "velocity"
network_time = "flow"
shift = 1.73
[train]
batch_size = 2
micro_batch = 2
learning_rate = 1e-3
[checkpoint]
minutes = 0
[[stages]]
windows = 2
solver_steps = 1
samples = 2
"""


def aura_flow():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        words = ["<unk>", "<s>", "</s>", "▁", *tiny_flows.LETTERS]
        tok = LlamaTokenizerFast(vocab={word: i for i, word in enumerate(words)}, merges=[], pad_token="</s>", model_max_length=256)
        config = UMT5Config(vocab_size=len(tok) + 2, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        vae = tiny_flows.vae(4)
        vae.register_to_config(shift_factor=None)
        return tiny_flows.ready(AuraFlowPipeline(
            tokenizer=tok,
            text_encoder=UMT5EncoderModel(config),
            vae=vae,
            transformer=AuraFlowTransformer2DModel(
                sample_size=8, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
                num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=16, pos_embed_max_size=256),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        ))  # fmt: skip


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The page's file, and a base that it reads; what it registers is gone afterwards."""
    folder = tmp_path_factory.mktemp("aura")
    pipe = aura_flow()
    pipe.save_pretrained(folder / "base")
    code = re.search(r"`aura_flow.py`.*?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[1]
    (folder / "aura_flow.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
        patch.setattr(registry, "_OF_FILE", {})
        patch.delitem(conditioning.CALLS, "aura-flow", raising=False)
        family = registry.family(str(folder / "aura_flow.py"))
        yield SimpleNamespace(pipe=pipe, family=family, base=family.load(folder / "base"), folder=folder)
        conditioning.CALLS.pop("aura-flow")


def test_text_is_the_pipelines(shown):
    states, _, null, _ = shown.pipe.encode_prompt(PROMPTS)
    assert torch.equal(shown.base.encode_prompts(PROMPTS).encoder_hidden_states, states)
    assert torch.equal(shown.base.null_conditioning(2).encoder_hidden_states, null)
    assert {"encoder_hidden_states": tuple(states.shape[1:])} == shown.base.example_rows()
    assert registry.family_of(shown.folder / "base")[0] is shown.family


@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_samples_are_the_pipelines(shown, scale):
    ours = sample(shown.base, shown.base.unet, PROMPTS, 4, [1, 2], windows=4, resolution=32, guidance_scale=scale)
    shown.pipe.scheduler = scheduler_for(shown.base, 4)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    images = shown.pipe(PROMPTS, num_inference_steps=4, height=32, width=32, generator=generators, guidance_scale=scale, output_type="pt").images
    torch.testing.assert_close(ours.images / 2 + 0.5, images, atol=2e-5, rtol=1e-4)


def test_it_trains_a_step(shown, tmp_path, monkeypatch):
    def data(recipe, base):
        latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        rows = (rows.to("cpu", torch.float32) for rows in (base.encode_prompts(["a cat"]), base.null_conditioning()))
        return LatentDataset(latents, torch.zeros(4, dtype=torch.long), *rows)

    monkeypatch.setattr(run, "load_data", data)
    (tmp_path / "recipe.toml").write_text(RECIPE.format(file=shown.folder / "aura_flow.py", base=shown.folder / "base"))
    assert run.train(reading.load(str(tmp_path / "recipe.toml")), tmp_path / "run") == 0
    trained, start = load_file(next((tmp_path / "run" / "stage-1").glob("*_ema.safetensors"))), shown.pipe.transformer.state_dict()
    assert trained.keys() <= start.keys() and any(not torch.equal(trained[key], start[key]) for key in trained)
