"""The digits model: an SDXL in miniature, small enough to train from scratch on one CPU core.

Every part of SDXL is there, only smaller: two CLIP text encoders (the second with a projection), pooled embeddings,
time ids, a `text_time` UNet, an AutoencoderKL, eps-prediction on 1000 scaled-linear indices. An unmodified diffusers
loads the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from reflow.data import digits as data

BUILTIN = Path(__file__).parent / "weights" / "digits"
TOKENS = 16
TEXT_WIDTH = 32
TIME_WIDTH = 8

# Attention at 4x4 only: at 8x8 it doubles the cost of a step and buys nothing on digits.
UNET = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(32, 32),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=2 * TEXT_WIDTH,
    attention_head_dim=2,
    transformer_layers_per_block=1,
    use_linear_projection=True,
    norm_num_groups=8,
    addition_embed_type="text_time",
    addition_time_embed_dim=TIME_WIDTH,
    projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * TIME_WIDTH,
)
VAE = dict(
    in_channels=1,
    out_channels=1,
    latent_channels=4,
    block_out_channels=(16, 32),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=data.RESOLUTION,
    force_upcast=False,
)
SCHEDULER = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type="epsilon",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
    timestep_spacing="trailing",
)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte-level BPE with merges only for the words of the captions: (token -> id, merges).

    All 256 byte symbols are there, alone and at a word's end: an unknown symbol would become <|endoftext|>, where
    pooling stops.
    """
    # GPT-2's byte symbols: printable Latin-1 bytes stand for themselves, the others for the code points from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]
    tokens = symbols + [symbol + "</w>" for symbol in symbols]
    merges: list[tuple[str, str]] = []
    words = {word for label in range(10) for sentence in data.captions(label) for word in sentence.split()}
    for word in sorted(words):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            pieces[:2] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
                tokens.append(pieces[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, merges


def build_tokenizers() -> tuple[Any, Any]:
    """The two tokenizers; like SDXL's they differ in the padding token only (<|endoftext|> and "!")."""
    from transformers import CLIPTokenizer

    vocab, merges = vocabulary()
    return tuple(
        CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS, pad_token=pad)
        for pad in ("<|endoftext|>", "!")
    )


def text_settings(tokenizer: Any) -> dict[str, Any]:
    """What the configs of both text encoders have in common."""
    return dict(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        # 2 would select CLIP's legacy pooling by the largest id.
        eos_token_id=tokenizer.eos_token_id,
    )


def build(seed: int = 0) -> dict[str, Any]:
    """The untrained parts, named as StableDiffusionXLPipeline names them; initial weights are fixed by the seed."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer, tokenizer_2 = build_tokenizers()
    text = text_settings(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dict(
            vae=AutoencoderKL(**VAE),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(**text, hidden_act="quick_gelu", pad_token_id=tokenizer.pad_token_id)
            ),
            text_encoder_2=CLIPTextModelWithProjection(
                CLIPTextConfig(**text, hidden_act="gelu", pad_token_id=tokenizer_2.pad_token_id)
            ),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=UNet2DConditionModel(**UNET),
            scheduler=DDIMScheduler(**SCHEDULER),
        )
