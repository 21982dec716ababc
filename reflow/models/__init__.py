"""Model families: what reflow needs from a diffusers pipeline to train it, and the digits model that it ships."""

from reflow.models.conditioning import Conditioning, denoise
from reflow.models.family import Base, Family
from reflow.models.registry import FAMILIES, base_path, family, family_for, family_of, register

__all__ = [
    "FAMILIES",
    "Base",
    "Conditioning",
    "Family",
    "base_path",
    "denoise",
    "family",
    "family_for",
    "family_of",
    "register",
]
