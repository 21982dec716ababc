"""The configs that ship, by which a run of a base that is not on this disk is planned: which folder of configs/ is whose.

They hold the published bases' own numbers and no weights; their sources are named in configs/README.md.
"""

from __future__ import annotations

from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"
# Of a family's bases, the first is taken for others of it.
FOLDERS = {
    "sd15": {"stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15"},
    "sdxl": {"stabilityai/stable-diffusion-xl-base-1.0": "sdxl"},
    "sd3": {"stabilityai/stable-diffusion-3.5-medium": "sd35-medium", "stabilityai/stable-diffusion-3.5-large": "sd35-large"},
    "flux": {"black-forest-labs/FLUX.1-dev": "flux-dev"},
    "qwen-image": {"Qwen/Qwen-Image": "qwen-image"},
    "sana": {"Efficient-Large-Model/Sana_1600M_1024px_diffusers": "sana-1600m"},
}


def shipped(family: str, base: str = "") -> Path | None:
    """The folder of the configs of this base, else of the family's most usual one; None for a family that has none here."""
    known = FOLDERS.get(family)
    return None if known is None else CONFIGS / known.get(base, next(iter(known.values())))
