"""Intervals against known quantiles and scipy's own."""

import math

import pytest
import torch

from reflow.evaluation.intervals import t_interval


def test_three_values():
    """95 % quantile of Student's t with two degrees of freedom: 4.302653."""
    got = t_interval([1.0, 2.0, 3.0])
    assert got.mean == 2 and got.count == 3
    assert got.half_width == pytest.approx(4.302652729911275 / math.sqrt(3), rel=1e-9)
    assert got.low == pytest.approx(2 - got.half_width) and got.high == pytest.approx(2 + got.half_width)


def test_against_scipy():
    from scipy.stats import t

    values = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    standard_error = float(values.std()) / math.sqrt(200)
    low, high = t.interval(0.95, 199, loc=float(values.mean()), scale=standard_error)
    got = t_interval(values)
    assert (got.low, got.high) == pytest.approx((low, high), rel=1e-9)


def test_coverage_is_what_it_says():
    generator = torch.Generator().manual_seed(1)
    draws = torch.randn(2000, 5, generator=generator, dtype=torch.float64) + 3
    covered = sum(interval.low <= 3 <= interval.high for interval in map(t_interval, draws))
    assert 0.935 < covered / 2000 < 0.965


def test_zero_is_excluded_only_by_the_whole_interval():
    assert t_interval([-1.0, -1.1, -0.9]).excludes_zero
    assert t_interval([0.9, 1.0, 1.1]).excludes_zero
    assert not t_interval([-1.0, 1.2]).excludes_zero


def test_one_value_has_no_interval():
    got = t_interval([0.5])
    assert got.as_dict() == {"mean": 0.5, "low": None, "high": None, "count": 1}
    assert got.half_width is None and not got.excludes_zero


def test_no_values():
    with pytest.raises(ValueError, match="at least one"):
        t_interval([])
