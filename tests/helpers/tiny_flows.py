"""Small pipelines of the real classes whose bases are rectified flows, random weights, made in a second without any download."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tiny_pipelines import text_config, tokenizer

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def ready(pipe: Any) -> Any:
    """As a folder that is read: nothing drops out."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def t5(width: int = 24) -> tuple[T5EncoderModel, T5TokenizerFast]:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tok = T5TokenizerFast(vocab=special + [(letter, -3.0) for letter in LETTERS], extra_ids=0, model_max_length=64)
    config = T5Config(vocab_size=len(tok) + 2, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    return T5EncoderModel(config), tok


def gemma() -> tuple[Gemma2Model, GemmaTokenizerFast]:
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    tok = GemmaTokenizerFast(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=300)
    config = Gemma2Config(
        vocab_size=len(tok) + 2, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        query_pre_attn_scalar=8,
    )  # fmt: skip
    return Gemma2Model(config), tok


def vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5,
        shift_factor=0.06,
    )


def sd3(*, with_t5: bool = True) -> StableDiffusion3Pipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tok = tokenizer()
        encoder, tok_3 = t5() if with_t5 else (None, None)
        pipe = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=24,
                caption_projection_dim=16,
                pooled_projection_dim=20,
                pos_embed_max_size=8,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(4),
            text_encoder=CLIPTextModelWithProjection(text_config(tok, 8)),
            tokenizer=tok,
            text_encoder_2=CLIPTextModelWithProjection(text_config(tok, 12, hidden_act="gelu")),
            tokenizer_2=tok,
            text_encoder_3=encoder,
            tokenizer_3=tok_3,
        )
        return ready(pipe)


def flux(*, guidance: bool = True) -> FluxPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tok = tokenizer()
        encoder, tok_2 = t5()
        pipe = FluxPipeline(
            transformer=FluxTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=24,
                pooled_projection_dim=16,
                guidance_embeds=guidance,
                axes_dims_rope=(2, 2, 4),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True) if guidance else FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=vae(4),
            text_encoder=CLIPTextModel(text_config(tok, 16)),
            tokenizer=tok,
            text_encoder_2=encoder,
            tokenizer_2=tok_2,
        )
        return ready(pipe)


def sana() -> SanaPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder, tok = gemma()
        pipe = SanaPipeline(
            transformer=SanaTransformer2DModel(
                patch_size=1,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                num_attention_heads=2,
                attention_head_dim=4,
                num_cross_attention_heads=2,
                cross_attention_head_dim=4,
                cross_attention_dim=8,
                caption_channels=16,
                sample_size=8,
                mlp_ratio=2.0,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=AutoencoderDC(
                in_channels=3,
                latent_channels=4,
                attention_head_dim=2,
                encoder_block_types=("ResBlock", "EfficientViTBlock"),
                decoder_block_types=("ResBlock", "EfficientViTBlock"),
                encoder_block_out_channels=(8, 8),
                decoder_block_out_channels=(8, 8),
                encoder_qkv_multiscales=((), (5,)),
                decoder_qkv_multiscales=((), (5,)),
                encoder_layers_per_block=(1, 1),
                decoder_layers_per_block=[1, 1],
                downsample_block_type="conv",
                upsample_block_type="interpolate",
                decoder_norm_types="rms_norm",
                decoder_act_fns="silu",
                scaling_factor=0.41407,
            ),
            text_encoder=encoder,
            tokenizer=tok,
        )
        return ready(pipe)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Of bytes, with the marks of a chat and a template in the way of Qwen's own."""
    bytes_ = sorted(bytes_to_unicode().values())
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    return Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(bytes_)}, merges=[], model_max_length=2048, chat_template=template,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip


def qwen_image() -> QwenImagePipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tok = qwen_tokenizer()
        config = Qwen2_5_VLConfig(
            text_config=dict(
                vocab_size=len(tok), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
            ),
            vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16),
        )  # fmt: skip
        pipe = QwenImagePipeline(
            transformer=QwenImageTransformer2DModel(
                in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
                axes_dims_rope=(4, 6, 6),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
            ),
            vae=AutoencoderKLQwenImage(
                base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=[-0.7, 0.1, 0.4, 0.9],
                latents_std=[2.8, 1.4, 2.3, 0.6],
            ),
            text_encoder=Qwen2_5_VLForConditionalGeneration(config),
            tokenizer=tok,
        )  # fmt: skip
        return ready(pipe)


def z_image() -> ZImagePipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tok = qwen_tokenizer()
        config = Qwen3Config(
            vocab_size=len(tok), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8
        )
        pipe = ZImagePipeline(
            transformer=ZImageTransformer2DModel(
                in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6],
                axes_lens=[1024, 64, 64],
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(4),
            text_encoder=Qwen3Model(config),
            tokenizer=tok,
        )  # fmt: skip
        return ready(pipe)
