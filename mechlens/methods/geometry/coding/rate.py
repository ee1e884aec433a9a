"""Coding rate reduction (MCR²; Yu et al. 2020): how much more room vectors take together than class by class."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.geometry.collapse.class_means import class_numbers
from mechlens.methods.geometry.permuted import Measured, beside_chance, permutations

DISTORTION = 0.01
"""The squared error up to which vectors of length 1 are coded: `eps` of the authors' code, ε² of the paper."""


@dataclass(frozen=True)
class RateReduction:
    """Coding rates in nats, and their difference beside permuted labels; see `rate_reduction`.

    >>> import torch
    >>> axes = torch.eye(4).repeat(5, 1)
    >>> found = ml.rate_reduction(axes, ["ab", "ab", "cd", "cd"] * 5, n=19, seed=0)
    >>> found.reduction.value > found.reduction.highest, round(found.whole - found.parts - found.reduction.value, 9)
    (True, 0.0)
    """

    whole: float
    """Of all vectors together."""
    parts: float
    """Of the classes, each by itself, by their shares."""
    reduction: Measured
    """The first minus the second: large where classes fill subspaces of their own, at right angles to each other."""


def rate_reduction(
    values: Float[Tensor, "prompt d_model"],
    labels: Sequence[str],
    *,
    n: int,
    seed: int,
    families: Sequence[str] | None = None,
    distortion: float = DISTORTION,
) -> RateReduction:
    """The rates of vectors, taken to length 1, in all and by their labels; beside `n` permutations of these.

    Centre vectors first where they share a large mean. Classes with the same second moments about the origin have no
    reduction, however far apart their labels are: it is about subspaces, not about means.

    >>> import torch
    >>> axes = torch.eye(4).repeat(5, 1)
    >>> found = ml.rate_reduction(axes, ["ab", "ab", "cd", "cd"] * 5, n=19, seed=0)
    >>> found.reduction.value > found.reduction.highest, round(found.whole - found.parts - found.reduction.value, 9)
    (True, 0.0)
    """
    if distortion <= 0:
        raise UserError(f"a distortion of {distortion} was asked for; give a number above 0")
    of, units = class_numbers(values, labels), unit_rows(values)
    whole = coding_rate(units, distortion)

    def parts(order: Tensor) -> float:
        own = of[order]
        shares = [
            (own == c).double().mean() * coding_rate(units[own == c], distortion) for c in range(int(of.max()) + 1)
        ]
        return float(torch.stack(shares).sum())

    orders = permutations(len(units), n, seed, families)
    own = parts(torch.arange(len(units)))
    reduction = beside_chance(float(whole) - own, lambda order: float(whole) - parts(order), orders)
    return RateReduction(float(whole), own, reduction)


def coding_rate(units: Float[Tensor, "prompt d_model"], distortion: float) -> Float[Tensor, ""]:
    """log det(I + d / (n distortion) ZᵀZ) / 2, by the smaller of the two Gram matrices, which have one determinant."""
    n, d = units.shape
    gram = units @ units.T if n < d else units.T @ units
    eye = torch.eye(len(gram), dtype=units.dtype)
    rate: Tensor = torch.linalg.slogdet(eye + d / (n * distortion) * gram).logabsdet / 2
    return rate


def unit_rows(values: Float[Tensor, "prompt d_model"]) -> Float[Tensor, "prompt d_model"]:
    """The vectors at length 1 (float64); UserError for one of length 0."""
    exact = values.detach().cpu().double()
    norms: Tensor = exact.norm(dim=1, keepdim=True)
    if float(norms.min()) == 0:
        raise UserError(f"vector {int(norms.argmin())} is all zero, so it has no direction; leave it out")
    return exact / norms
