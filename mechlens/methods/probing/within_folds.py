"""AUROC of scores out of fold, taken inside the folds, and how far one read-out is ahead of another.

Scores of two folds come from two fits. Those differ in offset and scale, and against the labels: where more positive
prompts are held out, fewer are fitted on, and the scores come out lower. Over all folds together an AUROC is so too
low, most for few prompts and for scores that many prompts share (`scripts/error_rates_direction.py --folds`). Here
prompts are compared only where one fit scored both, which has no such bias (Forman & Scholz 2010).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.methods.probing.auroc import bounds_of, family_sums, snap
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import Fold, family_codes, fewest_families, folds_of_both

FOLDS = 5
REPEATS = 6
"""Divisions into folds: one alone compares a fifth of all pairs, six compare three in four."""

Read = Callable[[list[int], int], Float[Tensor, " prompt"]]
"""Rows to fit on, and the level to read -> scores of all prompts."""


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

    def middle(self, scores: Float[Tensor, " prompt"], fit: list[int]) -> Tensor:
        """Half way between the two classes' means over the rows fitted on."""
        own = self.positive[fit]
        return (scores[fit][own].mean() + scores[fit][~own].mean()) / 2

    @cached_property
    def pairs(self) -> tuple[Int[Tensor, "2 pair"], ...]:
        """Of each repeat the pairs that are compared: a positive and a negative prompt that one fold holds out.

        Not two of one family: a prompt and its twin are always held out together, so of few prompts' pairs they would
        be a large part, and what tells twins apart isn't what tells any two prompts apart.
        """
        family, _ = family_codes(self.families)
        found = []
        for folds in self.parts:
            rows = [torch.tensor(fold.scored, dtype=torch.long) for fold in folds]
            each = [torch.cartesian_prod(own[self.positive[own]], own[~self.positive[own]]) for own in rows]
            pairs = torch.cat(each).T
            found.append(pairs[:, family[pairs[0]] != family[pairs[1]]].contiguous())
        return tuple(found)

    @cached_property
    def n_pairs(self) -> float:
        """How many pairs, each compared once, would say as much as these, some of which are compared several times."""
        up, down = torch.cat(self.pairs, dim=1)
        times = (up * len(self.positive) + down).unique(return_counts=True)[1].double()
        return float(times.sum().square() / times.square().sum())


def folds_of(positive: Bool[Tensor, " prompt"], families: Sequence[str], seed: int) -> Folds:
    """Families stay whole and classes even; fewer folds where they would have one family of a class.

    UserError where a class has one family.
    """
    most = min(FOLDS, max(2, fewest_families(positive, families) // 2))
    parts = tuple(folds_of_both(positive, families, most, seed + repeat) for repeat in range(REPEATS))
    return Folds(positive, tuple(families), parts)


def mean_auroc(scores: Float[Tensor, "row prompt"], folds: Folds) -> Estimate:
    """Share of the compared pairs (see `Folds.pairs`) in which the positive prompt scores higher, ties counting half.

    Rows are the repeats, or several times these; a pair counts once for every row that compares it. The interval is
    that of `bounds_of`, by what each family adds to the error of this share. Missing where there is no pair, or a score
    isn't finite.

    It takes the fits as they are. Where these vary much with the prompts, as of a weak signal in many dimensions, it is
    too narrow, and that of a gain is too (`scripts/error_rates_direction.py --folds`).
    """
    return _estimated(scores, folds)[0]


def auroc_gain(ours: Float[Tensor, "row prompt"], theirs: Float[Tensor, "other prompt"], folds: Folds) -> Estimate:
    """`mean_auroc` of `ours` minus that of `theirs`, over the same pairs.

    The interval comes from both AUROCs' own and from how they vary together over families (MOVER: Zou 2007, after
    Newcombe 1998, method 10).
    """
    (first, one), (second, other) = (_estimated(scores, folds) for scores in (ours, theirs))
    value = first.value - second.value
    if value != value:
        return Estimate.missing(len(folds.positive))
    together = _correlation(one, other)

    def reach(own: float, other: float) -> float:
        return math.sqrt(max(own**2 - 2 * together * own * other + other**2, 0.0))

    below = reach(first.value - first.low, second.high - second.value)
    above = reach(first.high - first.value, second.value - second.low)
    return Estimate(value, value - below, value + above, len(folds.positive))


def _estimated(scores: Float[Tensor, "row prompt"], folds: Folds) -> tuple[Estimate, Float[Tensor, " family"]]:
    """The AUROC, and what each family adds to its error: linearised, as of a ratio (pairs won over all pairs)."""
    n = len(folds.positive)
    won, met = torch.zeros(2, n, dtype=torch.float64)
    for row, own in enumerate(scores.double()):
        up, down = pairs = folds.pairs[row % len(folds.pairs)]
        above = (own[up] > own[down]).double() + (own[up] == own[down]).double() / 2
        for side in pairs:
            won.index_add_(0, side, above)
            met += torch.bincount(side, minlength=n)
    value = won.sum() / met.sum()
    if bool(value.isnan()) or not bool(torch.isfinite(scores).all()):
        return Estimate.missing(n), torch.zeros(0)
    parts = (won - value * met)[None] / (met.sum() / 2)
    low, high = bounds_of(value[None], parts, folds.positive, folds.families, folds.n_pairs)
    return Estimate(float(value), float(low), float(high), n, is_auroc=True), family_sums(parts, folds.families)[0]


def _correlation(one: Float[Tensor, " family"], other: Float[Tensor, " family"]) -> float:
    """Of two AUROCs' errors; 0 where one has none."""
    sizes = float((one.square().sum() * other.square().sum()).sqrt())
    return float((one * other).sum()) / sizes if sizes > 0 else 0.0
