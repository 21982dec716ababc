"""Small Stable Diffusion pipelines of the real classes, with the real block layout, from configs alone: no download."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

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
