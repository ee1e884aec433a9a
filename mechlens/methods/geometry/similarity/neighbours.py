"""Whether two representations have the same prompts near each other (mutual nearest neighbours; Huh et al. 2024)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.errors import UserError

NEIGHBOURS = 10
"""Nearest prompts that are compared, as in the paper."""


def mutual_neighbours(
    first: Float[Tensor, "prompt d_first"], second: Float[Tensor, "prompt d_second"], k: int = NEIGHBOURS
) -> float:
    """The mean share of a prompt's k nearest prompts, by cosine about the mean, that are the same in both.

    By chance k / (prompts - 1). It sees only what is near: neither a rotation, nor a scale, nor how far clusters lie
    apart changes it.

    >>> import torch
    >>> values = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    >>> ml.mutual_neighbours(values, 3 * values + 1, k=5)
    1.0
    """
    n = len(first)
    if not 1 <= k < n - 1:
        raise UserError(f"{k} neighbours of {n} prompts were asked for; ask for 1 to {n - 2}")
    inside = torch.zeros(2, n, n, dtype=torch.bool)
    for side, values in zip(inside, (first, second), strict=True):
        side.scatter_(1, _nearest(values, k), True)
    return float(inside.all(dim=0).sum() / (n * k))


def _nearest(values: Float[Tensor, "prompt d_model"], k: int) -> Int[Tensor, "prompt k"]:
    units = torch.nn.functional.normalize(values.double() - values.double().mean(dim=0), dim=1)
    cosines = units @ units.T
    cosines.fill_diagonal_(-2.0)
    return cosines.topk(k, dim=1).indices
