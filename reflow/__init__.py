"""reflow: progressive reflow of diffusion models into 4-, 2- and 1-step models. Time runs from t=1 (noise) to t=0 (data)."""

from reflow.quiet import quiet_name_clash

__version__ = "0.1.0"

quiet_name_clash()
