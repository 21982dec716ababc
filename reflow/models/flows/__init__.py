"""Families whose bases are rectified flows, a file each; importing this package registers them and how their networks are called.

Networks answer the velocity noise - data at times t from 1 (noise) to 0 (data), sigma = t. Here every one of them is asked with spatial
latents [B,C,h,w] and 1000 t; packing, position ids, and a pipeline's own scale or sense of time are its file's business.
"""

from reflow.models.flows.digits_flow import DIGITS_FLOW
from reflow.models.flows.flux import FLUX
from reflow.models.flows.qwen_image import QWEN_IMAGE
from reflow.models.flows.sana import SANA
from reflow.models.flows.sd3 import SD3
from reflow.models.flows.z_image import Z_IMAGE

FAMILIES = (DIGITS_FLOW, SD3, FLUX, SANA, QWEN_IMAGE, Z_IMAGE)

__all__ = ["DIGITS_FLOW", "FAMILIES", "FLUX", "QWEN_IMAGE", "SANA", "SD3", "Z_IMAGE"]
