"""What bases that are rectified flows have in common: a velocity network, a time shift, text encoded by the pipeline's own code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from reflow.errors import UserError
from reflow.flow import Rectified
from reflow.models.conditioning import Conditioning
from reflow.models.family import Base
from reflow.weights.guard import on_meta

DEFAULT_SIDE = 128  # latent cells of a side, of pipelines that hold no size of their own (FLUX, Qwen-Image)
Resolution = int | tuple[int, int] | None


class FlowBase(Base):
    """A transformer flow. A family sets `call`, the name under which its network is called, and makes rows of what `encode` gives."""

    call: ClassVar[str]
    patch: ClassVar[int] = 0  # latent cells of a token's side that the network's config does not tell

    @property
    def prediction_type(self) -> str:
        return "velocity"

    def schedule(self, resolution: Resolution = None) -> Rectified:
        return Rectified(self.shift(resolution))

    def shift(self, resolution: Resolution = None) -> float:
        """The base's own time shift at this size: static, or e^mu with mu linear in the number of image tokens (FLUX and its kin)."""
        config = self.scheduler_config
        if not config.get("use_dynamic_shifting"):
            return float(config.get("shift") or config.get("flow_shift") or 1.0)
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution or (self.resolution,) * 2
        tokens = (height // self.cell) * (width // self.cell)
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        first, last = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return math.exp(first + (last - first) * (tokens - low) / (high - low))

    @property
    def patch_size(self) -> int:
        """Latent cells of a token's side."""
        return self.patch or int(self.network_config.get("patch_size") or 1)

    @property
    def cell(self) -> int:
        """Pixels of a token's side."""
        return self.vae_scale_factor * self.patch_size

    @property
    def vae_scale_factor(self) -> int:
        widths = self.configs["vae"].get("encoder_block_out_channels") or self.configs["vae"].get("block_out_channels") or (0,) * 4
        return 2 ** (len(widths) - 1)

    @property
    def resolution(self) -> int:
        side = self.network_config.get("sample_size") or DEFAULT_SIDE
        return int(side) * self.vae_scale_factor

    @property
    def latent_channels(self) -> int:
        """Of the latents as the VAE makes them, before any packing."""
        return int(self.network_config["in_channels"])

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        resolution = resolution or self.resolution
        if resolution % self.cell:
            raise UserError(f"Resolution {resolution} does not fit the {self.family.name} base at {self.path}: write a multiple of {self.cell}.")
        side = resolution // self.vae_scale_factor
        return self.latent_channels, side, side

    def example_rows(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one row of conditioning, by name, as the pipeline's default call makes them."""
        raise NotImplementedError

    def example(self, dtype: torch.dtype) -> Conditioning:
        return Conditioning(call=self.call, **{name: torch.empty(1, *shape, dtype=dtype) for name, shape in self.example_rows().items()})

    def text_pipeline(self) -> Any:
        """The diffusers pipeline of this folder with its text encoders alone, whose own code encodes prompts. The network in it has a config
        and no weights."""
        if getattr(self, "_text_pipeline", None) is None:
            import diffusers

            kind = getattr(diffusers, self.family.pipelines[0])
            network = getattr(diffusers, self.family.network[1])
            self._text()
            missing = {name: None for name, value in self.configs["pipeline"].items() if value == [None, None]}
            parts = missing | {text.encoder: self.encoder_of(text.encoder) for text in self.family.encoders}
            parts |= {text.tokenizer: self.tokenizer_of(text.tokenizer) for text in self.family.encoders}
            hollow = on_meta(lambda: network.from_config(dict(self.network_config)), self.path / self.family.network[0] / "config.json")
            self._text_pipeline = kind(scheduler=None, vae=None, transformer=hollow, **parts)
        return self._text_pipeline

    def encoder_of(self, folder: str) -> Any:
        """The text encoder of a folder; None where this base leaves it out."""
        there = [text.encoder for text in self.family.encoders if text.encoder in self.configs]
        return self.text_encoders[there.index(folder)] if folder in there else None

    def tokenizer_of(self, folder: str) -> Any:
        there = [text.tokenizer for text in self.family.encoders if text.encoder in self.configs]
        return self.tokenizers[there.index(folder)] if folder in there else None

    def encode(self, prompts: Sequence[str], null: bool, device: torch.device) -> dict[str, torch.Tensor]:
        """Named rows of prompts, as the pipeline's default call makes them; null: as it makes what guidance moves away from."""
        raise NotImplementedError

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], resolution: Resolution = None) -> Conditioning:
        device = next(self._text()[0].parameters()).device
        return Conditioning(call=self.call, **self.encode(list(prompts), False, device))

    @torch.no_grad()
    def null_conditioning(self, batch: int = 1, resolution: Resolution = None) -> Conditioning:
        device = next(self._text()[0].parameters()).device
        rows = Conditioning(call=self.call, **self.encode([""], True, device))
        if self.zero_null:
            rows = rows.of([torch.zeros_like(tensor) for tensor in rows.tensors])
        return rows.select(torch.zeros(batch, dtype=torch.long, device=device))

    @property
    def zero_null(self) -> bool:
        return self.family.null_prompt == "zeros"


def packed(latents: torch.Tensor) -> torch.Tensor:
    """[B,C,h,w] as tokens [B, h/2 * w/2, 4C] of 2x2 cells, as FLUX and Qwen-Image have them."""
    batch, channels, height, width = latents.shape
    cells = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(batch, (height // 2) * (width // 2), 4 * channels)


def unpacked(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of `packed` for latents of this height and width."""
    batch, _, channels = tokens.shape
    cells = tokens.view(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(batch, channels // 4, height, width)
