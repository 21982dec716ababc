"""FLOPs of one UNet row, forward and backward, counted by torch's FlopCounterMode on meta tensors (2 a multiply-add).

Counting SDXL takes a while, so the counts of the shipped architectures stand in flops.json beside this file, each with
a digest of its config; a config that differs is counted again.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("flops.json")


@functools.cache
def _kept() -> dict[str, dict[str, Any]]:
    return json.loads(FILE.read_text()) if FILE.is_file() else {}


def digest(config: Mapping[str, Any], tokens: int) -> str:
    """What the counts depend on, as a short text."""
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps([plain, tokens], sort_keys=True).encode()).hexdigest()[:16]


def row(name: str, config: Mapping[str, Any], tokens: int) -> tuple[int, int]:
    """(forward, forward and backward) FLOPs of one row of the UNet `config` at its own sample size."""
    found = _kept().get(name)
    key = digest(config, tokens)
    if found is None or found["digest"] != key:
        forward, both = count(config, tokens)
        found = _kept()[name] = {"digest": key, "forward": forward, "forward_backward": both}
    return found["forward"], found["forward_backward"]


def count(config: Mapping[str, Any], tokens: int) -> tuple[int, int]:
    """As :func:`row`, counted now."""
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    from reflow.models.conditioning import Conditioning, denoise

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config))
        side = config["sample_size"]
        sample = torch.empty(1, config["in_channels"], side, side)
        pooled = times = None
        if config.get("addition_embed_type") == "text_time":
            width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            pooled, times = torch.empty(1, width), torch.empty(1, 6)
        rows = Conditioning(torch.empty(1, tokens, config["cross_attention_dim"]), pooled, times)
        timestep = torch.empty(1)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        denoise(unet, sample, timestep, rows)
    with FlopCounterMode(display=False) as both:
        denoise(unet, sample, timestep, rows).sum().backward()
    return forward.get_total_flops(), both.get_total_flops()
