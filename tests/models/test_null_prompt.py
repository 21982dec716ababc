"""The null prompt as a key: what the base, a cache, a run's student and its exported folder take for an empty caption."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from reflow.data.cache import CachedDataset, fingerprint
from reflow.data.prepare import Preparation
from reflow.data.sources import open_source
from reflow.errors import UserError
from reflow.export import export_folder
from reflow.models import family, family_for
from reflow.recipes.sections import Model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))  # the shared pipelines' module


@pytest.fixture(scope="module")
def folder(sdxl, tmp_path_factory):
    path = tmp_path_factory.mktemp("null") / "sdxl"
    sdxl.save_pretrained(path)
    return path


def loaded(folder, null_prompt, **more):
    return family_for(Model(family="sdxl", null_prompt=null_prompt)).load(folder, **more)


@pytest.mark.parametrize("own", [True, False])
def test_base_zeros_or_an_encoded_empty_prompt(folder, own):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": own}))
    bases = {name: loaded(folder, name) for name in ("base", "zeros", "empty")}
    rows = {name: base.null_conditioning(2) for name, base in bases.items()}
    assert not rows["zeros"].encoder_hidden_states.any() and not rows["zeros"].text_embeds.any()
    torch.testing.assert_close(rows["empty"].encoder_hidden_states, bases["empty"].encode_prompts(["", ""]).encoder_hidden_states)
    assert rows["empty"].text_embeds.abs().sum() > 0
    same = "zeros" if own else "empty"
    torch.testing.assert_close(rows["base"].encoder_hidden_states, rows[same].encoder_hidden_states)
    prints = {name: fingerprint(base) for name, base in bases.items()}
    other = "empty" if own else "zeros"
    assert prints["base"] == prints[same] and prints["base"]["text"] != prints[other]["text"]


def test_sd15_has_one_too(sd15, tmp_path):
    sd15.save_pretrained(tmp_path / "sd15")
    zeros = dataclasses.replace(family("sd15"), null_prompt="zeros").load(tmp_path / "sd15")
    plain = family("sd15").load(tmp_path / "sd15")
    assert not zeros.null_conditioning().encoder_hidden_states.any() and zeros.null_conditioning().text_embeds is None
    assert plain.null_conditioning().encoder_hidden_states.any() and fingerprint(zeros)["text"] != fingerprint(plain)["text"]


def test_a_cache_of_another_null_prompt_is_refused_by_its_name(folder, tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (64, 64), (9, 90, 200)).save(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "a.txt").write_text("a")
    zeros, empty = loaded(folder, "zeros"), loaded(folder, "empty")
    Preparation(empty, open_source(tmp_path / "data"), tmp_path / "out", sizes=[(64, 64)]).run()
    assert CachedDataset(tmp_path / "out", empty).null.encoder_hidden_states.any()
    with pytest.raises(UserError, match=r"null prompt \(empty there, zeros here: model.null_prompt, and --null-prompt of prepare\)"):
        CachedDataset(tmp_path / "out", zeros)


def test_an_exported_folder_guides_with_the_students_null_prompt(folder, sdxl, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    out = export_folder(folder, sdxl.unet.state_dict(), tmp_path / "out", windows=4,
                        pipeline={"force_zeros_for_empty_prompt": not index["force_zeros_for_empty_prompt"]}).path  # fmt: skip
    assert family("sdxl").load(out, parts=()).zero_null is not index["force_zeros_for_empty_prompt"]
