"""Which unit of one model is which of another: one-to-one and best-of-all matching (Li et al. 2015)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mechlens.methods.geometry.matching.correlation import unit_correlations
from mechlens.methods.geometry.permuted import Measured, beside_chance, permutations


@dataclass(frozen=True, eq=False)
class UnitMatch:
    """Units matched by how they go together over prompts; see `match_units`.

    >>> import torch
    >>> values = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    >>> found = ml.match_units(values, values[:, [2, 0, 1, 3]], n=19, seed=0)
    >>> found.partner.tolist(), found.identity_rate, round(found.gap, 6), found.matched.p
    ([1, 2, 0, 3], 0.25, 0.0, 0.05)
    """

    similarities: Float[Tensor, "first second"] = field(repr=False)
    partner: Int[Tensor, " first"] = field(repr=False)
    """The other model's unit of every unit, each taken once, so that the sum is largest; -1 where none was left."""
    best: Int[Tensor, " first"] = field(repr=False)
    """The most similar unit, however often it is taken (semi-matching)."""
    matched: Measured
    """Mean similarity of partners, and what it is where prompts are permuted."""
    semi_matched: float
    """Mean similarity of the most similar units, over those that have a partner."""

    @property
    def gap(self) -> float:
        """How much better the most similar unit is than the partner: large where several units share what one has."""
        return self.semi_matched - self.matched.value

    @property
    def identity_rate(self) -> float:
        """Share of units whose partner has their own number: 1 within a run that moves little, 1 / units by chance."""
        return float((self.partner == torch.arange(len(self.partner))).double().mean())


def match_units(
    first: Float[Tensor, "prompt first *size"],
    second: Float[Tensor, "other second *own_size"],
    *,
    n: int,
    seed: int,
    families: Sequence[str] | None = None,
) -> UnitMatch:
    """Matches units (neurons, heads, scores along directions) of two models or checkpoints; see `unit_correlations`.

    One-to-one by the Hungarian method, beside its null: `n` permutations of the second model's prompts, each matched
    anew. With many units and few prompts partners found by chance are similar too.

    >>> import torch
    >>> values = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    >>> found = ml.match_units(values, values[:, [2, 0, 1, 3]], n=19, seed=0)
    >>> found.partner.tolist(), found.identity_rate, round(found.gap, 6), found.matched.p
    ([1, 2, 0, 3], 0.25, 0.0, 0.05)
    """
    similarities = unit_correlations(first, second)
    rows, columns = assigned(similarities)
    partner = torch.full((similarities.shape[0],), -1)
    partner[rows] = columns
    orders = permutations(len(first), n, seed, families)

    def by_chance(order: Tensor) -> float:
        drawn = unit_correlations(first, second[order])
        return float(drawn[assigned(drawn)].mean())

    matched = beside_chance(float(similarities[rows, columns].mean()), by_chance, orders)
    highest = similarities.max(dim=1)
    return UnitMatch(similarities, partner, highest.indices, matched, float(highest.values[rows].mean()))


def assigned(similarities: Float[Tensor, "first second"]) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
    """The pairs of a one-to-one matching whose similarities have the largest sum."""
    rows, columns = linear_sum_assignment(similarities.numpy(), maximize=True)
    return torch.from_numpy(rows), torch.from_numpy(columns)
