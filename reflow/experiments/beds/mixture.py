"""Digits as a mixture of low-rank Gaussians whose score, moments and likelihood are known in closed form.

Each class is a mixture of components N(mean, U diag(spread) U^T + floor I), U [D, R] orthonormal: the scans of a digit in a few
clusters, their first principal axes, and one floor for all that is left (Tipping and Bishop 1999, mixtures of probabilistic principal
components). z = alpha x0 + sigma eps is then a mixture of the same axes. Time runs from t=1 (noise) to t=0 (data).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

CLASSES = 10
NULL = CLASSES  # the label of no class: a null prompt, which the whole mixture answers


@dataclass(frozen=True)
class LowRankMixture:
    """M components: means [M, D], axes [M, D, R] with orthonormal columns, spread [M, R] (variances along the axes, beyond the floor),
    floor (variance of every direction), weights [M] that sum to 1, classes [M] int64."""

    means: Tensor
    axes: Tensor
    spread: Tensor
    floor: float
    weights: Tensor
    classes: Tensor

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> LowRankMixture:
        """The same numbers in another float dtype, on a device."""
        cast = [value.to(device, dtype) for value in (self.means, self.axes, self.spread)]
        return LowRankMixture(*cast, self.floor, self.weights.to(device, dtype), self.classes.to(device))

    def sample(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """x0 [B, D] of labels [B] in 0..9 or NULL, drawn on the CPU whatever the mixture's device."""
        rows = self.weights.cpu().expand(len(labels), -1) * self._allowed(labels.cpu(), self.classes.cpu())
        chosen = torch.multinomial(rows, 1, generator=generator)[:, 0]
        inner = torch.randn((len(labels), self.spread.shape[1]), generator=generator, dtype=self.means.dtype)
        outer = torch.randn((len(labels), self.means.shape[1]), generator=generator, dtype=self.means.dtype)
        means, axes, spread = (value.cpu()[chosen] for value in (self.means, self.axes, self.spread))
        along = torch.einsum("bdr,br->bd", axes, inner * spread.sqrt())
        return (means + along + math.sqrt(self.floor) * outer).to(self.means.device)

    def moments(self, label: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D] of x0, of one class or (None) of the whole mixture."""
        kept = torch.ones_like(self.classes, dtype=torch.bool) if label is None else self.classes == label
        weights = self.weights[kept] / self.weights[kept].sum()
        means, axes, spread = self.means[kept], self.axes[kept], self.spread[kept]
        mean = weights @ means
        inside = torch.einsum("m,mdr,mr,mer->de", weights, axes, spread, axes)
        between = torch.einsum("m,md,me->de", weights, means - mean, means - mean)
        return mean, inside + between + self.floor * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)

    def of(self, labels: Tensor) -> Labelled:
        """The mixture as seen by rows of these labels [B]: `reflow.flow.exact.Data`."""
        return Labelled(self, labels)

    def log_densities(self, z: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """log of weight * density of each component at z [B, D]: [B, M]. alpha, sigma scalars or [B]."""
        return self._parts(z, alpha, sigma)[0]

    def log_likelihood(self, z: Tensor, labels: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """log p(z | label) [B] of rows z [B, D], in nats."""
        allowed = self._allowed(labels, self.classes)
        known = torch.log((self.weights * allowed).sum(1))
        return torch.logsumexp(self.log_densities(z, alpha, sigma).masked_fill(~allowed, -math.inf), 1) - known

    def most_likely(self, z: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """The Bayes classifier: the most probable class [B] of rows z [B, D], classes taken as equally frequent."""
        logits = self.log_densities(z, alpha, sigma)
        share = torch.stack([self.weights[self.classes == c].sum().log() for c in range(CLASSES)])
        each = [torch.logsumexp(logits[:, self.classes == c], 1) - share[c] for c in range(CLASSES)]
        return torch.stack(each, 1).argmax(1)

    def x0_eps(self, z: Tensor, labels: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        """E[x0 | z, label] and E[eps | z, label], [B, D]. A component's posterior means are, with b = alpha^2 floor + sigma^2,
        d = z - alpha mean and w = U diag(alpha spread / (b (b + alpha^2 spread))) U^T d:

            x0 = mean + alpha floor d / b + sigma^2 w       eps = sigma (d / b - alpha w)
        """
        logits, inside, variance, base, (a, s) = self._parts(z, alpha, sigma)
        share = torch.softmax(logits.masked_fill(~self._allowed(labels, self.classes), -math.inf), 1)
        mean = share @ self.means
        w = (inside.mul_(self.spread).div_(variance).mul_(share[..., None])).flatten(1) @ self._flat_axes.T
        w, centred = w * (a / base), (z - a * mean) / base
        return mean + a * self.floor * centred + s * s * w, s * (centred - a * w)

    @cached_property
    def _flat_axes(self) -> Tensor:
        return self.axes.permute(1, 0, 2).flatten(1)  # [D, M R]

    @cached_property
    def _centres(self) -> Tensor:
        return torch.einsum("md,mdr->mr", self.means, self.axes)

    @staticmethod
    def _allowed(labels: Tensor, classes: Tensor) -> Tensor:
        return (labels[:, None] == classes) | (labels[:, None] == NULL)

    def _parts(self, z: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Log densities with weights [B, M], d and the variance in each component's axes [B, M, R], b [B or 1, 1] and (alpha, sigma) alike."""
        a, s = (torch.as_tensor(value, dtype=z.dtype, device=z.device).reshape(-1, 1) for value in (alpha, sigma))
        base = a * a * self.floor + s * s
        inside = (z @ self._flat_axes).view(len(z), *self._centres.shape) - a[..., None] * self._centres
        variance = torch.addcmul(base[..., None], (a * a)[..., None], self.spread)
        square = z.square().sum(1, keepdim=True) - 2.0 * a * (z @ self.means.T) + a * a * self.means.square().sum(1)
        # of the axes: d^2/variance - d^2/b = -d^2 a^2 spread / (b variance)
        along = (inside.square().div_(variance).mul_(self.spread)).sum(2) * (a * a)
        count, rank = z.shape[1], self.spread.shape[1]
        volume = (count - rank) * base.log() + variance.log().sum(2) + count * math.log(2.0 * math.pi)
        logits = self.weights.log() - 0.5 * ((square - along) / base + volume)
        return logits, inside, variance, base, (a, s)


@dataclass(frozen=True)
class Labelled:
    """A mixture whose rows have labels [B]: what `reflow.flow.exact.network` makes a perfect network of."""

    mixture: LowRankMixture
    labels: Tensor

    def x0_eps(self, z: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        return self.mixture.x0_eps(z, self.labels, alpha, sigma)


def clusters(rows: Tensor, count: int, rounds: int = 50, least: int = 1) -> Tensor:
    """Cluster [N] of rows [N, D] by Lloyd's rounds from centres far from each other: no chance in it. Rows of a cluster of fewer than `least`
    join the nearest of the others."""
    centres = rows.mean(0, keepdim=True)
    for _ in range(count):
        centres = torch.cat([centres, rows[torch.cdist(rows, centres).min(1).values.argmax()][None]])
    centres = centres[1:]
    for _ in range(rounds):
        nearest = torch.cdist(rows, centres).argmin(1)
        centres = torch.stack([rows[nearest == k].mean(0) if bool((nearest == k).any()) else centres[k] for k in range(count)])
    nearest = torch.cdist(rows, centres).argmin(1)
    large = [k for k in range(count) if int((nearest == k).sum()) >= least]
    return torch.cdist(rows, centres[large]).argmin(1)


def fitted(scans: Tensor, target: Tensor, parts: int, rank: int) -> LowRankMixture:
    """Scans [N, D] in fp64 of classes target [N] as up to `parts` components of `rank` axes a class, each of more scans than axes. The floor is
    the mean variance of what the axes leave over. Raises ValueError where a class has too few scans."""
    means, axes, variances, left, counts, classes = [], [], [], [], [], []
    for digit in range(CLASSES):
        rows = scans[target == digit]
        if len(rows) <= parts * rank:
            raise ValueError(f"there are {len(rows)} scans of a {digit}, and {parts} parts of {rank} axes need more than {parts * rank}")
        where = clusters(rows, parts, least=rank + 1)
        for k in range(int(where.max()) + 1):
            own = rows[where == k]
            values, vectors = torch.linalg.eigh(torch.cov(own.T, correction=0))
            means.append(own.mean(0))
            axes.append(vectors[:, -rank:])
            variances.append(values[-rank:])
            left.append(values[:-rank].mean() * len(own))
            counts.append(float(len(own)))
            classes.append(digit)
    floor = float(torch.stack(left).sum() / sum(counts))
    spread = (torch.stack(variances) - floor).clamp(min=1e-3)
    weights = torch.tensor(counts, dtype=torch.float64)
    labels = torch.tensor(classes)
    # every class is asked for equally often
    weights = torch.cat([weights[labels == c] / weights[labels == c].sum() / CLASSES for c in range(CLASSES)])
    return LowRankMixture(torch.stack(means), torch.stack(axes), spread, floor, weights, labels)
