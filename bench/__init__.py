"""Measurements of the kernels and of the trainer; run as ``python -m bench``, not installed."""
