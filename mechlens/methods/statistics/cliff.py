"""The cliff of a trace: how far a score falls between the plateau of the thought and the answer's start.

Yin et al. 2025 (Refusal Cliff) take the plateau's maximum, or in their code the final score alone. Here it is the
median of the thought's middle half, which a single token can't move.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.statistics.change_point import chance_among_neighbours, change_point

FEWEST = 8
"""Tokens of a thought below which it has no middle worth the name."""


@dataclass(frozen=True)
class Cliff:
    """Of one trace, along one line; NaN where its thought is too short to have a plateau.

    >>> scores = [0.1, 0.9, 0.9, 0.8, 0.9, 1.0, 0.9, 0.9, 0.9, 0.1, 0.1, 0.1]
    >>> found = ml.cliff(range(-11, 1), scores, range(0, 10))
    >>> round(found.drop, 3), found.begins
    (0.8, -2)
    """

    plateau: float
    """Median over the middle half of the thought."""
    final: float
    """At the last token before the answer."""
    begins: int
    """The place of the first token after the best cut in two."""
    jump: float
    """Mean after that cut minus mean before."""
    p: float
    """How often noise whose neighbours are as alike is cut as well; NaN where the cliff is."""

    @property
    def drop(self) -> float:
        """Plateau minus final: above 0 where the score falls."""
        return self.plateau - self.final


def cliff(
    places: Sequence[int], scores: Sequence[float], thinking: Sequence[int], *, series: int = 999, seed: int = 0
) -> Cliff:
    """The cliff in the scores from a thought's first token to the last one before the answer.

    `thinking` counts, within these, the thought's own tokens; what follows them are its closing mark and blank lines.
    UserError for scores that are missing in between.

    >>> ml.cliff(range(-3, 1), [0.9, 0.9, 0.9, 0.1], range(0, 3)).drop
    nan
    """
    values = torch.tensor(list(scores), dtype=torch.float64)
    if len(places) != len(values) or not len(values) or not bool(values.isfinite().all()):
        raise UserError(
            f"there are {len(values)} scores at {len(places)} places; a cliff needs one at each, all finite"
        )
    high, final = float(plateau(values[torch.as_tensor(list(thinking), dtype=torch.long)])), float(values[-1])
    if math.isnan(high):
        return Cliff(high, final, places[-1], math.nan, math.nan)
    found = change_point(places, values.tolist(), permutations=1)
    p = chance_among_neighbours(values.tolist(), series=series, seed=seed)
    return Cliff(high, final, found.before, found.jump, p)


def plateau(thinking: Float64[Tensor, " token"]) -> Float64[Tensor, ""]:
    """The median over the middle half of a thought's scores; NaN for fewer than `FEWEST` tokens."""
    n = len(thinking)
    if n < FEWEST:
        return torch.tensor(math.nan, dtype=torch.float64)
    return thinking[n // 4 : n - n // 4].quantile(0.5)
