"""How well scores tell two classes apart: area under the ROC curve, and recall at a fixed false-alarm rate.

Own code only because thousands of cells and resamples are needed at once; the tests hold it equal to
scikit-learn.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import family_weights, with_interval
from mechlens.settings import RESAMPLES


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
    scores: Float[Tensor, " prompt"],
    positive: Bool[Tensor, " prompt"],
    families: Sequence[str],
    seed: int,
    resamples: int = RESAMPLES,
) -> Estimate:
    """AUROC with its family-bootstrap interval (the scores frozen); missing where a class is empty."""
    return _estimate(auroc, scores, positive, families, seed, resamples)


def tpr_at_fpr_estimate(
    scores: Float[Tensor, " prompt"],
    positive: Bool[Tensor, " prompt"],
    families: Sequence[str],
    fpr: float,
    seed: int,
    resamples: int = RESAMPLES,
) -> Estimate:
    """`tpr_at_fpr` with its family-bootstrap interval, the threshold found anew in every resample."""
    return _estimate(lambda s, p, w=None: tpr_at_fpr(s, p, fpr, w), scores, positive, families, seed, resamples)


def snap(
    scores: Float[Tensor, "*cell prompt"], resolution: float | Float[Tensor, "*cell"]
) -> Float[Tensor, "*cell prompt"]:
    """Scores rounded to multiples of `resolution`, so that equal inputs tie exactly.

    Matrix products differ in their last bits from row to row. Where prompts share the very same vector
    (token embeddings at level 0) such bits would break ties and invent an AUROC.
    """
    step = torch.as_tensor(resolution, dtype=scores.dtype)[..., None]
    return torch.where(step > 0, (scores / step).round() * step, scores)


def _estimate(
    statistic: Callable[..., Tensor],
    scores: Float[Tensor, " prompt"],
    positive: Bool[Tensor, " prompt"],
    families: Sequence[str],
    seed: int,
    resamples: int,
) -> Estimate:
    """The statistic of all prompts, with the interval over resampled families."""
    value = float(statistic(scores, positive))
    if math.isnan(value):
        return Estimate.missing(len(positive))
    labels = ["positive" if flag else "negative" for flag in positive.tolist()]
    samples = statistic(scores, positive, family_weights(families, resamples, seed, labels))
    return with_interval(value, samples, len(positive))
