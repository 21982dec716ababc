"""Encoded training data: latents and the captions they go with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reflow.data.shapes import Group, Shaped
from reflow.errors import UserError
from reflow.models.conditioning import Conditioning
from reflow.models.family import Base


@dataclass
class LatentDataset(Shaped):
    """Latents of the base's VAE and a table of encoded captions, all fp32 on the CPU.

    latents: [n, C, h, w], scaled as the network expects them. caption_of: [n] row of `captions` that each latent goes
    with. null: one row, the base pipeline's own empty prompt, taken where a caption is dropped. texts: of `captions`, where
    they are known.
    """

    latents: torch.Tensor
    caption_of: torch.Tensor
    captions: Conditioning
    null: Conditioning
    texts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def groups(self) -> tuple[Group, ...]:
        """All items: they have one shape."""
        return (Group(0, len(self), tuple(self.latents.shape[1:])),)

    def latent(self, items: torch.Tensor) -> torch.Tensor:
        return self.latents[items]

    def conditioning(self, items: torch.Tensor, dropped: torch.Tensor | None = None) -> Conditioning:
        """Captions of the items [B]; where `dropped` [B] bool is set, the null prompt."""
        rows = self.captions.select(self.caption_of[items])
        return rows if dropped is None else self.null_rows(items).where(dropped, rows)

    def words(self, items: torch.Tensor) -> list[str]:
        """The captions of items [B] as text."""
        return [self.texts[row] for row in self.caption_of[items].tolist()] if self.texts else super().words(items)

    def null_rows(self, items: torch.Tensor) -> Conditioning:
        """The null prompt [B] of items, with each image's own time ids where the family has them."""
        own = {name: rows[self.caption_of[items]] for name, rows in self.captions.parts(of_image=True)}
        return self.null.select(torch.zeros_like(items)).with_rows(**own)


def encode_digits(base: Base, *, batch: int = 256) -> LatentDataset:
    """The scans of `reflow.data.digits`, each with one of its digit's captions, encoded by the base model."""
    from reflow.data import digits

    pixels, labels = digits.images()
    sentences = [c for label in range(10) for c in digits.captions(label)]
    per_label = len(sentences) // 10
    caption_of = labels * per_label + torch.arange(len(labels)) % per_label
    device = next(base.vae.parameters()).device
    with torch.no_grad():
        latents = torch.cat([base.encode_images(p.to(device)).float().cpu() for p in pixels.split(batch)]).contiguous()
        captions = base.encode_prompts(sentences).to("cpu", torch.float32)
        null = base.null_conditioning(1).to("cpu", torch.float32)
    return checked(LatentDataset(latents, caption_of, captions, null, tuple(sentences)), "the digits scans")


def checked(data: LatentDataset, where: str) -> LatentDataset:
    """Refuse an empty or non-finite data set with a sentence."""
    if not len(data):
        raise UserError(f"The data set {where} is empty; point data.path at a folder with images and captions.")
    bad = (~torch.isfinite(data.latents).flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"{len(bad)} latents of {where} are not finite (first at row {bad[0]}); encode them again with the VAE in "
            f"fp32."
        )
    return data
