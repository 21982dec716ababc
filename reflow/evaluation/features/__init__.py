"""Networks that turn images, and their prompts, into numbers: from weights on the user's disk alone, never a download."""

from reflow.evaluation.features.opening import open_features

__all__ = ["open_features"]
