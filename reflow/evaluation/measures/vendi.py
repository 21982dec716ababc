"""Vendi score (Friedman and Dieng 2023): the effective number of different images in a set."""

from __future__ import annotations

import torch

from reflow.evaluation.measures.checked import features_of, unit_rows


def vendi(features: torch.Tensor) -> float:
    """exp of the entropy of the eigenvalues of K / N, K the cosines between the rows of features [N, D]: N where all are orthogonal, 1
    where all are the same. Never above min(N, D), and growing with N: compare equal counts only.

    Where N is above D the eigenvalues, which are then those of the smaller Gram matrix [D, D] and zeros, are taken from that.
    """
    rows = unit_rows(features_of(features))
    gram = (rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T) / len(rows)
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    return float(torch.exp(torch.special.entr(values / values.sum()).sum()))
