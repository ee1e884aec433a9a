"""How two numbers go together over training runs: Spearman's rank correlation, of all runs and within their groups."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mechlens.errors import UserError
from mechlens.methods.statistics.crossed import LEVEL
from mechlens.methods.statistics.estimate import Estimate

FEWEST = 6
"""Runs (within groups: free of their groups' means, but one) below which a correlation has hardly any interval."""


def rank_correlation(first: Iterable[float], second: Iterable[float], groups: Sequence[str] | None = None) -> Estimate:
    """Spearman's rho with its 95% interval over runs (Fisher's z, with the variance of Bonett and Wright 2000).

    With `groups` of runs it is the correlation within them: each group's means are taken out, since groups that were
    taught different things differ in both numbers whatever a single run knows. `n` counts runs. Missing for fewer than
    six runs (within groups, as many more as there are further groups), and where one of the two numbers is always the
    same. UserError for numbers that aren't of the same runs.

    >>> print(ml.rank_correlation([0.1, 0.2, 0.4, 0.5, 0.6, 0.8, 0.9, 1.0], [1.0, 3.0, 2.0, 4.0, 5.0, 7.0, 6.0, 8.0]))
    0.95 [0.66, 0.99], n=8
    >>> print(ml.rank_correlation([0.1, 0.2, 0.3], [1.0, 2.0, 3.0]))
    not measurable, n=3
    """
    sides = [np.asarray(list(side), dtype=np.float64) for side in (first, second)]
    n, kinds = len(sides[0]), list(dict.fromkeys(groups or ["all"]))
    if n != len(sides[1]) or (groups is not None and len(groups) != n):
        raise UserError(f"there are {n} and {len(sides[1])} numbers; give two of each training run")
    free = n - len(kinds) + 1
    if free < FEWEST:
        return Estimate.missing(n)
    of = np.array([kinds.index(group) for group in groups or ["all"] * n])
    one, other = (_without_means(side, of) for side in sides)
    if min(np.ptp(one), np.ptp(other)) < 1e-12:
        return Estimate.missing(n)
    rho = float(stats.spearmanr(one, other).statistic)
    return Estimate(rho, *_bounds(rho, n, free), n)


def _without_means(values: NDArray[np.float64], of: NDArray[np.int_]) -> NDArray[np.float64]:
    return values - (np.bincount(of, values) / np.bincount(of))[of]


def _bounds(rho: float, n: int, free: int) -> tuple[float, float]:
    # Perfect order has no variance; what one exchange of neighbours would leave has.
    near = max(-1 + 12 / (n**3 - n), min(1 - 12 / (n**3 - n), rho))
    reach = float(stats.norm.ppf((1 + LEVEL) / 2)) * math.sqrt((1 + near**2 / 2) / (free - 3))
    low, high = (math.tanh(math.atanh(near) + side * reach) for side in (-1, 1))
    return min(low, rho), max(high, rho)
