"""How far apart two classes score, in standard deviations: what AUROC no longer tells once it is 1."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import Interval, family_codes, fewest_families, jackknife_variance

MIN_FAMILIES = 10
"""With fewer families of a class there is no interval, and so no number."""


def hedges_g(
    scores: Float[Tensor, "*cell prompt"], positive: Bool[Tensor, " prompt"], weights: Float[Tensor, "draw prompt"]
) -> Float[Tensor, "*cell draw"]:
    """Difference of the classes' means over the pooled standard deviation, corrected for few prompts (Hedges 1981).

    `weights` are how often each prompt is drawn. 0 where scores don't differ at all, NaN where a class has fewer than
    two prompts.
    """
    shifted = scores.double() - scores.double()[..., :1]  # equal scores are exactly 0 then
    sums = []
    for side in (positive, ~positive):
        own = (weights.double() * side).T
        n = own.sum(dim=0)
        mean = shifted @ own / n
        sums.append((n, mean, ((shifted.square() @ own) - n * mean.square()).clamp(min=0.0)))
    (n, above, first), (m, below, second) = sums
    freedom = n + m - 2
    spread = ((first + second) / freedom).sqrt()
    correction = 1 - 3 / (4 * freedom - 1)
    gap = above - below
    found = torch.where(gap == 0, 0.0, correction * gap / spread)
    return torch.where((n >= 2) & (m >= 2), found, torch.nan)


def effect_bounds(
    scores: Float[Tensor, "*cell prompt"], positive: Bool[Tensor, " prompt"], families: Sequence[str]
) -> Interval:
    """95% interval of Hedges' g of every cell: a jackknife over families and Student's t; NaN below `MIN_FAMILIES`.

    Of intervals for 10 to 50 prompts a class, alone or in pairs, 92% to 98% hold the truth
    (`scripts/error_rates_direction.py --effects`); of percentile bootstraps over families 86% to 94%.
    """
    value = _whole(scores, positive)
    least = fewest_families(positive, families)
    if least < MIN_FAMILIES:
        missing = torch.full_like(value, torch.nan)
        return Interval(missing, missing)
    codes, n = family_codes(families)
    left_out = (codes[None] != torch.arange(n)[:, None]).double()
    each = hedges_g(scores, positive, left_out)
    reach = float(stats.t.ppf(0.975, least - 1)) * jackknife_variance(each).sqrt()
    return Interval(value - reach, value + reach)


def effect_estimate(
    scores: Float[Tensor, " prompt"], positive: Bool[Tensor, " prompt"], families: Sequence[str]
) -> Estimate:
    """Hedges' g with the interval of `effect_bounds`; missing where there is none, or all scores of a class are one."""
    value, bounds = float(_whole(scores, positive)), effect_bounds(scores, positive, families)
    if not all(math.isfinite(number) for number in (value, float(bounds.low), float(bounds.high))):
        return Estimate.missing(len(positive))
    return Estimate(value, float(bounds.low), float(bounds.high), len(positive))


def mean_effect(
    scores: Float[Tensor, "repeat prompt"], positive: Bool[Tensor, " prompt"], families: Sequence[str]
) -> Estimate:
    """Mean over the repeats of Hedges' g and of its bounds."""
    value, bounds = _whole(scores, positive).mean(), effect_bounds(scores, positive, families)
    low, high = bounds.low.mean(), bounds.high.mean()
    if not all(bool(torch.isfinite(number)) for number in (value, low, high)):
        return Estimate.missing(len(positive))
    return Estimate(float(value), float(low), float(high), len(positive))


def _whole(scores: Float[Tensor, "*cell prompt"], positive: Bool[Tensor, " prompt"]) -> Float[Tensor, "*cell"]:
    return hedges_g(scores, positive, torch.ones(1, len(positive), dtype=torch.float64))[..., 0]
