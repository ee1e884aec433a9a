"""Whether one direction is all there is of a concept: what can still be read once that direction is taken out.

A linear score reads one direction however many dimensions it has, so an AUROC that rises with the number of dimensions
doesn't tell a subspace from a better direction. With the mean difference taken out class means coincide, no linear
score is left, and what can be read lies in how vectors spread: in the directions in which one class varies more, as it
does where each kind of harm has a direction of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.geometry.subspaces.by_rank import RANDOM_SUBSPACES
from mechlens.methods.probing.within_folds import Folds, auroc_gain, folds_of, mean_auroc
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import one_thread

DIMENSIONS = 8
"""The best number of dimensions a class in Wang et al. 2023."""


@dataclass(frozen=True)
class BeyondOne:
    """A concept's one direction, and what is left without it; see `beyond_one_direction`.

    >>> import torch
    >>> values = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
    >>> values[:20, 0] += 9  # one kind of the concept
    >>> values[20:40, 1] += 9  # and another
    >>> families = [str(i) for i in range(80)]
    >>> found = ml.beyond_one_direction(values, torch.arange(80) < 40, families, k=2, random=3, seed=0)
    >>> found.left.low > 0.65, found.left.value > found.random_mean
    (True, True)
    """

    line: Estimate
    """AUROC of the mean difference, out of fold."""
    left: Estimate
    """AUROC of `k` dimensions once the mean difference is taken out; 0.5 where one direction was all."""
    random_mean: float
    """The same of `k` random dimensions."""
    random_max: float
    words: Estimate
    """The same of vectors that hold the words alone; missing where none were given."""
    beyond_words: Estimate
    """`left` minus `words`, over the same pairs of prompts."""
    k: int


@one_thread()
def beyond_one_direction(
    values: Float[Tensor, "prompt d_model"],
    positive: Bool[Tensor, " label"],
    families: Sequence[str],
    *,
    k: int = DIMENSIONS,
    random: int = RANDOM_SUBSPACES,
    seed: int,
    words: Float[Tensor, "other d_words"] | None = None,
) -> BeyondOne:
    """The mean difference out of fold, and what `k` dimensions read without it.

    Every fold's mean difference is projected out and what is left taken to length 1, so that a class that is wider in
    all directions alike says nothing. The `k` dimensions are those in which second moments of the classes differ most,
    on the prompts that the fold fits on. `words` are vectors of the same prompts, such as mean token embeddings.

    >>> import torch
    >>> values = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
    >>> values[:20, 0] += 9  # one kind of the concept
    >>> values[20:40, 1] += 9  # and another
    >>> families = [str(i) for i in range(80)]
    >>> found = ml.beyond_one_direction(values, torch.arange(80) < 40, families, k=2, random=3, seed=0)
    >>> found.left.low > 0.65, found.left.value > found.random_mean
    (True, True)
    """
    if not len(values) == len(positive) == len(families) == len(values if words is None else words):
        raise UserError(
            f"there are {len(values)} vectors, {len(positive)} labels and {len(families)} families; give one of each a "
            "prompt, and of words too"
        )
    if not 1 <= k < values.shape[1]:
        raise UserError(f"{k} dimensions of {values.shape[1]} were asked for; ask for 1 to {values.shape[1] - 1}")
    folds = folds_of(positive, families, seed)
    inside = _span(values)
    line = folds.scored(lambda fit, _: (inside - inside[fit].mean(dim=0)) @ _difference(inside[fit], positive[fit]))
    ours = _left(inside, folds, k)
    drawn = [float(mean_auroc(_left(inside, folds, k, _random_axes(inside, k, seed + i)), folds).value)
             for i in range(random)]  # fmt: skip
    missing = Estimate.missing(len(values))
    theirs = None if words is None else _left(_span(words), folds, k)
    return BeyondOne(
        mean_auroc(line, folds),
        mean_auroc(ours, folds),
        sum(drawn) / max(len(drawn), 1),
        max(drawn, default=float("nan")),
        missing if theirs is None else mean_auroc(theirs, folds),
        missing if theirs is None else auroc_gain(ours, theirs, folds),
        k,
    )


def _span(values: Tensor) -> Float[Tensor, "prompt axis"]:
    """The vectors about their mean, in as few dimensions as there are prompts at most: products are the same."""
    exact = values.detach().cpu().double()
    centred = exact - exact.mean(dim=0)
    return centred if centred.shape[1] <= len(centred) else torch.linalg.qr(centred.T).R.T


def _difference(values: Tensor, positive: Tensor) -> Float[Tensor, " axis"]:
    return values[positive].mean(dim=0) - values[~positive].mean(dim=0)


def _random_axes(values: Tensor, k: int, seed: int) -> Float[Tensor, "axis k"]:
    drawn = torch.randn(values.shape[1], k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(drawn).Q
    return basis


def _left(
    values: Float[Tensor, "prompt axis"], folds: Folds, k: int, axes: Tensor | None = None
) -> Float[Tensor, "repeat prompt"]:
    """Scores without each fold's mean difference, in its own dimensions or in those that `axes` span."""

    def read(fit: list[int], _: int) -> Tensor:
        own = folds.positive[fit]
        units = erased(values, values[fit].mean(dim=0), _difference(values[fit], own))
        units = units if axes is None else units @ axes
        return second_moments(units[fit][own], units[fit][~own], k)(units)

    return folds.scored(read)


def erased(
    values: Float[Tensor, "prompt axis"], centre: Float[Tensor, " axis"], line: Float[Tensor, " axis"]
) -> Float[Tensor, "prompt axis"]:
    """The vectors about the centre, without what they have along the line, at length 1; 0 where nothing is left."""
    along = torch.nn.functional.normalize(line, dim=0)
    centred = values - centre
    return torch.nn.functional.normalize(centred - (centred @ along)[:, None] * along, dim=1)


def second_moments(
    positive: Float[Tensor, "positive axis"], negative: Float[Tensor, "negative axis"], k: int
) -> Callable[[Tensor], Tensor]:
    """A score: squared components along the `k` axes in which mean squares differ most, weighed by the difference."""
    moments = positive.T @ positive / len(positive) - negative.T @ negative / len(negative)
    differences, axes = torch.linalg.eigh(moments)
    chosen = differences.abs().argsort(descending=True)[:k]
    return lambda vectors: (vectors @ axes[:, chosen]).square() @ differences[chosen]
