"""How much of the data's variety samples have, class by class, where the data's own is known exactly.

Time runs from t=1 (noise) to t=0 (data); what is compared with is the mixture as the clean end of the table sees it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reflow.experiments.beds.exact import ExactBed
from reflow.experiments.beds.mixture import CLASSES

NEIGHBOURS = 5
TRUTH_SEED = 77


def of_samples(bed: ExactBed, found: Tensor, labels: Tensor) -> dict[str, float]:
    """Means over the classes, of samples [N, D] with labels [N].

    trace: of the covariance, over the exact one's. logdet: of the covariance less the exact one's, in nats a dimension. vendi: the effective
    number of different samples (Friedman and Dieng, arXiv 2210.02410) under exp(-d^2 / (2 trace)) with the exact trace. components: distance
    in total variation between the shares of the class's components and their exact weights; rarest: the least share over its weight. recall: of
    draws from the class, those within a sample's five nearest others; precision: of samples, those within a draw's (arXiv 1904.06991).
    """
    exact, found, labels = bed.mixture.to(torch.float64), found.double().cpu(), labels.cpu()
    alpha, sigma = bed.clean()
    generator = torch.Generator().manual_seed(TRUTH_SEED)
    each: list[dict[str, float]] = []
    for label in range(CLASSES):
        own = found[labels == label]
        mean, covariance = exact.moments(label)
        covariance = alpha**2 * covariance + sigma**2 * torch.eye(len(mean), dtype=torch.float64)
        draws = alpha * exact.sample(torch.full((len(own),), label), generator) + sigma * torch.randn(own.shape, generator=generator).double()
        trace = float(covariance.trace())
        sampled = torch.cov(own.T)
        shares, weights = components(bed, own, label)
        each.append({
            "trace": float(sampled.trace()) / trace,
            "logdet": float(torch.logdet(sampled) - torch.logdet(covariance)) / len(mean),
            "vendi": vendi(own, trace),
            "components": float((shares - weights).abs().sum()) / 2,
            "rarest": float((shares / weights).min()),
            "recall": inside(draws, own),
            "precision": inside(own, draws),
        })  # fmt: skip
    return {key: sum(one[key] for one in each) / CLASSES for key in each[0]}


def components(bed: ExactBed, own: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """The share of samples [N, D] of a class that each of its components most probably made, and the component's exact weight, in fp64."""
    exact = bed.mixture.to(torch.float64)
    kept = exact.classes == label
    likeliest = exact.log_densities(own, *bed.clean())[:, kept].argmax(1)
    weights = exact.weights[kept] / exact.weights[kept].sum()
    return torch.bincount(likeliest, minlength=len(weights)).double() / len(own), weights


def vendi(own: Tensor, variance: float) -> float:
    """exp of the entropy of the eigenvalues of the kernel exp(-d^2 / (2 variance)) over the number of samples: between 1 and that number."""
    kernel = torch.exp(-torch.cdist(own, own).square() / (2.0 * variance)) / len(own)
    values = torch.linalg.eigvalsh(kernel).clamp(min=1e-15)
    return math.exp(-float((values * values.log()).sum()))


def inside(asked: Tensor, of: Tensor) -> float:
    """Share of rows that lie nearer to one of the others than that one's fifth nearest neighbour."""
    radius = torch.cdist(of, of).kthvalue(min(NEIGHBOURS + 1, len(of)), dim=1).values
    return float((torch.cdist(asked, of) <= radius).any(1).double().mean())
