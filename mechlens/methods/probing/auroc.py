"""How well scores tell two classes apart: area under the ROC curve, and recall at a fixed false-alarm rate.

Own code only because thousands of cells and resamples are needed at once; the tests hold it equal to
scikit-learn.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import (
    Interval,
    as_wide_as_wilson,
    family_codes,
    family_weights,
    fewest_families,
    with_interval,
)
from mechlens.settings import RESAMPLES

MIN_FAMILIES = 10
"""With fewer families of a class an interval says nothing, so it is from 0 to 1."""


def auroc(
    scores: Float[Tensor, "*cell prompt"],
    positive: Bool[Tensor, " prompt"],
    weights: Float[Tensor, "resample prompt"] | None = None,
) -> Float[Tensor, "*values"]:
    """Chance that a positive prompt scores above a negative one, ties counting one half.

    Returns the cells' shape, with a last axis `resample` when `weights` are given. NaN where a class is
    empty or a score is not finite.
    """
    cells = scores.double().reshape(math.prod(scores.shape[:-1]), scores.shape[-1])
    if weights is None:
        return weighted_auroc(cells, positive.double()[None], (~positive).double()[None]).reshape(scores.shape[:-1])
    for_positive, for_negative = weights.double() * positive, weights.double() * ~positive
    # Cell by cell: the table of all cells and resamples of all prompts would not fit.
    areas = torch.empty(len(cells), len(weights), dtype=torch.float64)
    for cell, area in zip(cells, areas, strict=True):
        area.copy_(weighted_auroc(cell[None], for_positive, for_negative))
    return areas.reshape(*scores.shape[:-1], len(weights))


def weighted_auroc(
    scores: Float[Tensor, "#row prompt"],
    for_positive: Float[Tensor, "#row prompt"],
    for_negative: Float[Tensor, "#row prompt"],
) -> Float[Tensor, " any_row"]:
    """One area a row; each row may have its own scores, its own class members and its own weights.

    `for_positive` is a prompt's weight as a positive (0 for a negative), `for_negative` the other way
    round. A single row of scores or weights is shared by all rows.
    """
    order = scores.argsort(dim=-1)
    ranked = torch.take_along_dim(scores, order, dim=-1)
    below = torch.searchsorted(ranked, ranked, side="left")
    up_to = torch.searchsorted(ranked, ranked, side="right")
    cumulated = torch.take_along_dim(for_negative, order, dim=-1).cumsum(dim=-1)
    negatives = torch.nn.functional.pad(cumulated, (1, 0))
    # Weight of the negatives below a score plus half of those that tie with it.
    beaten = torch.take_along_dim(negatives, below, -1) + torch.take_along_dim(negatives, up_to, -1)
    won = (torch.take_along_dim(for_positive, order, dim=-1) * beaten).sum(dim=-1) / 2
    area = won / (for_positive.sum(dim=-1) * for_negative.sum(dim=-1))
    return torch.where(torch.isfinite(scores).all(dim=-1), area, torch.nan)


def tpr_at_fpr(
    scores: Float[Tensor, " prompt"],
    positive: Bool[Tensor, " prompt"],
    fpr: float,
    weights: Float[Tensor, "resample prompt"] | None = None,
) -> Float[Tensor, "*values"]:
    """Largest share of positives caught by a threshold that flags at most `fpr` of the negatives.

    A scalar, or one value a resample when `weights` are given. Tied scores are flagged together. NaN
    where a class is empty or a score is not finite.
    """
    each = torch.ones(1, len(positive), dtype=torch.float64) if weights is None else weights.double()
    ranked, order = scores.double().sort(descending=True)
    ordered, is_positive = each[:, order], positive[order]
    caught = (ordered * is_positive).cumsum(dim=1)
    flagged = (ordered * ~is_positive).cumsum(dim=1)
    totals = (each * positive).sum(dim=1, keepdim=True), (each * ~positive).sum(dim=1, keepdim=True)
    ends_tie = torch.cat([ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool)])[: len(ranked)]
    allowed = (flagged <= fpr * totals[1] + 1e-9) & ends_tie
    best = torch.where(allowed, caught / totals[0], 0.0).amax(dim=1) if len(ranked) else each.sum(dim=1)
    usable = (totals[0] > 0) & (totals[1] > 0) & torch.isfinite(scores).all()
    values = torch.where(usable.squeeze(1), best, torch.nan)
    return values.squeeze(0) if weights is None else values


def auroc_estimate(
    scores: Float[Tensor, " prompt"], positive: Bool[Tensor, " prompt"], families: Sequence[str]
) -> Estimate:
    """AUROC with the interval of `auroc_bounds` (the scores frozen); missing where a class is empty.

    >>> import torch
    >>> positive = torch.arange(40) >= 20
    >>> ml.auroc_estimate(torch.arange(40.0), positive, families=[str(i) for i in range(40)]).value
    1.0
    """
    if not isinstance(scores, Tensor) or not isinstance(positive, Tensor) or positive.dtype != torch.bool:
        raise UserError("auroc_estimate takes a tensor of scores, then one of bool: which prompts are positive")
    value = auroc(scores, positive)
    if bool(value.isnan()):
        return Estimate.missing(len(positive))
    bounds = auroc_bounds(scores, positive, families)
    return Estimate(float(value), float(bounds.low), float(bounds.high), len(positive), is_auroc=True)


def auroc_bounds(
    scores: Float[Tensor, "*cell prompt"], positive: Bool[Tensor, " prompt"], families: Sequence[str]
) -> Interval:
    """95% interval of the AUROC of every cell, the scores frozen; see `bounds_of`.

    Of intervals for 10 to 50 prompts a class, alone, in pairs or in families of one class, 95% to 98.5% hold the
    truth (`scripts/error_rates_separate.py --coverage`), where a percentile bootstrap of few prompts holds too little.
    """
    cells = scores.double().reshape(math.prod(scores.shape[:-1]), scores.shape[-1])
    value = auroc(cells, positive)
    parts = (placements(cells, positive) - value[:, None]) / _class_sizes(positive)
    low, high = bounds_of(value, parts, positive, families, pairs=float(positive.sum() * (~positive).sum()))
    return Interval(low=low.reshape(scores.shape[:-1]), high=high.reshape(scores.shape[:-1]))


def bounds_of(
    value: Float[Tensor, " cell"],
    parts: Float[Tensor, "cell prompt"],
    positive: Bool[Tensor, " prompt"],
    families: Sequence[str],
    pairs: float,
) -> Interval:
    """95% interval of AUROCs, by prompt families; from 0 to 1 below `MIN_FAMILIES` of a class.

    All areas that are no farther from the measured one than their own standard error times Student's t (Newcombe 2006,
    method 5, on Hanley & McNeil's variance), that variance scaled by how much more, or less, `parts` vary by family
    than by prompt: what each prompt adds to the error of the area (of its placement value, over the prompts of its
    class: DeLong et al. 1988, Obuchowski 1997). It has a width at an area of 1 too, and none where all scores are one.
    `pairs` are how many pairs of prompts were compared.
    """
    least = fewest_families(positive, families)
    if least < MIN_FAMILIES:
        return Interval(*(torch.where(value.isnan(), value, bound) for bound in (0.0, 1.0)))
    reach = float(stats.t.ppf(0.975, least - 1)) * _family_effect(parts, positive, families).sqrt()
    found = _farthest(value, reach, positive, pairs)
    # A score that is the same for all, such as that of a template's token, is at 0.5 whatever prompts are drawn.
    constant = (value == 0.5) & (parts == 0).all(dim=1)
    return Interval(*torch.where(constant, value, found))


def auroc_difference(
    first: Float[Tensor, " prompt"],
    second: Float[Tensor, " prompt"],
    positive: Bool[Tensor, " prompt"],
    families: Sequence[str],
) -> Estimate:
    """AUROC of the first scores minus that of the second on the same prompts, with a paired 95% interval by families.

    By the placement values (DeLong et al. 1988, Obuchowski 1997) and Student's t; a standard error is never taken
    for less than what half a pair of prompts changing places is worth. Missing below `MIN_FAMILIES` of a class.
    """
    both = torch.stack([first.double(), second.double()])
    areas = auroc(both, positive)
    least = fewest_families(positive, families)
    if bool(areas.isnan().any()) or least < MIN_FAMILIES:
        return Estimate.missing(len(positive))
    shares = placements(both, positive)
    parts = ((shares[0] - shares[1]) - (areas[0] - areas[1])) / _class_sizes(positive)
    sums = family_sums(parts[None], families)[0]
    error = max(math.sqrt(float(sums.square().sum()) * len(sums) / (len(sums) - 1)), 0.5 / len(positive))
    value, reach = float(areas[0] - areas[1]), float(stats.t.ppf(0.975, least - 1)) * error
    return Estimate(value, value - reach, value + reach, len(positive))


def family_sums(parts: Float[Tensor, "cell prompt"], families: Sequence[str]) -> Float[Tensor, "cell family"]:
    """Sum over the prompts of each family."""
    codes, n_families = family_codes(families)
    return torch.zeros(len(parts), n_families, dtype=torch.float64).index_add_(1, codes, parts)


def _family_effect(
    parts: Float[Tensor, "cell prompt"], positive: Bool[Tensor, " prompt"], families: Sequence[str]
) -> Float[Tensor, " cell"]:
    """Variance of the AUROC by families over that of independent prompts; 1 where neither varies."""
    sums, n = family_sums(parts, families), _class_sizes(positive)
    clustered = sums.square().sum(dim=1) * sums.shape[1] / (sums.shape[1] - 1)
    independent = (parts.square() * n / (n - 1)).sum(dim=1)
    return torch.where(independent > 0, clustered / independent, 1.0)


def _class_sizes(positive: Bool[Tensor, " prompt"]) -> Float[Tensor, " prompt"]:
    """How many prompts are of each prompt's class."""
    return torch.where(positive, positive.sum(), (~positive).sum()).double()


def placements(scores: Float[Tensor, "cell prompt"], positive: Bool[Tensor, " prompt"]) -> Float[Tensor, "cell prompt"]:
    """Of a positive prompt the share of negatives below it, of a negative one the share of positives above it."""
    shares = torch.empty(scores.shape, dtype=torch.float64)
    for flags, sign in ((positive, 1.0), (~positive, -1.0)):
        others = (sign * scores[:, ~flags]).sort(dim=1).values
        own = (sign * scores[:, flags]).contiguous()
        below = torch.searchsorted(others, own, side="left") + torch.searchsorted(others, own, side="right")
        shares[:, flags] = below.double() / 2 / max(others.shape[1], 1)
    return shares


def _farthest(
    value: Float[Tensor, " cell"], reach: Float[Tensor, " cell"], positive: Bool[Tensor, " prompt"], pairs: float
) -> Float[Tensor, "2 cell"]:
    """The areas nearest to 0 and to 1 that lie within `reach` of their own standard errors of `value`, by bisection."""
    prompts = (1 / int(positive.sum()) + 1 / int((~positive).sum())) / 2
    inside = value.expand(2, -1)
    outside = torch.tensor([[0.0], [1.0]], dtype=value.dtype).expand_as(inside)
    for _ in range(40):
        area = (inside + outside) / 2
        spread = 1 / pairs + (prompts - 1 / pairs) * ((1 - area) / (2 - area) + area / (1 + area))
        error = (area * (1 - area) * spread).sqrt()
        holds = (area - value).abs() <= reach * error
        inside, outside = torch.where(holds, area, inside), torch.where(holds, outside, area)
    return inside


def less_than_one(share: float, n: int) -> bool:
    """Whether that share of n prompts is no whole prompt."""
    return share * n < 1


def tpr_at_fpr_estimate(
    scores: Float[Tensor, " prompt"],
    positive: Bool[Tensor, " prompt"],
    families: Sequence[str],
    fpr: float,
    seed: int,
    resamples: int = RESAMPLES,
) -> Estimate:
    """`tpr_at_fpr` of n positives with its family-bootstrap interval, the threshold found anew in every resample.

    The interval holds Wilson's of as many draws as there are positive families. Missing where the negatives are so few
    that such a share of them is less than one prompt.
    """
    value, n = float(tpr_at_fpr(scores, positive, fpr)), int(positive.sum())
    if math.isnan(value) or less_than_one(fpr, int((~positive).sum())):
        return Estimate.missing(n)
    labels = ["positive" if flag else "negative" for flag in positive.tolist()]
    samples = tpr_at_fpr(scores, positive, fpr, family_weights(families, resamples, seed, labels))
    caught = {family for family, flag in zip(families, positive.tolist(), strict=True) if flag}
    return as_wide_as_wilson(with_interval(value, samples, n), len(caught))


def snap(
    scores: Float[Tensor, "*cell prompt"], resolution: float | Float[Tensor, "*cell"]
) -> Float[Tensor, "*cell prompt"]:
    """Scores rounded to multiples of `resolution`, so that equal inputs tie exactly.

    Matrix products differ in their last bits from row to row. Where prompts share the very same vector
    (token embeddings at level 0) such bits would break ties and invent an AUROC.
    """
    step = torch.as_tensor(resolution, dtype=scores.dtype)[..., None]
    return torch.where(step > 0, (scores / step).round() * step, scores)
