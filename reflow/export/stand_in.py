"""A base's own pipeline without weights: the class of model_index.json around a network and a VAE whose answers are known formulas.

Both have the configs of the folder's real parts, with the defaults of their classes, so a pipeline reads of them what it reads of those; the
network answers a smooth function, not linear, of the sample, of the time in whatever unit it is told it, of its text and of its guidance.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from reflow.models.family import Base


class StandIn(nn.Module):
    """A part of a pipeline with a config and no weights of its own; what the config names can be read of it as an attribute."""

    def __init__(self, kind: Any, config: Any) -> None:
        from diffusers.configuration_utils import FrozenDict

        super().__init__()
        taken = inspect.signature(kind.__init__).parameters.values()
        defaults = {one.name: one.default for one in taken if one.default is not inspect.Parameter.empty}
        self.config = FrozenDict(defaults | dict(config))
        self.one = nn.Parameter(torch.ones(()), requires_grad=False)  # pipelines ask their parts for dtype and device

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            config = self.__dict__.get("config", {})
            if name not in config:
                raise
            return config[name]

    @property
    def dtype(self) -> torch.dtype:
        return self.one.dtype

    @property
    def device(self) -> torch.device:
        return self.one.device


class StandInNetwork(StandIn):
    """Stands for a transformer or a UNet, called by any of their signatures: sample [B,...], tokens or a list of images; timestep [B] or one."""

    def __init__(self, kind: Any, config: Any) -> None:
        super().__init__(kind, config)
        # Where SDXL's pipeline looks how many numbers its time ids and pooled text are.
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=self.config.get("projection_class_embeddings_input_dim")))

    def cache_context(self, name: str) -> Any:
        """Where a pipeline marks the two halves of guidance."""
        return nullcontext()

    def forward(
        self,
        sample: Any = None,
        timestep: Any = None,
        text: Any = None,
        *,
        hidden_states: Any = None,
        encoder_hidden_states: Any = None,
        pooled_projections: Any = None,
        guidance: Any = None,
        added_cond_kwargs: Any = None,
        **others: Any,
    ) -> tuple[Any]:
        given = hidden_states if sample is None else sample
        z = torch.stack(list(given)) if isinstance(given, list) else given
        ones = (-1, *[1] * (z.ndim - 1))
        time = torch.log1p(torch.as_tensor(timestep).to(z)).reshape(ones)
        told = [text, encoder_hidden_states, pooled_projections, *(added_cond_kwargs or {}).values()]
        heard = sum(_mean(rows, ones) for rows in told if rows is not None)
        if guidance is not None:
            heard = heard + torch.log1p(guidance.to(z)).reshape(ones)
        output = torch.cos(time + heard) * torch.tanh(z) + 0.3 * torch.sin(2 * time) * z + 0.2 * heard
        return (list(output) if isinstance(given, list) else output,)


def _mean(rows: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """Of each row, squeezed to between -1 and 1, of a tensor or of a list of captions."""
    return torch.stack([torch.tanh(row.float().mean()) for row in rows]).reshape(shape)


class StandInVAE(StandIn):
    """Encodes pixels [B,c,H,W] or [B,c,1,H,W] to their averages over cells, a multiple for each channel; nothing is drawn."""

    def __init__(self, kind: Any, config: Any, channels: int, cell: int) -> None:
        super().__init__(kind, config)
        self.channels, self.cell = channels, cell

    def encode(self, pixels: torch.Tensor) -> Any:
        video = pixels.ndim == 5
        grey = (pixels[:, :, 0] if video else pixels).mean(1, keepdim=True)
        cells = nn.functional.avg_pool2d(grey, self.cell)
        latents = cells * torch.linspace(1.0, 2.0, self.channels)[:, None, None]
        latents = latents[:, :, None] if video else latents
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda generator=None: latents, mode=lambda: latents))


def stand_ins(base: Base) -> tuple[StandInNetwork, StandInVAE]:
    """In place of the base's network and VAE."""
    import diffusers

    network = StandInNetwork(getattr(diffusers, base.family.network[1]), base.network_config)
    channels = base.latent_shape(base.cell)[0]
    return network, StandInVAE(getattr(diffusers, base.family.vae), base.configs["vae"], channels, base.vae_scale_factor)


def pipeline_of(kind: Any, base: Base, scheduler: Any) -> Any:
    """A pipeline of this class around the base's network and VAE and the scheduler, without whatever else its class can hold."""
    parts = {base.family.network[0]: base.unet, "vae": base.vae, "scheduler": scheduler}
    empty = {one.name: None for one in _arguments(kind) if one.default in (inspect.Parameter.empty, None)}
    unasked = {one.name: False for one in _arguments(kind) if one.name == "requires_safety_checker"}
    pipe = kind(**(empty | unasked | parts))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _arguments(kind: Any) -> Iterable[inspect.Parameter]:
    return list(inspect.signature(kind.__init__).parameters.values())[1:]
