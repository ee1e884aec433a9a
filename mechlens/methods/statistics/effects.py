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
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.directions.direction import cosine
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import family_codes, family_halves, one_thread

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
    curves = [_at_level(first, second, k, families, seed) for k in range(len(levels))]
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


def _at_level(first: Effect, second: Effect, level: int, families: Sequence[str], seed: int) -> _Cell:
    n = sum(
        a in first.coefficients or b in second.coefficients for a, b in zip(first.labels, second.labels, strict=True)
    )
    codes = family_codes(families)[0]
    sums = torch.zeros(6, 1 + int(codes.max()) + 1, dtype=torch.float64)
    parts = (torch.split(effect.values[:, level], WIDTH, dim=1) for effect in (first, second))
    for own, other in zip(*parts, strict=True):
        a, b = _class_sums(first, own, codes), _class_sums(second, other, codes)
        ways = _directions(a), _directions(b)
        dots = [(x * y).sum(dim=1) for x, y in ((ways[0], ways[1]), (ways[0], ways[0]), (ways[1], ways[1]))]
        sums += torch.stack([*dots, _product(a, b), _product(a, a), _product(b, b)])
    measured = _jackknife(_ratio(*sums[:3]), n)
    labels = [f"{a}/{b}" for a, b in zip(first.labels, second.labels, strict=True)]
    halves = family_halves(families, HALVINGS, seed, labels).double()
    reliable = [
        float(cosine(effect.directions(halves, level), effect.directions(1 - halves, level)).nanmean())
        for effect in (first, second)
    ]
    corrected = Estimate.missing(n)
    if min(reliable) > MIN_RELIABILITY:
        # A product that is not above 0 gives NaN: without that family the direction is noise.
        corrected = _jackknife(_ratio(*sums[3:]), n)
    return _Cell(measured, corrected, *reliable)


def _ratio(product: Tensor, own: Tensor, other: Tensor) -> Float[Tensor, " one_and_family"]:
    return product / (own.sqrt() * other.sqrt())


def _jackknife(values: Float[Tensor, " one_and_family"], n: int) -> Estimate:
    """The first value with its interval; the others leave out one family each."""
    if not bool(torch.isfinite(values).all()):
        return Estimate.missing(n)
    left_out = values[1:]
    spread = (left_out - left_out.mean()).square().sum() * (len(left_out) - 1) / len(left_out)
    value, margin = float(values[0]), 1.96 * float(spread.sqrt())
    return Estimate(value, value - margin, value + margin, n)


class _ClassSums(NamedTuple):
    """One class's part of an effect: its prompts' vectors and their number, summed by family."""

    coefficient: float
    sums: Float[Tensor, "family d"]
    counts: Float[Tensor, "family 1"]


def _class_sums(effect: Effect, values: Float[Tensor, "prompt d"], codes: Tensor) -> list[_ClassSums]:
    values, n_families = values.double(), int(codes.max()) + 1
    found = []
    for label, coefficient in effect.coefficients.items():
        rows = [i for i, own in enumerate(effect.labels) if own == label]
        sums = torch.zeros(n_families, values.shape[1], dtype=torch.float64).index_add_(0, codes[rows], values[rows])
        counts = torch.bincount(codes[rows], minlength=n_families).double()
        found.append(_ClassSums(coefficient, sums, counts[:, None]))
    return found


def _directions(parts: Sequence[_ClassSums]) -> Float[Tensor, "one_and_family d"]:
    """The direction from all families, and without each one; NaN where a class is then empty."""
    total = torch.zeros(1, dtype=torch.float64)
    for coefficient, sums, counts in parts:
        taken, many = torch.nn.functional.pad(sums, (0, 0, 1, 0)), torch.nn.functional.pad(counts, (0, 0, 1, 0))
        total = total + coefficient * (sums.sum(dim=0) - taken) / (counts.sum(dim=0) - many)
    return total


def _product(first: Sequence[_ClassSums], second: Sequence[_ClassSums]) -> Float[Tensor, " one_and_family"]:
    """Inner product of two effects over pairs of prompts from distinct families: of all, and without each family."""
    parts = [
        a.coefficient * b.coefficient * _distinct(a.sums, b.sums) / _distinct(a.counts, b.counts)
        for a in first
        for b in second
    ]
    return torch.stack(parts).sum(dim=0)


def _distinct(first: Float[Tensor, "family d"], second: Float[Tensor, "family d"]) -> Float[Tensor, " one_and_family"]:
    """Sum of the products of every two distinct families: of all families, and without each one."""
    own = (first * second).sum(dim=1)
    whole = first.sum(dim=0) @ second.sum(dim=0) - own.sum()
    of_each = first @ second.sum(dim=0) + second @ first.sum(dim=0) - 2 * own
    return torch.cat([whole[None], whole - of_each])
