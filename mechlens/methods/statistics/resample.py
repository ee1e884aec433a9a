"""Chance, by prompt family: folds, bootstrap weights, halves and permuted labels, all seeded.

Prompts of one family (a matched pair, a paraphrase set) are not independent, so families are what is
drawn; an interval over prompts would be too narrow.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import binomtest
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.statistics.estimate import Estimate
from mechlens.prompts.split import families_by_classes, families_of_each
from mechlens.settings import RESAMPLES


class Fold(NamedTuple):
    """Rows to fit on and rows to score; no family is in both."""

    fitted: tuple[int, ...]
    scored: tuple[int, ...]


ScoreFold = Callable[[list[int], list[int]], Float[Tensor, " held_out"]]
"""Rows to fit on and rows to score -> scores of the latter."""


def held_out_scores(
    score: ScoreFold, positive: Bool[Tensor, " prompt"], families: Sequence[str], folds: int, seed: int
) -> Float[Tensor, " prompt"]:
    """Each prompt's score by a fit to the folds that don't hold its family (float64)."""
    scores = torch.full((len(positive),), torch.nan, dtype=torch.float64)
    for fold in folds_of_both(positive, families, folds, seed):
        scores[list(fold.scored)] = score(list(fold.fitted), list(fold.scored)).double()
    return scores


def folds_of_both(positive: Bool[Tensor, " prompt"], families: Sequence[str], most: int, seed: int) -> tuple[Fold, ...]:
    """`family_folds`, as many as the class of fewer families has, if not `most`; UserError where it has one."""
    n = min(most, fewest_families(positive, families))
    if n < 2:
        raise UserError("each label needs prompts of at least 2 families, so that scores can be held out; add some")
    return family_folds([str(flag) for flag in positive.tolist()], families, n, seed)


def family_folds(labels: Sequence[str], families: Sequence[str], n: int, seed: int) -> tuple[Fold, ...]:
    """Folds of whole families in which each label has about its share; UserError for fewer families than folds."""
    found = len(set(families))
    if found < n:
        raise UserError(f"there are {found} prompt families for {n} folds; every fold needs one, so add prompts")
    splitter = StratifiedGroupKFold(n, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A label with fewer prompts than folds is missing from some: what needs it says so itself.
        warnings.filterwarnings("ignore", message="The least populated class")
        parts = list(splitter.split(np.zeros(len(labels)), list(labels), list(families)))
    return tuple(Fold(tuple(fitted.tolist()), tuple(scored.tolist())) for fitted, scored in parts)


def fewest_families(positive: Bool[Tensor, " prompt"], families: Sequence[str]) -> int:
    """Families of the class that has fewer."""
    found = families_of_each(positive.tolist(), families)
    return min(found[True], found[False])


class Interval(NamedTuple):
    """Lower and upper bounds, each with the cells' shape."""

    low: Float[Tensor, "*cell"]
    high: Float[Tensor, "*cell"]


def family_weights(
    families: Sequence[str], resamples: int, seed: int, labels: Sequence[str] | None = None
) -> Float[Tensor, "resample prompt"]:
    """How often each prompt is in each bootstrap resample of whole families (float64 counts).

    With `labels`, families that hold the same set of labels are drawn among themselves, so that no
    resample loses a class: a matched pair holds both. Efron & Tibshirani 1993, cluster bootstrap.
    """
    if resamples < 1:
        raise UserError(f"resamples is {resamples}, and an interval is of at least one")
    generator = torch.Generator().manual_seed(seed)
    codes, n_families = family_codes(families)
    counts = torch.zeros(resamples, n_families, dtype=torch.float64)
    for members in _groups(families, labels):
        draws = torch.randint(len(members), (resamples, len(members)), generator=generator)
        drawn = torch.zeros(resamples, len(members), dtype=torch.float64)
        counts[:, members] = drawn.scatter_add_(1, draws, torch.ones_like(drawn))
    return counts[:, codes]


def family_halves(
    families: Sequence[str], n_splits: int, seed: int, labels: Sequence[str] | None = None
) -> Bool[Tensor, "split prompt"]:
    """True for the prompts in the first half of each random halving of the families.

    With `labels`, families with the same set of labels are halved among themselves. An odd family
    out goes to either half by chance.
    """
    generator = torch.Generator().manual_seed(seed)
    codes, n_families = family_codes(families)
    first = torch.zeros(n_splits, n_families, dtype=torch.bool)
    for members in _groups(families, labels):
        ranks = torch.rand(n_splits, len(members), generator=generator).argsort(dim=1)
        spare = torch.randint(2, (n_splits, 1), generator=generator) * (len(members) % 2)
        first[:, members] = ranks < len(members) // 2 + spare
    return first[:, codes]


def permuted_labels(
    positive: Bool[Tensor, " prompt"], families: Sequence[str], n: int, seed: int
) -> Bool[Tensor, "permutation prompt"]:
    """`n` label vectors that could have been, had the label nothing to do with the prompt.

    Where every family holds both classes (matched pairs), labels are shuffled inside families.
    Otherwise whole families exchange their labels with families of the same size; a family whose size
    is unique keeps its own. Class counts never change.
    """
    generator = torch.Generator().manual_seed(seed)
    codes, n_families = family_codes(families)
    rows = [torch.nonzero(codes == family).flatten() for family in range(n_families)]
    paired = all(bool(positive[row].any()) and not bool(positive[row].all()) for row in rows)
    permuted = positive.expand(n, -1).clone()
    for size in sorted({len(row) for row in rows}):
        same_size = torch.stack([row for row in rows if len(row) == size])
        labels = positive[same_size].expand(n, -1, -1)
        if not paired:
            order = torch.rand(n, len(same_size), generator=generator).argsort(dim=1)
            labels = labels.gather(1, order[:, :, None].expand(labels.shape))
        # Inside a family too: a pair is always listed harmful first, and that order is no chance.
        inner = torch.rand(labels.shape, generator=generator).argsort(dim=2)
        permuted[:, same_size.flatten()] = labels.gather(2, inner).flatten(1)
    return permuted


def interval(samples: Float[Tensor, "*cell resample"], level: float = 0.95) -> Interval:
    """Percentile interval over resamples; resamples without a value (NaN) are left out.

    It has no width where every resample gives the same number, as when an AUROC is exactly 1.
    """
    tail = (1 - level) / 2
    bounds = torch.tensor([tail, 1 - tail], dtype=samples.dtype)
    low, high = torch.nanquantile(samples, bounds, dim=-1)
    return Interval(low=low, high=high)


def with_interval(value: float, samples: Float[Tensor, " resample"], n: int) -> Estimate:
    """A number with the interval of its resamples."""
    bounds = interval(samples)
    return Estimate(value, float(bounds.low), float(bounds.high), n)


def sample_and_resamples(
    families: Sequence[str], resamples: int, seed: int, labels: Sequence[str] | None = None
) -> Float[Tensor, "draw prompt"]:
    """The sample itself, every weight 1, and after it its `family_weights`."""
    drawn = family_weights(families, resamples, seed, labels)
    return torch.cat([torch.ones(1, len(families), dtype=torch.float64), drawn])


def of_sample(draws: Float[Tensor, " draw"], n: int) -> Estimate:
    """The number of the sample, which is the first draw, with the interval of the others."""
    return with_interval(float(draws[0]), draws[1:], n)


def mean_estimate(
    values: Float[Tensor, " prompt"], families: Sequence[str], seed: int, resamples: int = RESAMPLES, *, least: int = 1
) -> Estimate:
    """The mean over prompts with its family-bootstrap interval; missing where there are fewer than `least`."""
    if len(values) < least or not bool(torch.isfinite(values).all()):
        return Estimate.missing(len(values))
    weights = family_weights(families, resamples, seed)
    return with_interval(float(values.double().mean()), weights @ values.double() / weights.sum(dim=1), len(values))


def rate_estimate(
    flags: Bool[Tensor, " prompt"], families: Sequence[str], seed: int, resamples: int = RESAMPLES
) -> Estimate:
    """The share of prompts that are flagged, with its family-bootstrap interval, widened to hold Wilson's.

    Where all prompts are alike a bootstrap has no width; Wilson's interval (1927), for as many draws as there are
    families, has: 0 of 32 is 0 [0, 0.11].
    """
    mean = mean_estimate(flags.double(), families, seed, resamples)
    return as_wide_as_wilson(mean, len(set(families)))


def as_wide_as_wilson(share: Estimate, families: int) -> Estimate:
    """The share with an interval that holds Wilson's for as many draws as there are families."""
    if not share.measurable:
        return share
    wilson = binomtest(round(share.value * families), families).proportion_ci(method="wilson")
    return Estimate(share.value, min(share.low, wilson.low), max(share.high, wilson.high), share.n)


def jackknife_variance(without: Float[Tensor, "*value family"]) -> Float[Tensor, "*value"]:
    """The variance of a number, from what it is without each family of prompts in turn."""
    n = without.shape[-1]
    return (without - without.mean(dim=-1, keepdim=True)).square().sum(dim=-1) * (n - 1) / n


def family_codes(families: Sequence[str]) -> tuple[Int[Tensor, " prompt"], int]:
    """Each prompt's family as a number in order of first sight, and how many families there are."""
    numbers = {family: number for number, family in enumerate(dict.fromkeys(families))}
    return torch.tensor([numbers[family] for family in families], dtype=torch.long), len(numbers)


def _groups(families: Sequence[str], labels: Sequence[str] | None) -> list[list[int]]:
    """Numbers of the families that are drawn among themselves."""
    numbers = {family: number for number, family in enumerate(dict.fromkeys(families))}
    if labels is None:
        return [list(numbers.values())] if numbers else []
    return [[numbers[family] for family in group] for group in families_by_classes(labels, families).values()]


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs PyTorch on one thread inside; the process's own number of threads comes back afterwards.

    Small tensors gain nothing from threads, and on a busy machine every one of thousands of short
    operations waits for its slowest thread: a detection took 82 s so, and 16 s on one thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
