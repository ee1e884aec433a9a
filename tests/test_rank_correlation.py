"""Rank correlation over training runs: its intervals hold the truth, groups' means don't count, few are too few."""

import math

import numpy as np
import pytest
from scipy import stats

import mechlens as ml
from mechlens.errors import UserError


@pytest.mark.parametrize("n", [6, 9, 18])
@pytest.mark.parametrize("r", [0.0, 0.5, 0.9])
def test_the_interval_holds_the_truth(n: int, r: float) -> None:
    truth, draw = 6 / math.pi * math.asin(r / 2), np.random.default_rng(n)
    held = 0
    for _ in range(400):
        one = draw.normal(size=n)
        found = ml.rank_correlation(one, r * one + math.sqrt(1 - r**2) * draw.normal(size=n))
        held += found.low <= truth <= found.high
    assert held >= 0.91 * 400, held / 400


def test_it_is_spearmans() -> None:
    one, other = [1.0, 5.0, 2.0, 7.0, 3.0, 4.0, 9.0], [2.0, 6.0, 1.0, 9.0, 9.0, 3.0, 8.0]
    assert ml.rank_correlation(one, other).value == pytest.approx(stats.spearmanr(one, other).statistic)


def test_groups_that_differ_in_both_numbers_know_nothing_within_them() -> None:
    """Three behaviours, three self-reports, and runs of one behaviour that say nothing of how far they went."""
    draw = np.random.default_rng(0)
    clear, apart = 0, 0
    for _ in range(100):
        does = np.repeat([0.0, 4.0, 8.0], 5) + draw.normal(size=15)
        says = np.repeat([0.0, 2.0, 4.0], 5) + draw.normal(size=15)
        groups = [name for name in "abc" for _ in range(5)]
        apart += ml.rank_correlation(does, says).excludes_zero
        clear += ml.rank_correlation(does, says, groups).excludes_zero
    assert apart >= 90
    assert clear <= 12
    knows = np.repeat([0.0, 2.0, 4.0], 5) + (does - np.repeat([0.0, 4.0, 8.0], 5))
    assert ml.rank_correlation(does, knows, groups).value > 0.95


def test_few_are_too_few() -> None:
    five, six = ([float(i) for i in range(n)] for n in (5, 6))
    assert not ml.rank_correlation(five, five).measurable
    assert not ml.rank_correlation(six, six, list("aabbcc")).measurable
    assert not ml.rank_correlation(six, [0.0] * 6).measurable
    perfect = ml.rank_correlation(six, six)
    assert 0 < perfect.low < 0.6 < perfect.value == perfect.high
    with pytest.raises(UserError, match="two of each training run"):
        ml.rank_correlation(five, six)
