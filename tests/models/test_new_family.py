"""The family that reflow/models/README.md shows, run as it stands there: read from a file, and trained one step through the loop."""

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import tiny_pipelines
from reflow import models
from reflow.data.latents import LatentDataset
from reflow.errors import UserError
from reflow.models import registry
from reflow.recipes import reading
from reflow.training import run

PAGE = Path(models.__file__).parent / "README.md"
RECIPE = """
name = "new family"
[model]
family = "{file}"
base = "{base}"
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


@pytest.fixture
def forgotten(monkeypatch):
    """Families that a test registers are gone after it."""
    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
    monkeypatch.setattr(registry, "_OF_FILE", {})


def page_example(folder):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[1]
    (folder / "clip_skip.py").write_text(code)
    return folder / "clip_skip.py"


def test_the_family_of_the_page_trains_a_step(tmp_path, forgotten, monkeypatch):
    pipe = tiny_pipelines.quiet(tiny_pipelines.sd15())
    pipe.save_pretrained(tmp_path / "base")
    file = page_example(tmp_path)
    base = registry.family(str(file)).load(tmp_path / "base")
    text = base.encode_prompts(["a cat", "b"])
    last, _ = pipe.encode_prompt(["a cat", "b"], "cpu", 1, False)
    assert not torch.allclose(text.encoder_hidden_states, last, atol=1e-3)
    # The same by an encoder that has one layer fewer.
    whole = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
    whole.encoder.layers = whole.encoder.layers[:-1]
    want, _ = pipe.encode_prompt(["a cat", "b"], "cpu", 1, False)
    torch.testing.assert_close(text.encoder_hidden_states, want)

    seen = []

    def data(recipe, base):
        seen.append(type(base).__name__)
        g = torch.Generator().manual_seed(0)
        return LatentDataset(torch.randn(4, 4, 8, 8, generator=g), torch.zeros(4, dtype=torch.long),
                             *(rows.to("cpu", torch.float32) for rows in (base.encode_prompts(["a cat"]), base.null_conditioning())))  # fmt: skip

    monkeypatch.setattr(run, "load_data", data)
    (tmp_path / "recipe.toml").write_text(RECIPE.format(file=file, base=tmp_path / "base"))
    assert run.train(reading.load(str(tmp_path / "recipe.toml")), tmp_path / "run") == 0
    trained, start = load_file(tmp_path / "run" / "stage-1" / "unet_ema.safetensors"), pipe.unet.state_dict()
    assert seen == ["ClipSkip"] and trained.keys() == start.keys()
    assert any(not torch.equal(trained[key], start[key]) for key in start)


def test_what_is_no_family_file_is_said(tmp_path, forgotten):
    with pytest.raises(UserError, match="There is no file .*nothing.py to read a model family from"):
        registry.family(str(tmp_path / "nothing.py"))
    (tmp_path / "none.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="registers 0 model families"):
        registry.family(str(tmp_path / "none.py"))
    (tmp_path / "wrong.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(UserError, match="cannot be read: ModuleNotFoundError"):
        registry.family(str(tmp_path / "wrong.py"))
    with pytest.raises(ValueError, match="There is a model family 'sd15' already"):
        models.register(models.Family("sd15", (), pooled=False))
    assert registry.family(str(page_example(tmp_path))) is registry.family(str(tmp_path / "clip_skip.py"))
