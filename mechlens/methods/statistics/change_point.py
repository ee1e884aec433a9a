"""Where a series over training steps jumps: the best of all cuts in two, and how often chance does as well.

Anything that grows has a best cut, and a small p by permuted orders. So a jump is said only where a cut is also better
than a smooth climb, by more than shuffled errors about that climb make it. How often that errs is measured by
`scripts/error_rates_behaviours.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from mechlens.errors import UserError

FEWEST = 6
"""With fewer points even the best order of all has a p of .05 or more by chance."""
LEVEL = 0.05
"""What both p have to be at or below for a jump to be said."""
DEGREE = 2
"""Of the polynomials that count as smooth: a climb that slows down, or gathers way, is no jump."""


@dataclass(frozen=True)
class ChangePoint:
    """The cut that explains most.

    >>> found = ml.change_point([0, 1, 2, 4, 8, 16, 32, 64], [0.1, 0.0, 0.1, 0.0, 2.1, 2.0, 2.2, 2.1])
    >>> found.after, found.before
    (4, 8)
    """

    after: int
    """The last step of the first part."""
    before: int
    """The first step of the second one."""
    jump: float
    """Mean of the second part minus that of the first."""
    p: float
    """Share of permuted orders whose best cut explains as much, the real one among them; NaN for under 6 points."""
    p_climb: float
    """Share of shuffled errors about a smooth climb, over the steps or over their order, with which a cut does as much
    better than that climb, the larger of the two; NaN for under 6 points."""

    @property
    def said(self) -> bool:
        """Whether it is a jump: neither chance nor a smooth climb is likely to look so."""
        return self.p <= LEVEL and self.p_climb <= LEVEL


def change_point(
    steps: Sequence[int], values: Sequence[float], *, permutations: int = 999, seed: int = 0
) -> ChangePoint:
    """Two segments of constant mean, cut where the likelihood ratio is largest; its null is by permuted orders.

    Steps need not be evenly spaced: only their order counts. UserError for fewer than three points or values that
    aren't finite.

    >>> ml.change_point([1, 2, 3], [0.0, 0.0, 1.0]).before
    3
    """
    series = torch.tensor(values, dtype=torch.float64)
    if len(steps) != len(values) or len(values) < 3 or not bool(series.isfinite().all()):
        raise UserError(
            f"there are {len(values)} values at {len(steps)} steps; a change point needs at least three, all finite"
        )
    explained = _explained(series[None])[0]
    best = int(explained.argmax())
    total = float((series - series.mean()).square().sum())
    p = p_climb = math.nan
    if len(values) >= FEWEST:
        generator = torch.Generator().manual_seed(seed)
        orders = torch.rand(permutations, len(values), generator=generator).argsort(dim=1)
        chance = _explained(series[orders]).amax(dim=1)
        p = (1 + int((chance >= explained[best] - 1e-12 * max(total, 1e-300)).sum())) / (1 + permutations)
        clocks = torch.arange(len(steps), dtype=torch.float64), torch.tensor(steps, dtype=torch.float64)
        p_climb = max(_p_climb(series, at, orders) for at in clocks)
    first, second = series[: best + 1], series[best + 1 :]
    return ChangePoint(steps[best], steps[best + 1], float(second.mean() - first.mean()), p, p_climb)


def chance_among_neighbours(values: Sequence[float], *, series: int, seed: int) -> float:
    """How often the best cut explains as much of a series of noise in which each point resembles the one before.

    Permuted orders are no null for a text's tokens, which aren't independent of each other. The likeness is the
    lag-one autocorrelation (AR(1)) of the series as if nothing were cut: what is left beside the best cut looks less
    alike than it is, and noise then passed up to 44% of the time.
    """
    points = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    noise = _alike(_autocorrelation(points), series, len(points), generator)
    drawn = torch.cat([points[None], noise])
    squares = (drawn - drawn.mean(dim=1, keepdim=True)).square().sum(dim=1).clamp_min(1e-300)
    shares = _explained(drawn).amax(dim=1) / squares
    return (1 + int((shares[1:] >= shares[0] - 1e-12).sum())) / len(shares)


def _autocorrelation(points: Float64[Tensor, " point"]) -> float:
    """Lag-one autocorrelation about the mean, corrected for that being estimated (Kendall 1954)."""
    rest = points - points.mean()
    found = float((rest[1:] * rest[:-1]).sum() / rest.square().sum().clamp_min(1e-300))
    return min(max(found + (1 + 4 * found) / len(points), 0.0), 0.99)


def _alike(correlation: float, n: int, length: int, generator: torch.Generator) -> Float64[Tensor, "series point"]:
    """Stationary Gaussian series in which each point has this correlation with the one before."""
    noise = torch.randn(length, n, generator=generator, dtype=torch.float64)
    noise[1:] *= math.sqrt(1 - correlation**2)
    for i in range(1, length):
        noise[i] += correlation * noise[i - 1]
    return noise.T


def _explained(series: Float64[Tensor, "order point"]) -> Float64[Tensor, "order cut"]:
    """Squares that each cut takes off the sum about the mean; the cut k leaves k + 1 points in the first part."""
    n = series.shape[1]
    sizes = torch.arange(1, n, dtype=torch.float64)
    centred = series - series.mean(dim=1, keepdim=True)
    sums = centred.cumsum(dim=1)[:, :-1]
    return sums.square() * n / (sizes * (n - sizes))


def _p_climb(series: Float64[Tensor, " point"], at: Float64[Tensor, " point"], orders: Tensor) -> float:
    """Of the ratio of what a smooth climb leaves to what the best cut leaves, with errors about the climb shuffled."""
    powers = ((at - at.mean()) / at.std())[:, None] ** torch.arange(DEGREE + 1, dtype=torch.float64)
    basis = torch.linalg.qr(powers).Q
    climb = basis @ (basis.T @ series)
    # A fit takes up some of the errors.
    errors = (series - climb) * math.sqrt(len(series) / (len(series) - DEGREE - 1))
    drawn = torch.cat([series[None], climb + errors[orders]])
    totals = (drawn - drawn.mean(dim=1, keepdim=True)).square().sum(dim=1)
    least = (1e-12 * totals).clamp(min=1e-300)
    rest = (drawn - drawn @ basis @ basis.T).square().sum(dim=1)
    left = totals - _explained(drawn).amax(dim=1)
    better = (torch.maximum(rest, least) / torch.maximum(left, least)).log()
    return (1 + int((better[1:] >= better[0] - 1e-9).sum())) / len(better)
