"""Read-outs that score every prompt by a fit to others, and how far one is ahead of another on the same prompts.

Words, embeddings and activations are read by one reader, logistic regression, so that nothing but what is read differs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.directions.methods import logistic_line
from mechlens.methods.probing.auroc import auroc, auroc_bounds, family_sums, placements, snap
from mechlens.methods.probing.baselines import tfidf_scores
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import Fold, family_codes, folds_of_both

FOLDS = 10
REPEATS = 3
"""Divisions into folds: one alone decides a little of every number by chance."""
PENALTY = 1.0
"""scikit-learn's C of the reader."""

Read = Callable[[list[int], int], Float[Tensor, " prompt"]]
"""Rows to fit on, and the level to read -> scores of all prompts, 0 half way between the classes' means fitted on."""


@dataclass(frozen=True)
class Folds:
    """Which prompts are positive, and by a fit to which others each is scored: once a repeat."""

    positive: Bool[Tensor, " prompt"]
    families: tuple[str, ...]
    parts: tuple[tuple[Fold, ...], ...]
    """Of each repeat."""

    def scored(self, read: Read, levels: Sequence[Sequence[int]] | None = None) -> Float[Tensor, "repeat prompt"]:
        """Every prompt's score out of fold (float64); `levels` of each repeat's folds as `levels_of` chose them."""
        scores = torch.full((len(self.parts), len(self.positive)), torch.nan, dtype=torch.float64)
        for repeat, folds in enumerate(self.parts):
            for k, fold in enumerate(folds):
                held_out, level = list(fold.scored), levels[repeat][k] if levels else 0
                scores[repeat, held_out] = read(list(fold.fitted), level)[held_out].double()
        return snap(scores, 1e-9 * max(1.0, float(scores.abs().max())))  # what ties but for rounding ties

    def centred(self, scores: Float[Tensor, " prompt"], fit: list[int]) -> Float[Tensor, " prompt"]:
        """The scores counted from half way between the two classes' means over the rows fitted on."""
        return scores - self.middle(scores, fit)

    def middle(self, scores: Float[Tensor, " prompt"], fit: list[int]) -> Tensor:
        """Half way between the two classes' means over the rows fitted on."""
        own = self.positive[fit]
        return (scores[fit][own].mean() + scores[fit][~own].mean()) / 2


def ranked(scores: Float[Tensor, " prompt"]) -> Float[Tensor, " prompt"]:
    """Where each score stands among all prompts', from 0 to 1: the middle of those that it ties with.

    For scores that many prompts share. Their size differs a little from fold to fold, and against the labels: where
    more positive prompts of one score are held out, fewer are fitted on, and it is lower. Ranks don't differ so, and
    prompts that nothing tells apart tie over all folds.
    """
    known = scores.sort().values
    both = torch.searchsorted(known, scores) + torch.searchsorted(known, scores, side="right")
    return both.double() / (2 * len(scores))


def folds_of(positive: Bool[Tensor, " prompt"], families: Sequence[str], seed: int) -> Folds:
    """Families stay whole and classes even; UserError where a class has one family."""
    parts = tuple(folds_of_both(positive, families, FOLDS, seed + repeat) for repeat in range(REPEATS))
    return Folds(positive, tuple(families), parts)


def read_words(texts: Sequence[str], folds: Folds) -> Float[Tensor, "repeat prompt"]:
    """Logistic regression on TF-IDF of words, punctuation marks and pairs of them."""

    def read(fit: list[int], _: int) -> Tensor:
        fitted = [texts[i] for i in fit]
        if not any(text.strip() for text in fitted):
            return torch.zeros(len(texts))
        return folds.centred(tfidf_scores(fitted, folds.positive[fit], texts), fit)

    return folds.scored(read)


def read_vectors(
    values: Float[Tensor, "prompt level d"], folds: Folds, levels: Sequence[Sequence[int]] | None = None
) -> Float[Tensor, "repeat prompt"]:
    """Logistic regression on standardised vectors, of the first level where none are given."""

    def read(fit: list[int], level: int) -> Tensor:
        line, _ = logistic_line(values[fit, level], folds.positive[fit], penalty=PENALTY)
        return folds.centred(values[:, level].double() @ line, fit)

    return folds.scored(read, levels)


def read_tokens(vectors: Float[Tensor, "prompt d"], folds: Folds) -> Float[Tensor, "repeat prompt"]:
    """Logistic regression on the embeddings of single tokens, of which many prompts may share one: see `ranked`."""

    def read(fit: list[int], _: int) -> Tensor:
        line = logistic_line(vectors[fit], folds.positive[fit], penalty=PENALTY)[0]
        scores = vectors.double() @ line
        return ranked(snap(scores, 1e-9 * max(1.0, float(scores.abs().max()))))

    return folds.scored(read)


def levels_of(values: Float[Tensor, "prompt level d"], folds: Folds) -> tuple[tuple[int, ...], ...]:
    """The row of the level that each fold reads, chosen on the rows that it fits on.

    That with the largest AUROC of mean differences which leave the scored prompt's family out; of equals the first.
    """
    family, _ = family_codes(folds.families)
    areas = torch.empty(values.shape[1], sum(map(len, folds.parts)), dtype=torch.float64)
    fits = [list(fold.fitted) for part in folds.parts for fold in part]
    for level, row in enumerate(values.unbind(dim=1)):
        wide = row.double() - row.double().mean(dim=0)
        products = wide @ wide.T
        for k, fit in enumerate(fits):
            areas[level, k] = _left_out_auroc(products[fit][:, fit], folds.positive[fit], family[fit])
    chosen = iter(areas.numpy().argmax(axis=0).tolist())  # NumPy promises the first of equals, torch doesn't
    return tuple(tuple(next(chosen) for _ in part) for part in folds.parts)


def _left_out_auroc(products: Float[Tensor, "n n"], positive: Bool[Tensor, " n"], family: Tensor) -> Tensor:
    others = family[:, None] != family[None, :]
    up, down = (others & positive).double(), (others & ~positive).double()
    share = up / up.sum(dim=1, keepdim=True) - down / down.sum(dim=1, keepdim=True)
    scores = (products * share).sum(dim=1)
    return auroc(snap(scores, 1e-10 * float(products.diagonal().max())), positive)


def mean_auroc(scores: Float[Tensor, "repeat prompt"], folds: Folds) -> Estimate:
    """Mean over the repeats of the AUROC, and of the bounds that `auroc_bounds` gives each."""
    value = auroc(scores, folds.positive).mean()
    if bool(value.isnan()):
        return Estimate.missing(len(folds.positive))
    low, high = (side.mean() for side in auroc_bounds(scores, folds.positive, folds.families))
    return Estimate(float(value), float(low), float(high), len(folds.positive), is_auroc=True)


def auroc_gain(ours: Float[Tensor, "repeat prompt"], theirs: Float[Tensor, "other prompt"], folds: Folds) -> Estimate:
    """Mean AUROC of `ours` minus that of `theirs`, paired by prompt.

    The interval comes from both AUROCs' own and from how they vary together over families (MOVER: Zou 2007, after
    Newcombe 1998, method 10). Of intervals for 12 to 96 prompts a class 94% to 100% hold the truth, most where the two
    nearly agree or are near 1, and at most 3.2% lie on either side of it.
    """
    first, second = mean_auroc(ours, folds), mean_auroc(theirs, folds)
    value = first.value - second.value
    if value != value:
        return Estimate.missing(len(folds.positive))
    together = _correlation(ours, theirs, folds)

    def reach(own: float, other: float) -> float:
        return math.sqrt(max(own**2 - 2 * together * own * other + other**2, 0.0))

    below = reach(first.value - first.low, second.high - second.value)
    above = reach(first.high - first.value, second.value - second.low)
    return Estimate(value, value - below, value + above, len(folds.positive))


def _correlation(ours: Tensor, theirs: Tensor, folds: Folds) -> float:
    """Of the two AUROCs, from their placement values summed by family; 0 where one doesn't vary."""
    one, other = (_by_family(scores, folds) for scores in (ours, theirs))
    sizes = float((one.square().sum() * other.square().sum()).sqrt())
    return float((one * other).sum()) / sizes if sizes > 0 else 0.0


def _by_family(scores: Float[Tensor, "repeat prompt"], folds: Folds) -> Float[Tensor, " family"]:
    deviation = placements(scores, folds.positive) - auroc(scores, folds.positive)[:, None]
    return family_sums(deviation.mean(dim=0, keepdim=True), folds.positive, folds.families)[0]
