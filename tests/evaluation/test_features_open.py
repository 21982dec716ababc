"""--features NAME=PATH: names, missing and foreign weights, each refused in one sentence that says what to fetch. Nothing is downloaded."""

import json

import pytest
import torch
import transformers

from reflow.errors import UserError
from reflow.evaluation.features import files, lpips, needed
from reflow.evaluation.features.feature import Feature, exact
from reflow.evaluation.features.opening import OPENERS, open_features


@pytest.fixture(autouse=True)
def pickles(monkeypatch):
    monkeypatch.setenv("REFLOW_PICKLES", "1")


def refusal(*specs):
    with pytest.raises(UserError) as error:
        open_features(specs)
    said = str(error.value)
    assert "\n" not in said and said.endswith(".") and "http" not in said and "www." not in said
    return said


def test_every_name_has_its_needs():
    assert set(OPENERS) == set(needed.NEEDS)


@pytest.mark.parametrize("name", [name for name in OPENERS if name != "detector"])
def test_missing_weights_say_what_to_fetch_and_where_to_put_it(name, tmp_path):
    for place in (tmp_path / "nowhere", tmp_path):
        said = refusal(f"{name}={place}")
        assert said.startswith(f"--features {name}={place}: ") and needed.NEEDS[name] in said and f"give --features {name}=PATH" in said


@pytest.mark.parametrize("spec, said", [
    ("incepton=x", "there is no feature 'incepton' (did you mean 'inception'?); there are inception, dinov2, clip"),
    ("foo=x", "there is no feature 'foo'; there are"),
    ("clip", "write NAME=PATH. clip needs a folder of a CLIP model"),
    ("clip=", "write NAME=PATH"),
])  # fmt: skip
def test_names(spec, said):
    assert said in refusal(spec)


def test_a_name_given_twice_is_refused_before_anything_is_read():
    assert "--features names clip twice, 'a' and 'b'" in refusal("clip=a", "clip=b")
    assert "there is no feature 'x'" in refusal("clip=/nowhere", "x=1")


@pytest.mark.parametrize("name", ["inception", "lpips", "image_reward", "hpsv2"])
def test_pickles_are_read_only_where_the_user_allows_them(name, tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    monkeypatch.delenv("REFLOW_PICKLES")
    assert "is a pickle" in refusal(f"{name}={tmp_path / 'weights.pth'}")
    monkeypatch.setenv("REFLOW_PICKLES", "1")
    assert "is a pickle" not in refusal(f"{name}={tmp_path / 'weights.pth'}")


@pytest.mark.parametrize("name", ["inception", "lpips", "image_reward", "hpsv2"])
def test_another_networks_weights(name, tmp_path):
    torch.save({"state_dict": {"layer.weight": torch.zeros(2, 2)}}, tmp_path / "a.pth")
    assert "it holds " in refusal(f"{name}={tmp_path}")
    (tmp_path / "b.pth").write_bytes(b"")
    assert "holds 2 files of weights (a.pth, b.pth), give one of them" in refusal(f"{name}={tmp_path}")
    assert "cannot be read" in refusal(f"{name}={tmp_path / 'b.pth'}")


@pytest.mark.parametrize("name, kind", [("dinov2", "dinov2"), ("clip", "clip"), ("pickscore", "clip")])
def test_folders_of_other_models(name, kind, tmp_path):
    (tmp_path / "config.json").write_text("[1")
    assert "no readable config.json" in refusal(f"{name}={tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert f"of type 'llama', not {kind!r}" in refusal(f"{name}={tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert "holds no model.safetensors" in refusal(f"{name}={tmp_path}")


def tiny_dino(folder):
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    transformers.Dinov2Model(config).save_pretrained(folder)


def test_a_folder_whose_weights_lack_a_tensor_is_refused_rather_than_filled_at_random(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_dino(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    left = {name: tensor for name, tensor in state.items() if name != "layernorm.weight"}
    save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "its weights lack layernorm.weight" in refusal(f"dinov2={tmp_path}")
    save_file(state | {"layernorm.weight": torch.full((32,), torch.nan)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "not finite" in str(pytest.raises(UserError, open_features, [f"dinov2={tmp_path}"]).value)
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    assert "cannot be loaded" in refusal(f"dinov2={tmp_path}")


def test_lpips_without_torchmetrics_is_a_sentence(monkeypatch):
    monkeypatch.setattr(lpips, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'reflow\[evaluate\]' adds it"):
        lpips.linear_weights("alex")


def test_digests(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"")
    one = files.digest_of([tmp_path / "a"])
    assert one == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    both = files.digest_of([tmp_path / "a", tmp_path / "b"])
    assert both == files.digest_of([tmp_path / "b", tmp_path / "a"]) != one
    (tmp_path / "b").write_bytes(b"x")
    assert files.digest_of([tmp_path / "a", tmp_path / "b"]) != both


def test_an_opened_feature_is_what_its_kind_says(tmp_path):
    tiny_dino(tmp_path)
    (feature,) = open_features([f"dinov2={tmp_path}"]).values()
    assert isinstance(feature, Feature) and feature.name == "dinov2" and feature.kind == "features" and len(feature.digest) == 64
    with pytest.raises(ValueError, match="uint8"):
        feature.features(torch.zeros(1, 3, 28, 28))


def test_exact_puts_settings_back():
    torch.backends.cuda.matmul.allow_tf32 = before = not torch.backends.cuda.matmul.allow_tf32
    try:
        with pytest.raises(RuntimeError, match="inside"), exact():
            assert not torch.backends.cuda.matmul.allow_tf32 and torch.is_inference_mode_enabled()
            raise RuntimeError("inside")
        assert torch.backends.cuda.matmul.allow_tf32 is before
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_a_detector_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_counter.py").write_text(
        "import torch\n"
        "class Counter:\n"
        "    implementation = 'bright pixels'\n"
        "    def count(self, images, names):\n"
        "        return (images == 255).sum((1, 2, 3))[:, None].expand(-1, len(names)) * (-1 if names == ['bad'] else 1)\n"
        "def make(device):\n"
        "    return Counter()\n"
        "def other(device):\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    feature = open_features(["detector=my_counter:make"])["detector"]
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[1, 0, :2] = 255
    assert feature.count(images, ["a", "b"]).tolist() == [[0, 0], [8, 8]]
    assert feature.kind == "count" and feature.implementation == "bright pixels" and len(feature.digest) == 64
    with pytest.raises(UserError, match=r"whole numbers of 0 or more, 2 images by 1 classes"):
        feature.count(images, ["bad"])
    assert "this is no MODULE:FUNCTION" in refusal("detector=my_counter")
    assert "no function nothing" in refusal("detector=my_counter:nothing")
    assert "no count(images, class_names)" in refusal("detector=my_counter:other")
    assert "cannot be imported" in refusal("detector=no_such_module:make")
