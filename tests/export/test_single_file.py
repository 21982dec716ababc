"""Single files with the original key names: read back by diffusers itself, in small, and recognised at full size."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import tiny_pipelines
from reflow.errors import UserError
from reflow.export import export_single_file, single_file_state
from reflow.weights.original_names import (
    SD_CLIP_PREFIX,
    SDXL_CLIP_PREFIX,
    original_clip,
    original_open_clip,
    original_unet,
    original_vae,
)

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "base"
    pipe = request.getfixturevalue(request.param)
    pipe.save_pretrained(folder)
    g = torch.Generator().manual_seed(1)
    return (
        folder,
        pipe,
        {key: tensor + 0.02 * torch.randn(tensor.shape, generator=g) for key, tensor in pipe.unet.state_dict().items()},
    )


def test_diffusers_reads_every_weight_back(trained, tmp_path):
    base, pipe, state = trained
    file = export_single_file(base, state, tmp_path / "model.safetensors", dtype="fp32", metadata={"windows": 4})
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "windows": "4"}
    # Only configs and tokenizers may come from the folder: its weights are made unusable first.
    stripped = tmp_path / "configs"
    for source in base.rglob("*.json"):
        target = stripped / source.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    back = type(pipe).from_single_file(str(file), config=str(stripped), local_files_only=True)
    wanted = {"unet": state} | {part: getattr(pipe, part).state_dict() for part in PARTS[1:] if hasattr(pipe, part)}
    for part, want in wanted.items():
        got = getattr(back, part).state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want), part


def test_half_precision(trained, tmp_path):
    base, pipe, state = trained
    file = export_single_file(base, state, tmp_path / "model.safetensors")
    with safe_open(file, "pt") as opened:
        dtypes = {key: opened.get_slice(key).get_dtype() for key in opened.keys()}
    assert {kind for key, kind in dtypes.items() if not key.endswith("position_ids")} == {"F16"}
    back = type(pipe).from_single_file(str(file), config=str(base), local_files_only=True, torch_dtype=torch.float16)
    got = back.unet.state_dict()
    assert all(torch.equal(got[key], state[key].half()) for key in state)


def test_refusals(trained, tmp_path, monkeypatch):
    base, pipe, state = trained
    (tmp_path / "taken.safetensors").write_bytes(b"kept")
    with pytest.raises(UserError, match="already exists"):
        export_single_file(base, state, tmp_path / "taken.safetensors")
    with pytest.raises(UserError, match="must end in .safetensors"):
        export_single_file(base, state, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="conv_in.bias"):
        export_single_file(
            base,
            {key: tensor for key, tensor in state.items() if key != "conv_in.bias"},
            tmp_path / "model.safetensors",
        )
    assert [file.name for file in tmp_path.iterdir()] == ["taken.safetensors"]
    twin = tmp_path / "twin"
    if hasattr(pipe, "text_encoder_2"):
        same_width = CLIPTextModelWithProjection(
            tiny_pipelines.text_config(pipe.tokenizer_2, 32, projection_dim=40, hidden_act="gelu")
        )
        type(pipe)(**{**pipe.components, "text_encoder_2": same_width}, add_watermarker=False).save_pretrained(twin)
        message = "one width"
    else:
        second = CLIPTextModel(tiny_pipelines.text_config(pipe.tokenizer, 32, hidden_act="gelu"))
        type(pipe)(**{**pipe.components, "text_encoder": second}, requires_safety_checker=False).save_pretrained(twin)
        message = "SD2"
    with pytest.raises(UserError, match=message):
        single_file_state(twin, state)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_per_block": (1, 2, 2, 2)},
        {"down_block_types": ("ResnetDownsampleBlock2D",) + ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",)},
        {"addition_embed_type": "text"},
    ],
)
def test_layouts_without_an_original_format_are_refused(changes):
    unet = tiny_pipelines.sd15_unet(**changes)
    with pytest.raises(UserError, match="diffusers folder"):
        original_unet(unet.state_dict(), unet.config)


# The published configs (block layout and widths), on the meta device: no memory, every name and shape.
SD15_UNET = dict(
    block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8, sample_size=64
)
SDXL_UNET = dict(
    block_out_channels=(320, 640, 1280),
    cross_attention_dim=2048,
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    use_linear_projection=True,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    sample_size=128,
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
CLIP_L = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    vocab_size=49408,
    projection_dim=768,
)
CLIP_G = dict(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    vocab_size=49408,
    projection_dim=1280,
)


def full_size(unet, sdxl):
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**unet), AutoencoderKL(**VAE)
        clip = CLIPTextModel(CLIPTextConfig(**CLIP_L))
        state = original_unet(unet.state_dict(), unet.config) | original_vae(vae.state_dict(), vae.config)
        state |= original_clip(clip.state_dict(), SDXL_CLIP_PREFIX if sdxl else SD_CLIP_PREFIX)
        if sdxl:
            state |= original_open_clip(CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G)).state_dict())
    return state


def test_full_size_sd15_has_the_names_of_the_published_file():
    state = full_size(SD15_UNET, sdxl=False)
    assert infer_diffusers_model_type(state) == "v1"
    # The published v1-5-pruned-emaonly file: 686 UNet, 248 VAE and 197 text tensors.
    assert [
        sum(key.startswith(prefix) for key in state)
        for prefix in ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
    ] == [686, 248, 197]
    shapes = {
        "model.diffusion_model.time_embed.0.weight": (1280, 320),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.11.0.in_layers.2.weight": (320, 640, 3, 3),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.encoder.down.2.downsample.conv.bias": (512,),
        "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight": (768, 768),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_full_size_sdxl_has_the_names_of_the_published_file():
    state = full_size(SDXL_UNET, sdxl=True)
    assert infer_diffusers_model_type(state) == "xl_base"
    # The published sd_xl_base_1.0 file: 1680 UNet, 248 VAE, 197 and 390 text tensors, one of which (logit_scale)
    # diffusers does not keep.
    prefixes = ("model.diffusion_model.", "first_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1.")
    assert [sum(key.startswith(prefix) for key in state) for prefix in prefixes] == [1680, 248, 197, 389]
    shapes = {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.bias": (5120,),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
        "conditioner.embedders.1.model.ln_final.bias": (1280,),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
