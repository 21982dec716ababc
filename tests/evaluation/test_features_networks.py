"""Inception, LPIPS, ImageReward, DINOv2 and patches, with made-up weights, against numbers of the published code and the libraries."""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

import made_up
from reflow.evaluation.features.image_reward_names import HEAD, TEXT, VISION, configs_of, split
from reflow.evaluation.features.inception_network import Inception, resized_as_tensorflow
from reflow.evaluation.features.lpips import backbone
from reflow.evaluation.features.opening import open_features
from reflow.evaluation.features.patches import patches
from reflow.evaluation.features.preprocessing import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, pillow, processed

# Every 400th feature, the mean and the deviation of two images' features by torch-fidelity 0.4.0 (fp32, torch 2.13 on a CPU).
INCEPTION = [
    [0.7400544285774231, 0.0036524618044495583, 1.46163809299469, 0.6372346878051758, 1.3375569581985474, 0.12113846838474274],
    [0.5109580755233765, 0.00019393420370761305, 1.2765229940414429, 0.698015570640564, 1.0816757678985596, 0.018570557236671448],
]
MEANS, DEVIATIONS = [0.7232419848442078, 0.6626772880554199], [0.9583210349082947, 0.8787553310394287]
# Scores by ImageReward 1.5's own networks (the same).
REWARDS = [0.9135738611221313, 1.7524855136871338, 0.38932764530181885]


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_file(made_up.weights(Inception().state_dict()), file)
    return file


def test_inception_is_torch_fidelitys(inception_file):
    feature = open_features([f"inception={inception_file}"])["inception"]
    found = feature.features(made_up.images(2, 70, 90))
    assert found.shape == (2, 2048) and found.dtype == torch.float32
    torch.testing.assert_close(found[:, ::400], torch.tensor(INCEPTION), rtol=1e-3, atol=1e-4)
    assert found.mean(1).tolist() == pytest.approx(MEANS, rel=1e-4) and found.std(1).tolist() == pytest.approx(DEVIATIONS, rel=1e-4)
    assert "not the published file" in feature.implementation


def test_inception_beside_torch_fidelity_where_that_is_installed(inception_file, tmp_path):
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("torch-fidelity is not installed; its numbers are above")
    package = types.ModuleType("torch_fidelity")  # the package itself imports torchvision, its network does not
    package.__path__ = [str(Path(spec.origin).parent)]
    sys.modules.setdefault("torch_fidelity", package)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.save(made_up.weights(Inception().state_dict()), tmp_path / "weights.pth")
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(tmp_path / "weights.pth"))
    images = made_up.images(2, 320, 256)
    ours = open_features([f"inception={inception_file}"])["inception"]
    torch.testing.assert_close(ours.features(images), theirs(images)[0], rtol=1e-4, atol=1e-4)


def test_resizing_is_tensorflows():
    """Pixel i of the result reads at i * old / new: whole places give whole pixels, the last ones stay at the edge."""
    line = torch.tensor([0.0, 10.0, 20.0, 40.0])[None, None, None, :].expand(1, 1, 2, 4)
    up = resized_as_tensorflow(line, 8)[0, 0]
    assert up.shape == (8, 8) and up[0].tolist() == [0, 5, 10, 15, 20, 30, 40, 40]
    assert resized_as_tensorflow(line, 2)[0, 0].tolist() == [[0, 20], [0, 20]]  # every second one, without smoothing


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_torchmetrics(net, tmp_path, monkeypatch):
    lpips = pytest.importorskip("torchmetrics.functional.image.lpips")
    network = backbone(net)
    network.load_state_dict(made_up.weights(network.state_dict()))
    # torchvision's file holds the classifier as well.
    save_file({f"features.{k}": v for k, v in network.state_dict().items()} | {"classifier.1.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda *_: network)
    theirs = lpips._NoTrainLpips(net=net)
    images = made_up.images(4, 64, 72)
    found = open_features([f"lpips={tmp_path}"])["lpips"]
    torch.testing.assert_close(found.distances(images[:2], images[2:]), theirs(images[:2] / 127.5 - 1, images[2:] / 127.5 - 1).flatten(), rtol=1e-3, atol=1e-6)
    assert found.distances(images, images).tolist() == [0] * 4 and found.kind == "distance"
    with pytest.raises(ValueError, match="one shape"):
        found.distances(images, images[:2])


def image_reward_state():
    """A small checkpoint under its published names; the weights of each part by its own names, as REWARDS has them."""
    width, hidden = 192, 128
    vision = {"cls_token": (1, 1, width), "pos_embed": (1, 17, width), "patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    vision |= {"norm.weight": (width,), "norm.bias": (width,)}
    for i in range(3):
        for part, outputs, inputs in (("attn.qkv", 3 * width, width), ("attn.proj", width, width), ("mlp.fc1", 4 * width, width), ("mlp.fc2", width, 4 * width)):
            vision |= {f"blocks.{i}.{part}.weight": (outputs, inputs), f"blocks.{i}.{part}.bias": (outputs,)}
        for part in ("norm1", "norm2"):
            vision |= {f"blocks.{i}.{part}.weight": (width,), f"blocks.{i}.{part}.bias": (width,)}
    config = transformers.BlipTextConfig(
        vocab_size=60, hidden_size=hidden, encoder_hidden_size=width, intermediate_size=200, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=40, is_decoder=True,
    )  # fmt: skip
    text = transformers.BlipTextModel(config, add_pooling_layer=False).state_dict() | {"embeddings.position_ids": torch.arange(40)[None]}
    head = {}
    for number, outputs, inputs in ((0, 1024, hidden), (2, 128, 1024), (4, 64, 128), (6, 16, 64), (7, 1, 16)):
        head |= {f"{number}.weight": (outputs, inputs), f"{number}.bias": (outputs,)}
    empty = [{name: torch.empty(shape) for name, shape in part.items()} for part in (vision, head)]
    named = {VISION: made_up.weights(empty[0]), TEXT: made_up.weights(text), HEAD: made_up.weights(empty[1])}
    return {prefix + name: tensor for prefix, part in named.items() for name, tensor in part.items()} | {"blip.vision_proj.weight": torch.zeros(2)}


def test_image_reward_is_that_of_the_published_code(tmp_path, monkeypatch):
    monkeypatch.setenv("REFLOW_PICKLES", "1")
    torch.save(image_reward_state(), tmp_path / "ImageReward.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "cat", *(f"w{i}" for i in range(52))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    score = open_features([f"image_reward={tmp_path}"])["image_reward"]
    images, prompts = made_up.images(3, 80, 80), ["a cat", "b", "a " * 50]
    assert score.scores(images, prompts).tolist() == pytest.approx(REWARDS, abs=1e-3)
    assert score.truncated == 1 and score.kind == "score"
    alone = torch.cat([score.scores(images[i : i + 1], prompts[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(score.scores(images, prompts), alone, rtol=1e-3, atol=1e-4)


def test_image_reward_names_and_sizes():
    state = image_reward_state()
    vision, text = configs_of(state)
    parts = split(state)
    networks = transformers.BlipVisionModel(vision), transformers.BlipTextModel(text, add_pooling_layer=False)
    for network, part in zip(networks, parts):
        assert {k: v.shape for k, v in part.items()} == {k: v.shape for k, v in network.state_dict().items()}
    assert set(parts[2]) == {f"{i}.{kind}" for i in (0, 2, 4, 6, 7) for kind in ("weight", "bias")}
    assert vision.layer_norm_eps == 1e-6 and vision.image_size == 64 and text.num_attention_heads == 2


def test_dinov2_is_the_class_token_of_a_square_image(tmp_path):
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    model = transformers.Dinov2Model(config).eval()
    model.load_state_dict(made_up.weights(model.state_dict()))
    model.save_pretrained(tmp_path)
    images = made_up.images(2, 60, 90)
    pictures = [np.asarray(Image.fromarray(i.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)) for i in images]
    pixels = torch.stack([torch.from_numpy(p.copy()).permute(2, 0, 1) / 255 for p in pictures])
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        want = model(pixel_values=(pixels - mean) / std).pooler_output
    found = open_features([f"dinov2={tmp_path}"])["dinov2"]
    torch.testing.assert_close(found.features(images), want, rtol=1e-3, atol=1e-4)


def test_clips_preprocessing_is_pillows():
    image = made_up.images(1, 50, 70)
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((44, 32), Image.Resampling.BICUBIC).crop((6, 0, 38, 32))
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    want = (torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255 - mean) / std
    torch.testing.assert_close(processed(pillow(32), image)[0], want)


def test_patches():
    images = made_up.images(5, 40, 60)
    assert torch.equal(patches(images, size=20), images[:, :, 10:30, 20:40])
    some = patches(images, range(5), 20, seed=1)
    assert some.shape == (5, 3, 20, 20) and torch.equal(some, patches(images, range(5), 20, seed=1)) and not torch.equal(some, patches(images, range(5), 20, seed=2))
    assert torch.equal(patches(images[3:], [3, 4], 20, seed=1), some[3:])  # a place depends on the image's number, not on its batch
    for image, piece in zip(images, some):
        assert any(torch.equal(image[:, y : y + 20, x : x + 20], piece) for y in range(21) for x in range(41))
    assert patches(images, range(5), 40).shape == (5, 3, 40, 40)
    corners = torch.arange(9, dtype=torch.uint8).reshape(1, 1, 3, 3).expand(200, 3, 3, 3)
    counts = torch.bincount(patches(corners, range(200), 2)[:, 0, 0, 0].long(), minlength=5)
    assert counts.sum() == 200 and min(counts[[0, 1, 3, 4]]) > 25  # each of the four places is drawn, 50 times but for chance
    with pytest.raises(ValueError, match="got 40 x 60"):
        patches(images, size=41)
