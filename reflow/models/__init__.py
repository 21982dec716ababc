"""Model families: what reflow needs from a diffusers pipeline to train it, and the digits model that it ships."""

from reflow.models.conditioning import CALLS, OWN_GUIDANCE, Conditioning, denoise
from reflow.models.family import Base, Family, Text
from reflow.models.flows.base import FlowBase
from reflow.models.registry import FAMILIES, base_path, family, family_for, family_of, register

__all__ = [
    "CALLS",
    "FAMILIES",
    "OWN_GUIDANCE",
    "Base",
    "Conditioning",
    "Family",
    "FlowBase",
    "Text",
    "base_path",
    "denoise",
    "family",
    "family_for",
    "family_of",
    "register",
]
