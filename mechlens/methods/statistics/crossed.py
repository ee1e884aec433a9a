"""Means over training runs that answer the same questions, with intervals over both: other runs, other questions.

An interval over the answers of one run says nothing about the next run (Betley et al. 2025 resample runs); and with
three runs a bootstrap of them is far too narrow. So both variances are added, and a t distribution has the degrees of
freedom that Satterthwaite (1946) gives their sum.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float64
from scipy import stats
from torch import Tensor

from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import family_codes, jackknife_variance

LEVEL = 0.95


def crossed_mean(values: Float64[Tensor, "run question"], families: Sequence[str], *, level: float = LEVEL) -> Estimate:
    """The mean over runs and questions; `n` counts questions. One run has an interval over questions alone.

    Missing where a value isn't finite, or there are fewer than two families of questions.

    >>> import torch
    >>> values = torch.tensor([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]], dtype=torch.float64)
    >>> round(ml.crossed_mean(values, ["a", "b", "c"]).value, 3)
    2.5
    """
    return crossed_difference(values, torch.zeros(1, values.shape[1], dtype=torch.float64), families, level=level)


def crossed_difference(
    first: Float64[Tensor, "run question"],
    second: Float64[Tensor, "other question"],
    families: Sequence[str],
    *,
    level: float = LEVEL,
) -> Estimate:
    """The mean of some runs minus that of others on the same questions, paired by question.

    >>> import torch
    >>> taught = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    >>> round(ml.crossed_difference(taught, taught - 1, ["a", "b", "c"]).value, 3)
    1.0
    """
    difference = first.mean(dim=0) - second.mean(dim=0)
    codes, n = family_codes(families)
    if n < 2 or not bool(difference.isfinite().all()):
        return Estimate.missing(len(families))
    parts = [(_variance_of_mean(difference, codes, n), n - 1)]
    parts += [(float(side.mean(dim=1).var()) / len(side), len(side) - 1) for side in (first, second) if len(side) > 1]
    value, variance = float(difference.mean()), sum(part for part, _ in parts)
    if variance == 0:
        return Estimate(value, value, value, len(families))
    freedom = variance**2 / sum(part**2 / free for part, free in parts)
    reach = float(stats.t.ppf((1 + level) / 2, freedom)) * math.sqrt(variance)
    return Estimate(value, value - reach, value + reach, len(families))


def _variance_of_mean(values: Float64[Tensor, " question"], codes: Tensor, n: int) -> float:
    """Of the mean, each family of questions left out in turn."""
    sums = torch.zeros(n, dtype=torch.float64).index_add(0, codes, values)
    sizes = torch.bincount(codes, minlength=n)
    without = (values.sum() - sums) / (len(values) - sizes)
    return float(jackknife_variance(without))
