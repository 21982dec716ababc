"""Variety of samples: the data's own measures, what collapse does to them, and the experiment in seconds."""

import pytest
import torch

from reflow.experiments import diversity
from reflow.experiments.beds import spread
from reflow.experiments.beds.exact import ExactBed
from reflow.experiments.beds.mixture import CLASSES
from tests.experiments.test_exact_experiments import folder, made  # noqa: F401


@pytest.fixture(scope="module")
def bed():
    return ExactBed()


def data(bed, count=3000, seed=3):
    """Draws as the clean end of the table sees them."""
    labels, generator = torch.arange(count) % CLASSES, torch.Generator().manual_seed(seed)
    alpha, sigma = bed.clean()
    clean = bed.mixture.sample(labels, generator)
    return alpha * clean + sigma * torch.randn(clean.shape, generator=generator), labels


def test_the_datas_own_variety_is_exact(bed):
    found = spread.of_samples(bed, *data(bed))
    assert found["trace"] == pytest.approx(1, abs=0.03) and found["components"] < 0.03 and found["rarest"] > 0.9
    # A Gaussian's sample covariance of n in D dimensions has log det short by about D (D + 1) / (2 n).
    assert found["logdet"] == pytest.approx(-65 / 600, abs=0.06)
    assert found["recall"] == pytest.approx(found["precision"], abs=0.05) and found["recall"] > 0.6


def test_collapse_is_seen(bed):
    x, labels = data(bed)
    whole = spread.of_samples(bed, x, labels)
    centres = torch.stack([x[labels == c].mean(0) for c in range(CLASSES)])[labels]
    half = spread.of_samples(bed, centres + 0.5 * (x - centres), labels)
    assert half["trace"] == pytest.approx(whole["trace"] / 4, rel=1e-3) and half["recall"] < 0.5 * whole["recall"] and half["vendi"] < whole["vendi"]
    one_kind = x.clone()
    for c in range(CLASSES):
        rows = (labels == c).nonzero()[:, 0]
        kept = bed.mixture.log_densities(x[rows], *bed.clean())[:, bed.mixture.classes == c].argmax(1) == 0
        one_kind[rows] = x[rows[kept]].repeat(1 + len(rows) // int(kept.sum()), 1)[: len(rows)]
    lost = spread.of_samples(bed, one_kind, labels)
    shares, weights = spread.components(bed, one_kind[labels == 0].double(), 0)
    assert lost["rarest"] == 0 and shares.tolist() == [1.0, 0.0] and float(weights.sum()) == pytest.approx(1)


def test_vendi_counts_different_samples():
    apart = 100.0 * torch.eye(7, dtype=torch.float64)
    assert spread.vendi(apart, 1.0) == pytest.approx(7) and spread.vendi(apart[:1].expand(5, -1), 1.0) == pytest.approx(1, abs=1e-6)
    assert spread.vendi(apart.repeat(3, 1), 1.0) == pytest.approx(7, rel=1e-6)
    assert spread.inside(apart, apart) == 1.0 and spread.inside(apart + 1e4, apart) == 0.0


def test_diversity(folder, capsys):  # noqa: F811
    _, found = made(folder, "diversity", capsys)
    fine = {line["scale"]: line for line in found["teacher"] if line["teacher"] == diversity.FINE}
    ddim = {line["steps"]: line["trace"] for line in found["teacher"] if (line["teacher"], line["scale"]) == ("DDIM", 1)}
    assert fine[1]["paired"] == fine[3]["paired"] == 0 and ddim[1] < ddim[2] < ddim[4] < ddim[32]  # wide steps lose variance
    assert {(line["mode"], line["scale"]) for line in found["students"]} == {("sync", 1), ("sync", 3), ("fixed", 3)}
    perflow = [line for line in found["students"] if line["method"] == "PeRFlow"]
    assert all(line["trace_less_perflow"]["mean"] == 0 for line in perflow)
    learnt = diversity.student_of({"method": "ProReflow-II", "mode": "fixed", "scale": 7, "budget": 200_000, "seed": 2})
    assert (learnt.guidance, learnt.drop, learnt.seed, [s.windows for s in learnt.stages]) == (7.0, 0.1, 2, [8, 4, 2])
