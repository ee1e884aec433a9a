"""The way that a vector takes over training: how straight it is at each checkpoint, and where its course changes.

Turner et al. 2025 (Model organisms for emergent misalignment) look for the step at which a rank-one adapter turns. All
that is needed are the inner products of the checkpoints' vectors, so that the same serves directions and whole
adapters, whose changes of the weights are never built.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from mechlens.errors import UserError

FEWEST = 9
"""Checkpoints, the base among them, below which a turn halfway has a p above .05 by the number of orders alone."""


def local_cosines(products: Float64[Tensor, "step step"], lag: int) -> Float64[Tensor, " step"]:
    """At each checkpoint the cosine between the ways back and forth: cos(v[t-k] - v[t], v[t+k] - v[t]) for a lag of k.

    -1 on a straight way, 0 at a right angle, and about 0.5 where a vector only trembles about one place. NaN at the
    first and last `lag` checkpoints, and where nothing moved. `products` are the checkpoints' inner products.

    >>> import torch
    >>> path = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [2.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    >>> [round(x, 2) for x in ml.local_cosines(path @ path.T, 1).tolist()]
    [nan, -1.0, 0.0, -1.0, nan]
    """
    if lag < 1:
        raise UserError(f"the lag is {lag} checkpoints; give 1 or more")
    n = len(products)
    found = torch.full((n,), torch.nan, dtype=torch.float64)
    for t in range(lag, n - lag):
        back, forth = _way(t, t - lag, n), _way(t, t + lag, n)
        lengths = math.sqrt(max(float(back @ products @ back), 0.0) * max(float(forth @ products @ forth), 0.0))
        if lengths > 1e-12 * float(products.diagonal().max()):
            found[t] = float(back @ products @ forth) / lengths
    return found


def _way(start: int, end: int, n: int) -> Float64[Tensor, " step"]:
    """From one checkpoint to another, as weights of the checkpoints."""
    weights = torch.zeros(n, dtype=torch.float64)
    weights[end], weights[start] = 1.0, -1.0
    return weights


@dataclass(frozen=True)
class TurningPoint:
    """The checkpoint at which the way to it and the way from it differ most.

    >>> import torch
    >>> corner = torch.cat([torch.eye(2)[:1].repeat(5, 1), torch.eye(2)[1:].repeat(5, 1)]).cumsum(dim=0).double()
    >>> found = ml.turning_point(list(range(10)), corner @ corner.T)
    >>> found.step, round(found.cosine, 2), found.p < 0.05
    (4, 0.0, True)
    """

    step: int
    cosine: float
    """Between the mean courses before and after: 1 is straight on."""
    p: float
    """Share of permuted orders of the steps that part them as well, the real one among them; NaN for under 9
    checkpoints."""


def turning_point(
    steps: Sequence[int], products: Float64[Tensor, "step step"], *, permutations: int = 999, seed: int = 0
) -> TurningPoint | None:
    """Two segments of constant course, cut where they differ most; the null is by permuted orders.

    A course is a step's direction, each with length 1, so that a learning rate that falls is no turn. A constant drift
    has the same course at any time, whatever its noise. `products` are the checkpoints' inner products; None where
    there are fewer than four, or one of the steps moved nothing.

    >>> import torch
    >>> straight = torch.arange(9.0).double()[:, None]
    >>> ml.turning_point(list(range(9)), straight @ straight.T).p
    1.0
    """
    n = len(steps) - 1
    if n < 3:
        return None
    ways = torch.stack([_way(t, t + 1, n + 1) for t in range(n)])
    courses = ways @ products @ ways.T
    lengths = courses.diagonal().clamp(min=0).sqrt()
    if not float(lengths.min()) > 1e-9 * float(products.diagonal().max().sqrt()):
        return None
    courses = courses / (lengths[:, None] * lengths)
    centring = torch.eye(n, dtype=torch.float64) - 1 / n
    centred = centring @ courses @ centring
    explained = _parted(centred)
    best = int(explained.argmax())
    p = math.nan
    if n + 1 >= FEWEST:
        generator = torch.Generator().manual_seed(seed)
        orders = torch.rand(permutations, n, generator=generator).argsort(dim=1)
        chance = torch.stack([_parted(centred[order][:, order]).max() for order in orders])
        p = (1 + int((chance >= explained[best] - 1e-9).sum())) / (1 + permutations)
    first = (torch.arange(n) <= best).double()
    sides = first / first.sum(), (1 - first) / (1 - first).sum()
    size = math.sqrt(float(sides[0] @ courses @ sides[0]) * float(sides[1] @ courses @ sides[1]))
    return TurningPoint(steps[best + 1], float(sides[0] @ courses @ sides[1]) / size if size > 0 else math.nan, p)


def _parted(centred: Float64[Tensor, "way way"]) -> Float64[Tensor, " cut"]:
    """Squares that each cut in two takes off the sum about the mean."""
    n = len(centred)
    sizes = torch.arange(1, n, dtype=torch.float64)
    sums = centred.cumsum(dim=0).cumsum(dim=1).diagonal()[:-1]
    return sums * n / (sizes * (n - sizes))
