"""Small Stable Diffusion pipelines of the real classes, with the real block layout, from configs alone: no download."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

transformers.logging.set_verbosity_error()

TOKENS = 12
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def ddim(prediction_type: str = "epsilon", **changes: Any) -> DDIMScheduler:
    """The scheduler of a base, with SD1.5's betas; leading spacing, as the published folders have it."""
    return DDIMScheduler(
        **{
            **BETAS,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "prediction_type": prediction_type,
            **changes,
        }
    )


def tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = letters + [letter + "</w>" for letter in letters] + ["!", "!</w>", "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=TOKENS, pad_token=pad
    )


def text_config(tok: CLIPTokenizer, width: int, **changes: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        **{
            "vocab_size": len(tok),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": TOKENS,
            "projection_dim": width,
            "bos_token_id": tok.bos_token_id,
            "eos_token_id": tok.eos_token_id,
            "pad_token_id": tok.pad_token_id,
            "hidden_act": "quick_gelu",
            **changes,
        }
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def sd15_unet(**changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (8, 16, 24, 24),
            "layers_per_block": 2,
            "norm_num_groups": 4,
            "cross_attention_dim": 32,
            "attention_head_dim": 2,
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            **changes,
        }
    )


def sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16, 24),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=32 + 48,
        attention_head_dim=(1, 2, 2),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=40 + 6 * 8,
    )


def sd15(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tok = tokenizer()
        return StableDiffusionPipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(text_config(tok, 32)),
            tokenizer=tok,
            unet=sd15_unet(),
            scheduler=ddim(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def sdxl(prediction_type: str = "epsilon") -> StableDiffusionXLPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tok, tok_2 = tokenizer(), tokenizer("!")
        return StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(text_config(tok, 32)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(tok_2, 48, projection_dim=40, hidden_act="gelu")),
            tokenizer=tok,
            tokenizer_2=tok_2,
            unet=sdxl_unet(),
            scheduler=ddim(prediction_type),
            add_watermarker=False,
        )


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def controlnet(pipe: Any) -> ControlNetModel:
    """A ControlNet of this pipeline's UNet whose residuals are not zero, as those of a new one are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = ControlNetModel.from_unet(pipe.unet, conditioning_channels=3).eval()
        for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            torch.nn.init.normal_(block.weight, std=0.3)
        torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=30.0)
    return net


def image_encoder(width: int = 24) -> tuple[CLIPVisionModelWithProjection, CLIPImageProcessor]:
    """CLIP's image half, as IP-Adapters read it: images of 32 pixels to embeddings [B, width]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        config = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
            projection_dim=width,
        )
        processor = CLIPImageProcessor(crop_size={"height": 32, "width": 32}, size={"shortest_edge": 32})
        return CLIPVisionModelWithProjection(config).eval(), processor


def ip_adapter(unet: UNet2DConditionModel, width: int = 24, tokens: int = 4) -> dict[str, torch.Tensor]:
    """Random weights of an IP-Adapter for this UNet, named as the published files."""
    g = torch.Generator().manual_seed(3)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=g)

    cross = unet.config.cross_attention_dim
    state = {
        "image_proj.proj.weight": normal(tokens * cross, width, scale=width**-0.5),
        "image_proj.proj.bias": torch.zeros(tokens * cross),
        "image_proj.norm.weight": torch.ones(cross),
        "image_proj.norm.bias": torch.zeros(cross),
    }
    # The published files count all attention processors, self and cross in turn; only cross ones have weights.
    for number, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            shape = attention.to_k.weight.shape
            for key in ("to_k_ip", "to_v_ip"):
                state[f"ip_adapter.{number}.{key}.weight"] = normal(*shape, scale=shape[1] ** -0.5)
    return state


def lora(unet: UNet2DConditionModel, rank: int = 2, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """A random LoRA on every attention projection of this UNet, named as diffusers saves one."""
    g = torch.Generator().manual_seed(4)
    state = {}
    for name, module in unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            outputs, inputs = module.weight.shape
            state[f"unet.{name}.lora_A.weight"] = scale * torch.randn(rank, inputs, generator=g)
            state[f"unet.{name}.lora_B.weight"] = scale * torch.randn(outputs, rank, generator=g)
    return state
