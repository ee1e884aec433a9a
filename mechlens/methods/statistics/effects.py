"""Effects: directions as weighted sums of class means, and the cosine between two of them without noise.

The contrast of two classes, and the balanced main effects and the interaction of a 2x2 design, are all one
thing: a coefficient for each class. Two estimates of one direction from few prompts can be nearly orthogonal,
so a cosine is shown beside the reliability of both directions and corrected for it.

Intervals are jackknives over families. A bootstrap would not do: prompts drawn twice make every resampled
direction noisier than the real one, and a measured cosine then lies outside its own interval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.methods.directions.direction import cosine
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import family_codes, family_halves, jackknife_variance, one_thread

HARM = {"refused_harmful": 0.5, "accepted_harmful": 0.5, "refused_harmless": -0.5, "accepted_harmless": -0.5}
"""Main effect of harm: half of [(RH - RL) + (AH - AL)]."""
REFUSAL = {"refused_harmful": 0.5, "accepted_harmful": -0.5, "refused_harmless": 0.5, "accepted_harmless": -0.5}
"""Main effect of refusal: half of [(RH - AH) + (RL - AL)]."""
INTERACTION = {"refused_harmful": 0.5, "accepted_harmful": -0.5, "refused_harmless": -0.5, "accepted_harmless": 0.5}
"""Half of [(RH - RL) - (AH - AL)]: how far one factor's effect depends on the other."""

MIN_RELIABILITY = 0.05
"""Below this split-half cosine a direction is mostly noise and no correction is possible."""
HALVINGS = 40
"""Random halvings of the families behind a split-half cosine."""
WIDTH = 1024
"""Dimensions that are summed over at a time: a jackknife has a direction for each family."""


@dataclass(frozen=True)
class Effect:
    """A direction at every level: coefficients of class means over the vectors of one position."""

    values: Float[Tensor, "prompt level d_model"]
    labels: tuple[str, ...]
    """Class of each prompt; prompts of classes without a coefficient are left out."""
    coefficients: Mapping[str, float]

    def directions(self, weights: Float[Tensor, "draw prompt"], level: int) -> Float[Tensor, "draw d_model"]:
        """The direction at one level for each draw of prompt weights (float64); NaN where a class is empty."""
        total = torch.zeros(len(weights), self.values.shape[-1], dtype=torch.float64)
        values = self.values[:, level].double()
        for label, coefficient in self.coefficients.items():
            inside = torch.tensor([own == label for own in self.labels])
            drawn = weights[:, inside].double()
            total += coefficient * (drawn @ values[inside]) / drawn.sum(dim=1, keepdim=True)
        return total

    def norms(self) -> Float[Tensor, " level"]:
        """Length of the direction at every level."""
        everyone = torch.ones(1, len(self.labels))
        return torch.stack([self.directions(everyone, k)[0].norm() for k in range(self.values.shape[1])])


@dataclass(frozen=True)
class CosineCurve:
    """Cosine between two effects at every level: as measured, and corrected for noise."""

    levels: tuple[int, ...]
    measured: tuple[Estimate, ...]
    corrected: tuple[Estimate, ...]
    """From products of distinct families only, so that neither a direction's own noise nor noise that the two
    share counts. It can pass 1 by chance and is not clipped. Missing where a direction is mostly noise."""
    reliability_first: tuple[float, ...]
    """Mean split-half cosine of the first direction."""
    reliability_second: tuple[float, ...]


@one_thread()
def cosine_curve(
    first: Effect, second: Effect, families: Sequence[str], levels: tuple[int, ...], *, seed: int
) -> CosineCurve:
    """Cosine between two effects over the same prompts, with intervals by family (both effects refitted).

    The corrected cosine is <a, b> / sqrt(<a, a> <b, b>), each product the mean over pairs of prompts from distinct
    families (a U-statistic), which is unbiased for the product of the true directions. Intervals: jackknife that
    leaves out one family at a time, value +- 1.96 standard errors. `seed` places the halves of the reliabilities.
    """
    labels = [f"{a}/{b}" for a, b in zip(first.labels, second.labels, strict=True)]
    halves = family_halves(families, HALVINGS, seed, labels).double()
    codes, n_families = family_codes(families)
    classes = tuple(_classes(effect, codes, n_families, torch.cat([halves, 1 - halves])) for effect in (first, second))
    n = sum(
        a in first.coefficients or b in second.coefficients for a, b in zip(first.labels, second.labels, strict=True)
    )
    both = list(zip((first, second), classes, strict=True))
    curves = [
        _at_level(classes, [effect.values[:, k][own.members].double() for effect, own in both], n)
        for k in range(len(levels))
    ]
    return CosineCurve(
        levels=levels,
        measured=tuple(curve.measured for curve in curves),
        corrected=tuple(curve.corrected for curve in curves),
        reliability_first=tuple(curve.reliability_first for curve in curves),
        reliability_second=tuple(curve.reliability_second for curve in curves),
    )


class _Cell(NamedTuple):
    measured: Estimate
    corrected: Estimate
    reliability_first: float
    reliability_second: float


class _Classes(NamedTuple):
    """One effect's classes: all that is the same at every level."""

    coefficients: tuple[float, ...]
    sizes: tuple[int, ...]
    members: Int[Tensor, " member"]
    """The prompts that have a class, class by class."""
    place: Int[Tensor, " member"]
    """Class and family of each, as one number."""
    counts: Float[Tensor, "own_class family"]
    halves: Float[Tensor, "draw member"]
    """Weights of the prompts of each half."""


def _classes(
    effect: Effect, codes: Int[Tensor, " prompt"], n_families: int, halves: Float[Tensor, "draw prompt"]
) -> _Classes:
    rows = [[i for i, label in enumerate(effect.labels) if label == own] for own in effect.coefficients]
    sizes = tuple(map(len, rows))
    members = torch.tensor([i for own in rows for i in own], dtype=torch.long)
    number = torch.arange(len(rows)).repeat_interleave(torch.tensor(sizes))
    place = number * n_families + codes[members]
    counts = torch.bincount(place, minlength=len(rows) * n_families).reshape(len(rows), n_families)
    return _Classes(tuple(effect.coefficients.values()), sizes, members, place, counts.double(), halves[:, members])


def _at_level(classes: tuple[_Classes, ...], values: Sequence[Float[Tensor, "_ d_model"]], n: int) -> _Cell:
    """Both effects' cosine by the vectors of one level."""
    sums = torch.zeros(6, 1 + classes[0].counts.shape[1], dtype=torch.float64)
    for parts in zip(*(torch.split(value, WIDTH, dim=1) for value in values), strict=True):
        own = [_sums(effect, part) for effect, part in zip(classes, parts, strict=True)]
        a, b = (_left_out(effect, part) for effect, part in zip(classes, own, strict=True))
        dots = [(x * y).sum(dim=1) for x, y in ((a, b), (a, a), (b, b))]
        sums += torch.stack([*dots, *(_product(classes, own, i, j) for i, j in ((0, 1), (0, 0), (1, 1)))])
    halves = [_of_halves(effect, value).chunk(2) for effect, value in zip(classes, values, strict=True)]
    reliable = [float(cosine(*pair).nanmean()) for pair in halves]
    corrected = Estimate.missing(n)
    if min(reliable) > MIN_RELIABILITY:
        # A product that is not above 0 gives NaN: without that family the direction is noise.
        corrected = jackknife(_ratio(*sums[3:]), n)
    return _Cell(jackknife(_ratio(*sums[:3]), n), corrected, *reliable)


def _ratio(product: Tensor, own: Tensor, other: Tensor) -> Float[Tensor, " one_and_family"]:
    return product / (own.sqrt() * other.sqrt())


def jackknife(values: Float[Tensor, " one_and_family"], n: int) -> Estimate:
    """The first value with its interval; the others leave out one family each. Missing where one isn't a number."""
    if not bool(torch.isfinite(values).all()):
        return Estimate.missing(n)
    value, margin = float(values[0]), 1.96 * float(jackknife_variance(values[1:]).sqrt())
    return Estimate(value, value - margin, value + margin, n)


def _of_halves(classes: _Classes, values: Float[Tensor, "member d_model"]) -> Float[Tensor, "draw d_model"]:
    """The direction of each half; NaN where it lacks a class."""
    # Summed first and divided last, as in `weighted_differences`.
    sizes = list(classes.sizes)
    pieces = torch.split(classes.halves, sizes, 1), torch.split(values, sizes)
    parts = zip(classes.coefficients, *pieces, strict=True)
    total = torch.zeros(1, dtype=torch.float64)
    for coefficient, weights, own in parts:
        total = total + coefficient * (weights @ own) / weights.sum(dim=1, keepdim=True)
    return total


def _sums(classes: _Classes, values: Float[Tensor, "member d_model"]) -> Float[Tensor, "own_class family d_model"]:
    """The vectors of each class's prompts, summed by family."""
    empty = torch.zeros(classes.counts.numel(), values.shape[1], dtype=torch.float64)
    return empty.index_add_(0, classes.place, values).reshape(*classes.counts.shape, -1)


def _left_out(
    classes: _Classes, sums: Float[Tensor, "own_class family d_model"]
) -> Float[Tensor, "one_and_family d_model"]:
    """The direction from all families, and without each one; NaN where a class is then empty."""
    total = torch.zeros(1, dtype=torch.float64)
    for coefficient, own, counts in zip(classes.coefficients, sums, classes.counts[:, :, None], strict=True):
        taken, many = torch.nn.functional.pad(own, (0, 0, 1, 0)), torch.nn.functional.pad(counts, (0, 0, 1, 0))
        total = total + coefficient * (own.sum(dim=0) - taken) / (counts.sum(dim=0) - many)
    return total


def _product(
    classes: tuple[_Classes, ...], sums: Sequence[Float[Tensor, "_ family d_model"]], i: int, j: int
) -> Float[Tensor, " one_and_family"]:
    """Inner product of two effects over pairs of prompts from distinct families: of all, and without each family."""
    first, second = classes[i], classes[j]
    means = _distinct(sums[i], sums[j]) / _distinct(first.counts[:, :, None], second.counts[:, :, None])
    coefficients = (torch.tensor(own.coefficients, dtype=torch.float64) for own in (first, second))
    return torch.einsum("a,b,abf->f", *coefficients, means)


def _distinct(
    first: Float[Tensor, "a family d"], second: Float[Tensor, "b family d"]
) -> Float[Tensor, "a b one_and_family"]:
    """Sum of the products of every two distinct families, by classes: of all families, and without each one."""
    own = (first.transpose(0, 1) @ second.permute(1, 2, 0)).permute(1, 2, 0)  # a b family
    totals = first.sum(dim=1), second.sum(dim=1)
    whole = totals[0] @ totals[1].T - own.sum(dim=2)
    one, other = first @ totals[1].T, second @ totals[0].T  # a family b, b family a
    of_each = one.transpose(1, 2) + other.permute(2, 0, 1) - 2 * own
    return torch.cat([whole[:, :, None], whole[:, :, None] - of_each], dim=2)
