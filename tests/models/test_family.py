"""Families read any diffusers folder of their kind, and say what is wrong with one that is not whole."""

import json
import shutil

import pytest
import torch

from reflow.errors import UserError
from reflow.models import Conditioning, denoise, digits, family
from reflow.models.folder import find_folder


def tiny_sd15(folder):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer, _ = digits.build_tokenizers()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        **{**digits.VAE, "in_channels": 3, "out_channels": 3, "scaling_factor": 0.7, "shift_factor": 0.1}
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sd15_folder(tmp_path_factory):
    return tiny_sd15(tmp_path_factory.mktemp("sd15"))


@pytest.fixture
def broken(tmp_path):
    """A copy of the digits folder to damage."""
    return shutil.copytree(digits.BUILTIN, tmp_path / "model")


def test_sdxl_text_equals_the_pipeline():
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(digits.BUILTIN)
    base = family("sdxl").load(digits.BUILTIN)
    prompts = ["a handwritten six", "a photograph of something else entirely, in very many words"]
    hidden, null, pooled, null_pooled = pipe.encode_prompt(prompts, do_classifier_free_guidance=True)
    text, empty = base.encode_prompts(prompts), base.null_conditioning(2)
    for ours, theirs in (
        (text.encoder_hidden_states, hidden),
        (text.text_embeds, pooled),
        (empty.encoder_hidden_states, null),
        (empty.text_embeds, null_pooled),
    ):
        torch.testing.assert_close(ours, theirs)


def test_sdxl_null_prompt_is_zeros_where_the_pipeline_says_so(broken):
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": True}))
    null = family("sdxl").load(broken, parts=("text",)).null_conditioning(3)
    assert (
        null.encoder_hidden_states.shape == (3, 16, 64)
        and not null.encoder_hidden_states.any()
        and not null.text_embeds.any()
    )
    assert null.time_ids[2].tolist() == [16, 16, 0, 0, 16, 16]


def test_sd15_folder_has_no_pooled_text(sd15_folder):
    from diffusers import StableDiffusionPipeline

    base = family("sd15").load(sd15_folder)
    pipe = StableDiffusionPipeline.from_pretrained(sd15_folder)
    hidden, null = pipe.encode_prompt(["a handwritten six"], "cpu", 1, True)
    text = base.encode_prompts(["a handwritten six"])
    assert text.text_embeds is None and text.time_ids is None
    torch.testing.assert_close(text.encoder_hidden_states, hidden)
    torch.testing.assert_close(base.null_conditioning(1).encoder_hidden_states, null)
    assert base.prediction_type == "v_prediction" and base.latent_shape(32) == (4, 16, 16)
    with torch.no_grad():
        output = denoise(
            base.unet, torch.randn(2, 4, 8, 8), torch.tensor([999.0, 10.0]), text.select(torch.tensor([0, 0]))
        )
    assert output.shape == (2, 4, 8, 8)


def test_latents_use_scale_and_shift_of_the_vae(sd15_folder):
    base = family("sd15").load(sd15_folder, parts=("vae",))
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    raw = base.vae.encode(pixels).latent_dist.mode()
    latents = base.encode_images(pixels)
    torch.testing.assert_close(latents, (raw - 0.1) * 0.7)
    torch.testing.assert_close(base.decode(latents), base.vae.decode(raw).sample.clamp(-1, 1), atol=1e-5, rtol=1e-5)
    assert base.unet is None and not base.text_encoders
    drawn = base.encode_images(pixels, torch.Generator().manual_seed(0))
    assert not torch.equal(drawn, latents)


def test_a_vae_that_overflows_in_half_precision_stays_fp32(sd15_folder, tmp_path):
    folder = shutil.copytree(sd15_folder, tmp_path / "model")
    for flag, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        config = json.loads((folder / "vae" / "config.json").read_text())
        (folder / "vae" / "config.json").write_text(json.dumps({**config, "force_upcast": flag}))
        base = family("sd15").load(folder, dtype=torch.bfloat16)
        assert base.vae.dtype == dtype and base.unet.dtype == torch.bfloat16
        assert base.encode_images(torch.zeros(1, 3, 16, 16)).dtype == torch.float32


def test_conditioning_rows():
    a = Conditioning(torch.arange(6.0).reshape(3, 2, 1), torch.arange(3.0)[:, None], torch.zeros(3, 6))
    b = Conditioning(-a.encoder_hidden_states, -a.text_embeds, torch.ones(3, 6))
    mask = torch.tensor([True, False, True])
    mixed = a.where(mask, b)
    assert mixed.text_embeds[:, 0].tolist() == [0, -1, 2] and mixed.time_ids[:, 0].tolist() == [0, 1, 0]
    assert mixed.encoder_hidden_states[1, :, 0].tolist() == [-2, -3]
    assert len(a.cat(b)) == 6 and a.cat(b).select(torch.tensor([5])).text_embeds.item() == -2
    assert a.to(dtype=torch.bfloat16).text_embeds.dtype == torch.bfloat16
    assert a.select(slice(0, 1)).expand(4).encoder_hidden_states.shape == (4, 2, 1)
    with pytest.raises(ValueError, match="only one has text_embeds"):
        a.cat(Conditioning(a.encoder_hidden_states))


def test_unknown_family_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'sd15'"):
        family("sd1.5")


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(UserError, match=r"no diffusers pipeline: it has no model_index.json"):
        family("sdxl").load(tmp_path)


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="There is no folder .*nowhere"):
        family("sdxl").load(tmp_path / "nowhere")


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "model.txt").write_bytes(b"")
    with pytest.raises(UserError, match="neither a diffusers folder nor a checkpoint"):
        family("sd15").load(tmp_path / "model.txt")


def test_another_kind_of_pipeline(sd15_folder):
    with pytest.raises(
        UserError, match="holds a StableDiffusionPipeline, but the family 'sdxl' takes StableDiffusionXLPipeline"
    ):
        family("sdxl").load(sd15_folder)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors"])
def test_truncated_weights(broken, name):
    file = broken / name
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=rf"{name} is damaged or cut short"):
        family("digits").load(broken)


@pytest.mark.parametrize("name", ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_missing_weights(broken, name):
    (broken / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is missing\. Download"):
        family("digits").load(broken)


def test_weights_without_a_tensor(broken):
    from safetensors.torch import load_file, save_file

    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        weights = load_file(broken / name)
        dropped = sorted(weights)[0]
        weights.pop(dropped)
        save_file(weights, broken / name, metadata={"format": "pt"})
        part = "unet" if name.startswith("unet") else "text"
        with pytest.raises(UserError, match="lack 1 tensors, the first is"):
            family("digits").load(broken, parts=(part,))


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_missing_and_damaged_configs(broken, name):
    (broken / name).write_text("{")
    with pytest.raises(UserError, match=rf"{name} is not readable JSON"):
        family("digits").load(broken)
    (broken / name).write_text("[1]")
    with pytest.raises(UserError, match=rf"{name} is not readable JSON \(it holds a list"):
        family("digits").load(broken)
    (broken / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is missing"):
        family("digits").load(broken)


@pytest.mark.parametrize("change", [{"beta_schedule": "odd"}, {"beta_start": None}, {"beta_start": "x"}, {"trained_betas": "abc"},
                                    {"trained_betas": {}}, {"num_train_timesteps": "many"}, {"num_train_timesteps": -3}], ids=str)  # fmt: skip
def test_a_scheduler_config_without_a_schedule(broken, change):
    file = broken / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=r"scheduler_config.json describes no noise schedule that can be read \(\S.*\S\)\. Download"):
        family("digits").load(broken, parts=("unet",))


def test_missing_tokenizer(broken):
    shutil.rmtree(broken / "tokenizer_2")
    with pytest.raises(UserError, match="tokenizer_2 has no tokenizer"):
        family("digits").load(broken)


@pytest.mark.parametrize("variant", ["fp16", "v0-fix"])
def test_weights_of_a_variant_load(broken, variant):
    for file in broken.rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))
    base = family("digits").load(broken)
    stock = family("digits").load("builtin")
    assert all(torch.equal(a, b) for a, b in zip(base.unet.parameters(), stock.unet.parameters(), strict=True))


UNET = "unet/diffusion_pytorch_model"


@pytest.mark.parametrize(
    "files, variant",
    [
        ([f"{UNET}.v0-fix.safetensors", "vae/diffusion_pytorch_model.safetensors"], "v0-fix"),
        ([f"{UNET}.fp16.safetensors", f"{UNET}.v0-fix.safetensors"], "fp16"),
        ([f"{UNET}.fp16-00001-of-00002.safetensors", f"{UNET}.safetensors.index.fp16.json"], "fp16"),
        ([f"{UNET}.safetensors", f"{UNET}.fp16.safetensors"], None),
        ([f"{UNET}.bin", f"{UNET}.v0-fix.safetensors"], "v0-fix"),
        ([f"{UNET}.bin"], None),
        (None, None),
    ],
)
def test_the_variant_of_a_hub_repository_is_downloaded(monkeypatch, tmp_path, files, variant):
    """Without its name diffusers downloads the configs, and no weights."""
    import huggingface_hub
    from diffusers import DiffusionPipeline

    def listed(self, name):
        if files is None:
            raise ConnectionError("offline")
        return files

    asked = []
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name, variant: asked.append((name, variant)) or tmp_path)
    assert find_folder("some/model") == tmp_path and asked == [("some/model", variant)]


def test_a_resolution_that_does_not_fit():
    base = family("digits").load(parts=())
    with pytest.raises(UserError, match="write a multiple of 4"):
        base.latent_shape(18)


def test_a_part_that_was_not_loaded():
    base = family("digits").load(parts=("unet",))
    with pytest.raises(ValueError, match="without its VAE"):
        base.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="without its text encoders"):
        base.encode_prompts(["a handwritten one"])
