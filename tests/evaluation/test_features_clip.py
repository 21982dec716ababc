"""CLIP and the scores made of it, from tiny models of the real classes in folders and under open_clip's names."""

import pytest
import torch
import transformers

import made_up
import tiny_pipelines
from reflow.evaluation.features.open_clip_names import config_of, to_clip_model
from reflow.evaluation.features.opening import open_features
from reflow.evaluation.features.preprocessing import CLIP_MEAN, CLIP_STD, longest_edge, pillow, processed

PROMPTS = ["a cat", "b", "abcdefghijklmnopqrstuvwxyz"]


def tiny_clip(text=64, vision=128, act="quick_gelu"):
    tokens = tiny_pipelines.tokenizer()
    config = transformers.CLIPConfig(
        text_config=tiny_pipelines.text_config(tokens, text, num_attention_heads=text // 64, projection_dim=48, hidden_act=act).to_dict(),
        vision_config=dict(
            hidden_size=vision, intermediate_size=96, num_hidden_layers=3, num_attention_heads=vision // 64, image_size=56, patch_size=14, projection_dim=48,
            hidden_act=act,
        ),
        projection_dim=48,
    )  # fmt: skip
    model = transformers.CLIPModel(config).eval()
    model.load_state_dict(made_up.weights(model.state_dict()))
    return model, tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("clip")
    model, tokens = tiny_clip()
    model.save_pretrained(place)
    tokens.save_pretrained(place)
    pillow(56).save_pretrained(place)
    return place


def embeddings(model, tokens, pixels):
    """By the library's own calls, a prompt at a time, so without padding."""
    with torch.no_grad():
        image = model.get_image_features(pixel_values=pixels).pooler_output
        texts = [tokens(prompt, truncation=True, max_length=12, return_tensors="pt") for prompt in PROMPTS]
        text = torch.cat([model.get_text_features(**one).pooler_output for one in texts])
    cosine = (image / image.norm(dim=1, keepdim=True) * (text / text.norm(dim=1, keepdim=True))).sum(1)
    return image, cosine


def test_clip_features_and_score_are_those_of_the_model(folder):
    model, tokens = tiny_clip()
    images = made_up.images(3, 60, 80)
    image, cosine = embeddings(model, tokens, processed(pillow(56), images))
    found = open_features([f"clip={folder}"])
    assert list(found) == ["clip", "clip_score"] and [f.kind for f in found.values()] == ["features", "score"]
    torch.testing.assert_close(found["clip"].features(images), image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["clip_score"].scores(images, PROMPTS), 100 * cosine.clamp_min(0), rtol=1e-4, atol=1e-4)
    assert torch.equal(found["clip"].scores(images, PROMPTS), found["clip_score"].scores(images, PROMPTS))
    assert (cosine < 0).any()  # the score of an image that has nothing to do with its prompt is 0


def test_prompts_that_are_cut_are_counted_once(folder):
    score = open_features([f"clip={folder}"])["clip_score"]
    assert score.truncated == 0 and "cut at 12 tokens" in score.implementation
    images = made_up.images(4, 56, 56)
    score.scores(images, [PROMPTS[2], "a", PROMPTS[2], "b c d e f g h i j k l m n"])
    score.scores(images[:1], [PROMPTS[2]])
    assert score.truncated == 2
    with pytest.raises(ValueError, match="4 images and 1 prompts"):
        score.scores(images, ["a"])


def test_a_prompt_scores_the_same_whatever_stands_beside_it(folder):
    score = open_features([f"clip={folder}"])["clip_score"]
    images = made_up.images(3, 56, 56)
    alone = torch.cat([score.scores(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(score.scores(images, PROMPTS), alone, rtol=1e-4, atol=1e-4)


def test_pickscore(folder):
    model, tokens = tiny_clip()
    images = made_up.images(3, 60, 80)
    _, cosine = embeddings(model, tokens, processed(pillow(56), images))
    score = open_features([f"pickscore={folder}"])["pickscore"]
    torch.testing.assert_close(score.scores(images, PROMPTS), model.logit_scale.exp().detach() * cosine, rtol=1e-4, atol=1e-4)


def test_the_folders_own_preprocessing_is_used_and_clips_where_it_has_none(folder, tmp_path):
    model, tokens = tiny_clip()
    model.save_pretrained(tmp_path)
    tokens.save_pretrained(tmp_path)
    images = made_up.images(2, 60, 80)
    plain = open_features([f"clip={tmp_path}"])["clip"].features(images)
    torch.testing.assert_close(plain, open_features([f"clip={folder}"])["clip"].features(images))
    pillow(56, square=True).save_pretrained(tmp_path)
    assert not torch.allclose(open_features([f"clip={tmp_path}"])["clip"].features(images), plain, atol=1e-3)


def shapes(text, text_layers, vision, vision_layers):
    """Names and shapes of open_clip's CLIP with 56 tokens, 12 places, 56 pixels in patches of 14, embeddings of 48."""
    state = {
        "positional_embedding": (12, text), "text_projection": (text, 48), "logit_scale": (), "token_embedding.weight": (56, text),
        "visual.class_embedding": (vision,), "visual.positional_embedding": (17, vision), "visual.proj": (vision, 48), "visual.conv1.weight": (vision, 3, 14, 14),
    }  # fmt: skip
    for name, width in (("visual.ln_pre", vision), ("visual.ln_post", vision), ("ln_final", text)):
        state |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for prefix, width, layers in (("", text, text_layers), ("visual.", vision, vision_layers)):
        for i in range(layers):
            block = f"{prefix}transformer.resblocks.{i}."
            parts = {"attn.out_proj": (width, width), "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
            state |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
            for part in ("ln_1", "ln_2"):
                state |= {f"{block}{part}.weight": (width,), f"{block}{part}.bias": (width,)}
            for part, shape in parts.items():
                state |= {f"{block}{part}.weight": shape, f"{block}{part}.bias": shape[:1]}
    return {name: torch.empty(shape) for name, shape in state.items()}


# What HPSv2 1.2's own open_clip gives for these weights, images and prompts (fp32, torch 2.13 on a CPU).
HPS = [-0.05977595970034599, -0.2007765769958496, -0.09369385242462158]


def test_hps_of_an_open_clip_checkpoint_is_that_of_the_published_code(tmp_path, monkeypatch):
    monkeypatch.setenv("REFLOW_PICKLES", "1")
    torch.save({"epoch": 1, "state_dict": made_up.weights(shapes(64, 2, 128, 3))}, tmp_path / "HPS_v2.1_compressed.pt")
    tiny_pipelines.tokenizer().save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "HPS_v2.1_compressed.pt"):
        score = open_features([f"hpsv2={place}"])["hpsv2"]
        assert score.scores(made_up.images(3, 112, 96), PROMPTS).tolist() == pytest.approx(HPS, abs=1e-5)
        assert score.truncated == 1


def test_hps_of_a_transformers_folder_is_that_of_the_checkpoint(tmp_path):
    state = made_up.weights(shapes(64, 2, 128, 3))
    model = transformers.CLIPModel(config_of(state))
    model.load_state_dict(to_clip_model(state))
    model.save_pretrained(tmp_path)
    tiny_pipelines.tokenizer().save_pretrained(tmp_path)
    assert open_features([f"hpsv2={tmp_path}"])["hpsv2"].scores(made_up.images(3, 112, 96), PROMPTS).tolist() == pytest.approx(HPS, abs=1e-5)


def test_configs_of_published_sizes():
    """ViT-H/14, whose image heads are 80 wide, from shapes alone."""
    config = config_of({name: tensor.to("meta") for name, tensor in shapes(1024, 1, 1280, 1).items()})
    assert config.vision_config.num_attention_heads == config.text_config.num_attention_heads == 16
    assert config.vision_config.image_size == 56 and config.vision_config.patch_size == 14 and config.text_config.hidden_act == "gelu"


def test_every_tensor_of_the_checkpoint_lands_in_one_of_the_model():
    state = shapes(64, 2, 128, 3)
    model = transformers.CLIPModel(config_of(state))
    assert {name: tensor.shape for name, tensor in to_clip_model(state).items()} == {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert to_clip_model({"attn_mask": torch.zeros(1), "foreign": torch.zeros(1)}).keys() == {"foreign"}


def test_hps_preprocessing_keeps_the_whole_image():
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    same = made_up.images(1, 32, 32)
    torch.testing.assert_close(longest_edge(same, 32), (same / 255 - mean) / std)
    wide = longest_edge(made_up.images(1, 40, 80), 32) * std + mean
    assert wide.shape == (1, 3, 32, 32) and wide[:, :, :8].abs().max() < 1e-6 and wide[:, :, 24:].abs().max() < 1e-6 and wide[:, :, 8:24].mean() > 0.3
