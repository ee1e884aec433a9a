"""How much of a direction is chance: permuted labels, random directions of the same norm, split-half reliability.

Two estimates of the *same* direction from 64 prompts can have cosine 0.2; no cosine between directions
means anything without their reliability.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.activations.activations import Activations, one_cell
from mechlens.methods.directions.direction import (
    Direction,
    cosine,
    mean_difference,
    members,
    project,
    random_like,
    weighted_difference,
    weighted_differences,
)
from mechlens.methods.directions.methods import MEAN_DIFFERENCE, grid_by
from mechlens.methods.probing.auroc import auroc, snap, weighted_auroc
from mechlens.methods.statistics.resample import family_halves, one_thread, permuted_labels

TIE_RESOLUTION = 1e-10
"""Scores nearer than this share of the product of norms are ties: far above float64's rounding, far
below what float32 activations can tell apart."""


@dataclass(frozen=True)
class PermutationNull:
    """Test AUROCs of directions fitted to permuted labels, all else as for the real one."""

    mean: float
    quantile_95: float
    """An observed AUROC above this has p < 0.05."""
    p: float
    """(1 + permutations at least as good) / (1 + permutations); NaN where nothing can be permuted."""
    n: int
    """Permutations drawn."""


@dataclass(frozen=True)
class RandomNull:
    """Test AUROCs of random directions with the same norm, each folded to max(a, 1 - a).

    A random direction has no sign of its own, so it gets the better one: chance is flattered, never the
    claim, and the mean lies a little above 0.5 even without signal.
    """

    mean: float
    maximum: float
    n: int
    """Random directions drawn."""


@dataclass(frozen=True)
class LabelledVectors:
    """The vectors of one cell with what is needed to fit or to score a contrast on them."""

    values: Float[Tensor, "prompt d_model"]
    positive: Bool[Tensor, " prompt"]
    families: Sequence[str]


def permutation_null(
    train: LabelledVectors,
    test: LabelledVectors,
    observed: float,
    n: int,
    seed: int,
    refit: Callable[[Bool[Tensor, "draw train"]], Float[Tensor, "draw test"]] | None = None,
) -> PermutationNull:
    """Refits the mean difference on permuted training labels `n` times and scores it on the test prompts.

    `refit` does it for another direction: permuted training labels -> test scores.

    The test labels are permuted in the same way. With true test labels, a chance excess of true labels in
    training would leave the concept in the direction, and the null would be as wide as the effect.
    Families stay whole (`permuted_labels`); p needs n >= 200 to mean much.
    """
    fitted = permuted_labels(train.positive, train.families, n, seed)
    scored = permuted_labels(test.positive, test.families, n, seed + 1)
    exchangeable = bool((fitted != train.positive).any()) and bool((scored != test.positive).any())
    if not exchangeable or math.isnan(observed):
        return PermutationNull(mean=math.nan, quantile_95=math.nan, p=math.nan, n=n)
    if refit is None:
        scores = refitted_scores(train.values, test.values, fitted.double(), (~fitted).double())
    else:
        scores = snap(refit(fitted), TIE_RESOLUTION * largest_norm(train.values) * largest_norm(test.values))
    areas = weighted_auroc(scores, scored.double(), (~scored).double())
    # The tolerance keeps an equal AUROC, summed in another order, from counting as smaller.
    as_good = int((areas >= observed - 1e-9).sum())
    return PermutationNull(
        mean=float(areas.mean()),
        quantile_95=float(areas.quantile(0.95)),
        p=(1 + as_good) / (1 + n),
        n=n,
    )


def random_null(direction: Direction, test: LabelledVectors, n: int, seed: int) -> RandomNull:
    """Scores `n` random directions with the direction's norm on the same test prompts."""
    draws = random_like(direction, n, seed)
    scores = torch.stack([project(test.values.double(), draw) for draw in draws])
    areas = auroc(snap(scores, TIE_RESOLUTION * largest_norm(test.values)), test.positive)
    folded = torch.maximum(areas, 1 - areas)
    return RandomNull(mean=float(folded.mean()), maximum=float(folded.max()), n=n)


def refitted_scores(
    train: Float[Tensor, "train d_model"],
    test: Float[Tensor, "test d_model"],
    for_positive: Float[Tensor, "draw train"],
    for_negative: Float[Tensor, "draw train"],
) -> Float[Tensor, "draw test"]:
    """Test scores of the mean difference that each draw of training weights would give (float64).

    Goes through the products of training with test vectors, so no refitted direction is ever formed:
    at 1000 draws and d_model 576 five times less work.
    """
    products = train.double() @ test.double().T
    up = for_positive @ products / for_positive.sum(dim=1, keepdim=True)
    down = for_negative @ products / for_negative.sum(dim=1, keepdim=True)
    return snap(up - down, TIE_RESOLUTION * largest_norm(train) * largest_norm(test))


def largest_norm(values: Float[Tensor, "prompt d_model"]) -> float:
    """Length of the longest vector; 0 where there is none."""
    return float(values.double().norm(dim=1).max()) if len(values) else 0.0


def shuffled_like(
    acts: Activations, positive: str, negative: str, level: int, position: str, n: int, seed: int
) -> tuple[Direction, ...]:
    """`n` mean differences fitted to shuffled labels: the null of "this direction comes from these labels".

    They lie where activations vary, which random directions mostly don't. Their lengths are their own: shuffled
    labels leave some of a strong difference in the direction, and making it as long as the real one would bring
    all of that back. Labels are shuffled as in `permuted_labels`, within families where these hold both classes.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> null = ml.shuffled_like(acts, "harmful", "harmless", level=2, position="last", n=10, seed=0)
    >>> len(null)
    10
    """
    real = mean_difference(acts, positive, negative, level, position)
    rows = (members(acts, positive) | members(acts, negative)).nonzero()[:, 0]
    cell = one_cell(acts.select(rows), level, position)
    labels = permuted_labels(members(cell, positive), cell.families, n, seed)
    vectors = weighted_differences(cell, labels.double(), (~labels).double())[:, 0, 0]
    return tuple(replace(real, vector=v.to(real.vector.dtype), method="shuffled labels") for v in vectors)


MIN_RELIABLE = 0.1
"""A direction less reliable than this is mostly noise, and dividing by its reliability gives any number."""


@one_thread()
def split_half(
    acts: Activations, positive: str, negative: str, n_splits: int, seed: int, method: str = MEAN_DIFFERENCE
) -> Float[Tensor, "level position"]:
    """Reliability of the direction of all prompts in every cell: 0 is noise, 1 is noise-free.

    Families are halved `n_splits` times; r is the mean cosine between the halves' directions, and
    2r/(1+r) the reliability of the full sample (Spearman-Brown). For isotropic noise it is
    a^2/(a^2 + 2 d sigma^2/n) with mean separation a and n prompts a class. 0 where r is negative;
    NaN where a half has no direction (identical vectors, or a class with one family).

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> reliability = ml.split_half(acts, "harmful", "harmless", n_splits=10, seed=0)
    >>> reliability.shape  # level, position
    torch.Size([4, 2])
    """
    first = family_halves(acts.families, n_splits, seed, acts.labels).double()
    inside, outside = members(acts, positive), members(acts, negative)
    cosines = torch.empty(n_splits, *acts.values.shape[1:3], dtype=torch.float64)
    if method == MEAN_DIFFERENCE:
        for row, column, values in acts.cells():
            one, other = (weighted_difference(values, half * inside, half * outside) for half in (first, 1 - first))
            cosines[:, row, column] = cosine(one, other)
    else:
        for k, half in enumerate(first.bool()):
            cosines[k] = cosine(*(_fitted(acts, side, positive, negative, method) for side in (half, ~half)))
    halves = cosines.nanmean(dim=0).clamp(min=0.0)
    return 2 * halves / (1 + halves)


def _fitted(
    acts: Activations, half: Bool[Tensor, " prompt"], positive: str, negative: str, method: str
) -> Float[Tensor, "level position d_model"]:
    """The directions of one half; NaN where it has none."""
    part = acts.select(half.nonzero()[:, 0])
    if not {positive, negative} <= set(part.labels):
        return torch.full(acts.values.shape[1:], torch.nan)
    return grid_by(part, positive, negative, method).vectors


def corrected_cosine(
    cosines: Float[Tensor, "*cell"],
    reliability_a: Float[Tensor, "*cell"],
    reliability_b: Float[Tensor, "*cell"],
) -> Float[Tensor, "*cell"]:
    """What the cosines would be without sampling noise: cos / sqrt(rel_a rel_b).

    Valid only where the two directions come from different prompts: shared prompts share noise, which
    inflates the cosine. It can pass 1 by chance and is not clipped. NaN where a reliability is below MIN_RELIABLE.

    >>> import torch
    >>> ml.corrected_cosine(torch.tensor(0.4), torch.tensor(0.8), torch.tensor(0.8))
    tensor(0.5000)
    """
    sound = (reliability_a >= MIN_RELIABLE) & (reliability_b >= MIN_RELIABLE)
    return torch.where(sound, cosines / (reliability_a * reliability_b).sqrt(), torch.nan)
