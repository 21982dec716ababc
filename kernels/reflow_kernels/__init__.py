"""Fused elementwise ops for few-step diffusion training and its optimizer. Time runs from t=1 (noise) to t=0 (data).

Every op runs as Triton kernels on a GPU and as plain PyTorch elsewhere; ``reflow_kernels.reference`` holds the
same names in plain PyTorch, which is the specification.
"""

from . import reference
from .adamw import fused_adamw, fused_adamw8bit
from .aligned_v import aligned_v_loss
from .chord import window_chord
from .dispatch import backend_report, configure
from .guidance import cfg_combine
from .guided_step import guided_step
from .reference import AlignedVLoss

__all__ = [
    "AlignedVLoss",
    "aligned_v_loss",
    "backend_report",
    "cfg_combine",
    "configure",
    "fused_adamw",
    "fused_adamw8bit",
    "guided_step",
    "reference",
    "window_chord",
]
