"""Measures of feature sets against closed cases, direct formulas and other libraries' own functions."""

import math

import numpy as np
import pytest
import torch

from reflow.errors import UserError
from reflow.evaluation.measures import checked, precision_recall
from reflow.evaluation.measures.cmmd import cmmd, cmmd_interval
from reflow.evaluation.measures.diversity import diversity_of_prompts, means_of_groups, pairs_within
from reflow.evaluation.measures.fid_infinity import fid_infinity, fid_interval
from reflow.evaluation.measures.frechet import frechet_distance
from reflow.evaluation.measures.kid import kid, kid_interval, kid_of_subsets
from reflow.evaluation.measures.mmd import squared_mmd, sums_between, sums_within
from reflow.evaluation.measures.precision_recall import manifolds
from reflow.evaluation.measures.resampling import bootstrap, bootstrap_mean
from reflow.evaluation.measures.vendi import vendi


def normal(count, width, seed, scale=1.0, shift=0.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + shift


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that do not divide the counts of the tests: every seam between them is crossed."""
    monkeypatch.setattr("reflow.evaluation.measures.mmd.TILE", 7)
    monkeypatch.setattr(precision_recall, "TILE", 7)


# Maximum mean discrepancies


def test_kid_is_torchmetrics_polynomial_mmd(small_tiles):
    from torchmetrics.image.kid import poly_mmd

    a, b = normal(40, 12, 0), normal(40, 12, 1, 1.2, 0.1)
    assert kid(a, b) == pytest.approx(poly_mmd(a, b).item(), rel=1e-10)


def test_kid_of_different_counts_is_the_direct_sum(small_tiles):
    a, b = normal(9, 5, 2), normal(16, 5, 3, shift=0.5)

    def k(x, y):
        return (float(x @ y) / 5 + 1) ** 3

    def within(rows):
        return np.mean([k(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j])

    assert kid(a, b) == pytest.approx(within(a) + within(b) - 2 * np.mean([k(x, y) for x in a for y in b]), rel=1e-10)


def test_kid_of_one_distribution_is_zero_at_any_count():
    """Without bias: over many pairs of sets of one distribution the mean is 0 within its error, at 20 images as at 200."""
    for count in (20, 200):
        values = torch.tensor([kid(normal(count, 4, 2 * s), normal(count, 4, 2 * s + 1)) for s in range(60)])
        assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))


def test_kid_of_subsets():
    a, b = normal(50, 6, 4), normal(60, 6, 5, shift=0.3)
    whole = kid_of_subsets(a, b[:50], subsets=3, size=50)
    assert whole.mean == pytest.approx(kid(a, b[:50]), rel=1e-9)
    some = kid_of_subsets(a, b, subsets=200, size=20, seed=3)
    assert some.low < kid(a, b) < some.high and some.count == 200
    assert some == kid_of_subsets(a, b, subsets=200, size=20, seed=3) != kid_of_subsets(a, b, subsets=200, size=20, seed=4)
    with pytest.raises(ValueError, match="there are 50 and 60"):
        kid_of_subsets(a, b, size=51)


@pytest.mark.parametrize("unbiased", [False, True])
def test_cmmd_is_the_double_loop(small_tiles, unbiased):
    a, b = normal(9, 5, 6), normal(12, 5, 7, shift=0.5)
    x, y = (f / f.norm(dim=1, keepdim=True) for f in (a, b))

    def mean(rows, others, apart):
        kept = [(i, j) for i in range(len(rows)) for j in range(len(others)) if not apart or i != j]
        return sum(math.exp(-float((rows[i] - others[j]).square().sum()) / 200) for i, j in kept) / len(kept)

    want = 1000 * (mean(x, x, unbiased) + mean(y, y, unbiased) - 2 * mean(x, y, False))
    assert cmmd(a, b, unbiased=unbiased) == pytest.approx(want, rel=1e-9)
    assert cmmd(3 * a, b, unbiased=unbiased) == pytest.approx(want, rel=1e-9)


def test_cmmd_of_a_set_with_itself_is_zero_as_published():
    assert cmmd(normal(30, 8, 8), normal(30, 8, 8)) == pytest.approx(0, abs=1e-9)


def test_sums_in_tiles_are_the_whole_sums(small_tiles):
    rows, others = normal(23, 3, 9), normal(15, 3, 10)

    def kernel(a, b):
        return (a @ b.T).exp()

    whole = kernel(rows, rows)
    sums, alone = sums_within(kernel, rows)
    torch.testing.assert_close(alone, whole.diagonal())
    torch.testing.assert_close(sums, whole.sum(1) - whole.diagonal())
    torch.testing.assert_close(sums_between(kernel, rows, others), kernel(rows, others).sum(1))


@pytest.mark.parametrize("measure, unbiased", [(kid_interval, None), (cmmd_interval, True), (cmmd_interval, False)])
def test_intervals_of_discrepancies_have_the_width_of_the_spread_over_other_images(measure, unbiased):
    reference, choice = normal(300, 6, 50), {} if unbiased is None else {"unbiased": unbiased}
    found = [measure(normal(200, 6, 300 + s, 1.2, 0.5), reference, **choice) for s in range(80)]
    spread = torch.tensor([one.mean for one in found]).std().item()
    assert np.mean([one.half_width for one in found]) == pytest.approx(1.96 * spread, rel=0.25)
    plain = {kid_interval: kid, cmmd_interval: cmmd}[measure]
    assert found[0].mean == plain(normal(200, 6, 300, 1.2, 0.5), reference, **choice) and found[0].count == 200


def test_the_level_of_an_interval():
    a, b = normal(50, 3, 60), normal(50, 3, 61, shift=1.0)
    wide, narrow = (squared_mmd(lambda x, y: x @ y.T, a, b, level=level) for level in (0.95, 0.6827))
    assert wide.half_width / narrow.half_width == pytest.approx(1.96, abs=0.01) and wide.mean == narrow.mean


# Neighbours


def by_hand(generated, reference, k):
    """Precision, recall, density, coverage in loops over plain distances."""

    def radius(rows, i):
        return sorted(math.dist(rows[i], rows[j]) for j in range(len(rows)) if j != i)[k - 1]

    g, r = generated.tolist(), reference.tolist()
    radii_g, radii_r = [radius(g, i) for i in range(len(g))], [radius(r, j) for j in range(len(r))]
    inside = [[math.dist(x, y) <= radii_r[j] for j, y in enumerate(r)] for x in g]
    precision = np.mean([any(row) for row in inside])
    recall = np.mean([any(math.dist(x, y) <= radii_g[i] for i, x in enumerate(g)) for y in r])
    return precision, recall, np.mean([sum(row) for row in inside]) / k, np.mean([any(row[j] for row in inside) for j in range(len(r))])


@pytest.mark.parametrize("k", [1, 3, 5])
def test_manifolds_are_those_of_loops(small_tiles, k):
    generated, reference = normal(31, 3, 11, 0.7, 0.4), normal(26, 3, 12)
    found = manifolds(generated, reference, k)
    want = by_hand(generated, reference, k)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(want, abs=1e-12)
    assert k > 3 or 0 < found.precision < 1 and 0 < found.recall < 1


def test_closed_manifolds():
    line = torch.arange(10.0)[:, None]
    same = manifolds(line, line)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    apart = manifolds(line + 100, line)
    assert (apart.precision, apart.recall, apart.density, apart.coverage) == (0, 0, 0, 0)
    # One mode of two: all that is drawn is real, half of what is real is not drawn.
    lost = manifolds(torch.cat([line, line + 0.5]), torch.cat([line, line + 100]))
    assert lost.precision == 1 and lost.recall == 0.5 and lost.coverage == 0.5


def test_equal_images_far_from_the_origin_are_found():
    """Radii are 0 where images stand several times; rounding must not part them from their doubles."""
    rows = (normal(3, 50, 13) * 0.1 + 1000).repeat_interleave(5, 0)
    assert manifolds(rows, rows).precision == 1 == manifolds(rows, rows).recall


def test_manifolds_need_more_images_than_neighbours():
    with pytest.raises(ValueError, match="N of 4 or more"):
        manifolds(normal(3, 2, 0), normal(9, 2, 1))


# Diversity


def test_vendi_closed_cases():
    assert vendi(torch.eye(7)) == pytest.approx(7, rel=1e-12)
    assert vendi(torch.ones(7, 3)) == pytest.approx(1, rel=1e-12)
    assert vendi(torch.eye(4).repeat(5, 1)) == pytest.approx(4, rel=1e-12)  # more rows than columns
    # Two images with cosine c have the eigenvalues (1 + c) / 2 and (1 - c) / 2.
    c = 0.6
    want = math.exp(-sum(p * math.log(p) for p in ((1 + c) / 2, (1 - c) / 2)))
    assert vendi(torch.tensor([[1.0, 0.0], [c, 0.8]], dtype=torch.float64)) == pytest.approx(want, rel=1e-12)


def test_vendi_by_either_gram_matrix_is_the_same():
    rows = normal(30, 12, 14)
    unit = rows / rows.norm(dim=1, keepdim=True)
    values = torch.linalg.eigvalsh(unit @ unit.T / 30).clamp_min(1e-300)
    assert vendi(rows) == pytest.approx(math.exp(-(values * values.log()).sum().item()), rel=1e-9)
    with pytest.raises(UserError, match="1 of 4 images are all zero, the first is number 2"):
        vendi(torch.tensor([[1.0], [2.0], [0.0], [1.0]]))


def test_diversity_of_prompts():
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0], [0.0, 2.0], [0.0, 0.0], [9.0, 9.0]])
    groups = [5, 5, 2, 2, 2, 7]  # 7 has one image and counts for nothing
    two = (math.sqrt(2) + math.sqrt(2) + 2) / 3
    assert diversity_of_prompts(rows, groups).tolist() == pytest.approx([two, 5.0])
    unit = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 0.0]])
    assert diversity_of_prompts(unit, [0, 0, 0], cosine=True).tolist() == pytest.approx([2 / 3])
    with pytest.raises(ValueError, match="at least two images"):
        diversity_of_prompts(rows, range(6))
    with pytest.raises(ValueError, match="6 and 5"):
        diversity_of_prompts(rows, groups[:5])


def test_pairs_for_a_distance_of_images():
    pairs, of = pairs_within([1, 0, 1, 1, 0])
    assert pairs.tolist() == [[1, 4], [0, 2], [0, 3], [2, 3]] and of.tolist() == [0, 1, 1, 1]
    assert means_of_groups(torch.tensor([4.0, 1.0, 2.0, 6.0]), of).tolist() == [4.0, 3.0]


# Intervals


def test_bootstrap_of_a_mean_is_near_the_normal_interval():
    values = normal(400, 1, 15)[:, 0]
    found = bootstrap_mean(values, replicates=4000)
    half = 1.96 * values.std().item() / 20
    assert found.mean == pytest.approx(values.mean().item(), abs=1e-12)
    assert found.high - found.mean == pytest.approx(half, rel=0.1) and found.mean - found.low == pytest.approx(half, rel=0.1)
    assert found == bootstrap_mean(values, replicates=4000) != bootstrap_mean(values, replicates=4000, seed=1)
    assert bootstrap_mean(values[:1]).low is None
    with pytest.raises(ValueError, match="got none"):
        bootstrap_mean(values[:0])


def test_bootstrap_in_pieces_draws_every_replicate(monkeypatch):
    monkeypatch.setattr("reflow.evaluation.measures.resampling.DRAWS", 1000)
    found = bootstrap_mean(normal(100, 1, 16)[:, 0], replicates=2001)
    assert found.low < found.mean < found.high


def test_bootstrap_of_a_measure():
    values = normal(200, 1, 17)[:, 0]
    found = bootstrap(lambda rows: values[rows].mean().item(), 200, replicates=400)
    assert found.mean == pytest.approx(values.mean().item()) and found.count == 200
    assert found.half_width == pytest.approx(1.96 * values.std().item() / math.sqrt(200), rel=0.2)
    # A measure that doubles shift: how many images differ. The interval still lies about the value of the whole set.
    shifted = bootstrap(lambda rows: float(len(rows.unique())), 200, replicates=50)
    assert shifted.mean == 200 and shifted.low <= 200 <= shifted.high
    with pytest.raises(ValueError, match="two replicates or more"):
        bootstrap(lambda rows: 0.0, 5, replicates=1)


def test_fid_interval_covers_the_spread_of_other_draws():
    """In one dimension, where FID has next to no bias: the interval's width is that of FIDs of other images."""
    reference = normal(20_000, 1, 18)
    others = torch.tensor([frechet_distance(normal(500, 1, 100 + s, 1.5, 1.0), reference) for s in range(60)])
    found = fid_interval(normal(500, 1, 19, 1.5, 1.0), reference, replicates=200)
    assert found.half_width == pytest.approx(1.96 * others.std().item(), rel=0.35)
    assert found.mean == pytest.approx(frechet_distance(normal(500, 1, 19, 1.5, 1.0), reference), rel=1e-10)


# FID without its bias


def test_fid_infinity_is_the_intercept_of_its_points():
    found = fid_infinity(normal(300, 8, 20, 1.1), normal(400, 8, 21), points=6, seed=2)
    slope, value = np.polyfit([1 / n for n in found.counts], found.distances, 1)
    assert (found.value, found.slope) == pytest.approx((value, slope), rel=1e-8)
    assert found.counts[0] == 30 and found.counts[-1] == 300 and len(found.counts) == 6
    assert found.distances[-1] == pytest.approx(frechet_distance(normal(300, 8, 20, 1.1), normal(400, 8, 21)), rel=1e-9)
    assert found == fid_infinity(normal(300, 8, 20, 1.1), normal(400, 8, 21), points=6, seed=2)


def test_fid_infinity_takes_most_of_the_bias_away():
    """Two draws of one distribution are 0 apart: FID at 600 images of 24 numbers says .3, its extrapolation a small part of that."""
    reference = normal(50_000, 24, 22)
    biased = [frechet_distance(normal(600, 24, 200 + s), reference) for s in range(8)]
    found = [fid_infinity(normal(600, 24, 200 + s), reference, smallest=120, points=8).value for s in range(8)]
    assert np.mean(biased) > 0.2 and abs(np.mean(found)) < 0.2 * np.mean(biased)


def test_fid_infinity_needs_two_counts():
    with pytest.raises(ValueError, match="subsets of two sizes"):
        fid_infinity(normal(20, 3, 0), normal(20, 3, 1), smallest=20)


# What all of them ask


@pytest.mark.parametrize("measure", [kid, cmmd, manifolds, fid_infinity, lambda a, b: vendi(b), lambda a, b: diversity_of_prompts(b, [0] * len(b))])
def test_features_that_are_not_finite_are_a_sentence(measure):
    bad = normal(8, 2, 23)
    bad[5, 1] = torch.inf
    with pytest.raises(UserError, match="1 of 8 images are not finite, the first is number 5"):
        measure(normal(8, 2, 24), bad)


@pytest.mark.parametrize("measure", [kid, cmmd, manifolds, fid_infinity])
def test_widths_that_differ(measure):
    with pytest.raises(ValueError, match="differ in width"):
        measure(normal(8, 2, 25), normal(8, 3, 26))


def test_half_precision_features_are_measured_in_fp64():
    assert checked.features_of(normal(4, 2, 27).half()).dtype == torch.float64
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        checked.features_of(torch.zeros(3))
