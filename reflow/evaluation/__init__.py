"""Measures of a sampled model: Fréchet distance, prompt accuracy, alignment, straightness, diversity."""
