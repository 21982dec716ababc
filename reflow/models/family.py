"""What a model family provides: a diffusers folder read into its parts, encoders, and one way to call the UNet.

SD1.5, SDXL and the digits model are all latent diffusion with CLIP text, so one `Base` serves them; a `Family` says
which pipelines it takes, whether the text is pooled, and which folder is its default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from reflow.errors import UserError
from reflow.flow import DiscreteVP, Schedule
from reflow.models.conditioning import Conditioning, unet_rows

PARTS = ("unet", "vae", "text")


# What pipelines of diffusers call the rows that a network is given, where a call hands over ready rows and no prompt.
OF_PIPELINE = {
    "encoder_hidden_states": "prompt_embeds",
    "encoder_attention_mask": "prompt_attention_mask",
    "encoder_hidden_states_mask": "prompt_embeds_mask",
    "pooled_projections": "pooled_prompt_embeds",
    "text_embeds": "pooled_prompt_embeds",
}
CHARACTERS = 100  # of a token at most: the longest of CLIP's vocabulary has 64


def head_of(text: str, tokens: int) -> str:
    """What of a text decides its first `tokens` tokens: a tokenizer takes some 200 bytes of memory for each byte of it.

    Runs of blanks count once, as the tokenizers read them. A text that is not long is returned as it is.
    """
    if len(text) <= CHARACTERS * tokens:
        return text
    return " ".join(text.split())[: CHARACTERS * tokens]


@dataclass
class Base:
    """A pre-trained diffusion model, read from a diffusers folder. A part that was not asked for is None.

    Networks come in eval mode; VAE and text encoders are frozen. `configs` holds the config of every part, loaded or
    not, that of the network under its folder's name (`network_config`). `unet` is the network itself, which is a
    transformer where the family's `network` says so.
    """

    family: Family
    path: Path
    configs: Mapping[str, Mapping[str, Any]]
    unet: Any = None
    vae: Any = None
    tokenizers: Sequence[Any] = ()
    text_encoders: Sequence[Any] = ()

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The config of the base's scheduler: betas, number of indices, prediction_type."""
        return self.configs["scheduler"]

    schedule_config = scheduler_config

    @property
    def network_config(self) -> Mapping[str, Any]:
        """The config of the UNet or transformer."""
        return self.configs[self.family.network[0]]

    def schedule(self, resolution: int | tuple[int, int] | None = None) -> Schedule:
        """The base's noise schedule; resolution, a side or (height, width), is read by families whose time shift follows
        it."""
        return DiscreteVP.from_config(self.scheduler_config)

    @property
    def prediction_type(self) -> str:
        """How the UNet's output reads: "epsilon", "v_prediction" or "sample"."""
        return self.scheduler_config.get("prediction_type", "epsilon")

    def pipeline_call(self, scale: float) -> dict[str, Any]:
        """Arguments by which the base's own pipeline guides as `scale` does here; 1: not at all."""
        return {"guidance_scale": scale}

    def pipeline_prompt(self, rows: Conditioning) -> dict[str, Any]:
        """Arguments by which the base's own pipeline takes these rows in place of a prompt; a negative prompt's have `negative_` before
        their names."""
        return {OF_PIPELINE[name]: tensor for name, tensor in rows.rows.items() if name in OF_PIPELINE}

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.configs["vae"].get("block_out_channels", (0,) * 4)) - 1)

    @property
    def resolution(self) -> int:
        """The side in pixels that the base was trained at."""
        return self.configs["unet"]["sample_size"] * self.vae_scale_factor

    @property
    def cell(self) -> int:
        """Pixels that a side must be a multiple of: the VAE's factor times the network's."""
        return self.vae_scale_factor * 2 ** (len(self.configs["unet"]["block_out_channels"]) - 1)

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of square images of this side in pixels (default: the base's own)."""
        resolution = resolution or self.resolution
        if resolution % self.cell:
            raise UserError(
                f"Resolution {resolution} does not fit the {self.family.name} base at {self.path}: "
                f"write a multiple of {self.cell}."
            )
        side = resolution // self.vae_scale_factor
        return self.configs["unet"]["in_channels"], side, side

    def fitted(self, network: Any) -> Any:
        """A network of this base as the family asks it; called for each that is made or read."""
        return network

    def new_network(self) -> Any:
        """A network of this base's architecture, in fp32, with weights that are still to be loaded."""
        return self.fitted(type(self.unet).from_config(self.unet.config))

    def hollow(self) -> Any:
        """The network of the config without weights, on whatever device torch makes tensors now."""
        import diffusers

        return getattr(diffusers, self.family.network[1]).from_config(dict(self.network_config))

    def example(self, dtype: torch.dtype) -> Conditioning:
        """One row of conditioning of the shapes that prompts have, uninitialised, on whatever device torch makes tensors now."""
        return unet_rows(self.network_config, self.configs["text_encoder"].get("max_position_embeddings", 77), dtype)

    def _time_ids(self, batch: int, resolution: int | tuple[int, int] | None) -> torch.Tensor | None:
        if not self.family.pooled:
            return None
        height, width = (resolution,) * 2 if isinstance(resolution, int) else resolution or (self.resolution,) * 2
        encoder = self._text()[0]
        row = torch.tensor([height, width, 0, 0, height, width], dtype=encoder.dtype, device=encoder.device)
        return row.repeat(batch, 1)

    def _text(self) -> Sequence[Any]:
        if not self.text_encoders:
            raise ValueError("This base was loaded without its text encoders; load it with parts including 'text'")
        return self.text_encoders

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], resolution: int | tuple[int, int] | None = None) -> Conditioning:
        """Conditioning of prompts [B] as the diffusers pipeline makes it, on the encoders' device and in their dtype.

        `resolution` (side, or height and width) fills the time ids of families that have them: original size and
        target size alike, no crop; by default the base's own.
        """
        hidden, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self._text(), strict=True):
            ids = tokenizer(
                [head_of(prompt, tokenizer.model_max_length) for prompt in prompts],
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids.to(encoder.device)
            if self.family.pooled:
                output = encoder(ids, output_hidden_states=True)
                # SDXL reads both encoders' last layer but one; the second's projection is the pooled text.
                hidden.append(output.hidden_states[-2])
                pooled = output[0]
            else:
                hidden.append(encoder(ids)[0])
        return Conditioning(torch.cat(hidden, -1), pooled, self._time_ids(len(prompts), resolution))

    @property
    def zero_null(self) -> bool:
        """Whether the null prompt is zeros instead of an encoded '': what the family's `null_prompt` says, else what the
        base's own pipeline does (SDXL's `force_zeros_for_empty_prompt`)."""
        if self.family.null_prompt != "base":
            return self.family.null_prompt == "zeros"
        return self.family.pooled and bool(self.configs["pipeline"].get("force_zeros_for_empty_prompt", True))

    def null_conditioning(self, batch: int = 1, resolution: int | tuple[int, int] | None = None) -> Conditioning:
        """The null prompt, [batch] rows: zeros or an encoded '', as `zero_null` says."""
        null = self.encode_prompts([""], resolution)
        if self.zero_null:
            pooled = None if null.text_embeds is None else torch.zeros_like(null.text_embeds)
            null = Conditioning(torch.zeros_like(null.encoder_hidden_states), pooled, null.time_ids)
        return null.select(torch.zeros(batch, dtype=torch.long, device=null.tensors[0].device))

    def _latent_scale(self) -> tuple[float | torch.Tensor, float | torch.Tensor]:
        """(scale, shift): scaled latents = (latents - shift) * scale."""
        config = self.configs["vae"]
        scale = config.get("scaling_factor") or 1.0
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = (
                torch.tensor(config[key], device=self.vae.device).view(1, -1, 1, 1)
                for key in ("latents_mean", "latents_std")
            )
            return scale / std, mean
        return scale, config.get("shift_factor") or 0.0

    def _vae(self) -> Any:
        if self.vae is None:
            raise ValueError("This base was loaded without its VAE; load it with parts including 'vae'")
        return self.vae

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Latents [B,C,h,w] fp32, scaled as the UNet reads them, of pixels [B,c,H,W] in [-1,1].

        They are the mode of the VAE's posterior, or a draw from it if a generator is given.
        """
        vae = self._vae()
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        scale, shift = self._latent_scale()
        return (latents.float() - shift) * scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels [B,c,H,W] fp32, clamped to [-1,1], of scaled latents [B,C,h,w]."""
        vae = self._vae()
        scale, shift = self._latent_scale()
        return vae.decode((latents.to(vae.device).float() / scale + shift).to(vae.dtype)).sample.float().clamp(-1, 1)


@dataclass(frozen=True)
class Text:
    """A text encoder of a pipeline: its folder and transformers class, its tokenizer's folder and class; optional: a
    folder may leave it out."""

    encoder: str
    kind: str
    tokenizer: str
    tokenizer_kind: str = "CLIPTokenizer"
    optional: bool = False


CLIP = Text("text_encoder", "CLIPTextModel", "tokenizer")
CLIP_POOLED = Text("text_encoder_2", "CLIPTextModelWithProjection", "tokenizer_2")


@dataclass(frozen=True)
class Family:
    """A kind of base: the pipelines it takes, whether it has pooled text and time ids, its built-in folder if it has
    one, and the class that encodes and decodes (see README.md of this folder). null_prompt: "base", "zeros" or "empty",
    see `Base.zero_null`. guidance: what a network that is told its guidance is told, 0: what
    its pipeline does by default. network: folder and diffusers class of what is trained; vae: the class of the VAE; texts: its
    text encoders, () for one CLIP, or with pooled for SDXL's two.
    """

    name: str
    pipelines: tuple[str, ...]
    pooled: bool
    builtin: Path | None = None
    base: type[Base] = Base
    null_prompt: str = "base"
    guidance: float = 0.0
    network: tuple[str, str] = ("unet", "UNet2DConditionModel")
    vae: str = "AutoencoderKL"
    texts: tuple[Text, ...] = ()
    @property
    def encoders(self) -> tuple[Text, ...]:
        """The text encoders in order."""
        return self.texts or (CLIP, CLIP_POOLED)[: 1 + self.pooled]

    loader: ClassVar[Callable[..., Base]]  # set where families are registered, so that this file imports no reader

    def load(
        self,
        path: str | Path = "builtin",
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        parts: Sequence[str] = PARTS,
        tokenizer: str = "",
        config: str = "",
        prediction_type: str = "",
    ) -> Base:
        """Read a base from a diffusers folder, a hub repository's name, a single-file checkpoint (.safetensors, .ckpt)
        or "builtin" (the committed digits model).

        Weights are cast to `dtype`; a VAE that asks for it (`force_upcast`) stays fp32. `tokenizer`, `config` and
        `prediction_type` are for single files: see `reflow.models.single_file.unpack`. UserError names the file at
        fault.
        """
        single = {"tokenizer": tokenizer, "config": config, "prediction_type": prediction_type}
        return type(self).loader(self, path, device=torch.device(device), dtype=dtype, parts=tuple(parts), single=single)
