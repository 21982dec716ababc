"""Formats of weights on disk: files, deltas, LoRA files, the original checkpoints' names."""
