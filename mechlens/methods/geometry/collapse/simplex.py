"""NC2: how near the class means are to the corners of a simplex, which are equally long and equally far apart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.geometry.collapse.class_means import class_means


@dataclass(frozen=True)
class SimplexErrors:
    """NC2 in its published forms, of class means about their mean; see `simplex_errors`.

    >>> import torch
    >>> found = ml.simplex_errors(torch.eye(4).repeat(2, 1), ["a", "b", "c", "d"] * 2)
    >>> max(found.norm_spread, found.coherence, found.etf_error, abs(found.gnc2_excess)) < 1e-12
    True
    """

    norm_spread: float
    """Standard deviation of the lengths over their mean: 0 where all are equal."""
    coherence: float
    """Mean over pairs of |cos + 1/(C - 1)| (Papyan et al. 2020): always 0 for two classes, whose means are opposite."""
    etf_error: float
    """Frobenius distance of the Gram matrix from the simplex's, each of norm 1: 0 for a simplex (Kothapalli 2023)."""
    gnc2: float
    """Mean over pairs of log(1 / distance) of the means at length 1 (Liu et al. 2023): the least for a simplex,
    -log √2 = -0.347 for means at right angles. Language models go there, and hardly towards the simplex (Wu & Papyan
    2024)."""
    gnc2_excess: float
    """`gnc2` above the simplex's own."""


def simplex_errors(values: Float[Tensor, "prompt d_model"], labels: Sequence[str]) -> SimplexErrors:
    """NC2 of the means of labelled vectors; UserError where a class mean is the mean of all, so that it has no angle.

    >>> import torch
    >>> found = ml.simplex_errors(torch.eye(4).repeat(2, 1), ["a", "b", "c", "d"] * 2)
    >>> max(found.norm_spread, found.coherence, found.etf_error, abs(found.gnc2_excess)) < 1e-12
    True
    """
    means = class_means(values, labels)
    centred, n = means.centred, len(means.classes)
    norms = centred.norm(dim=1)
    if float(norms.min()) <= 1e-12 * float(means.means.norm(dim=1).max()):
        name = means.classes[int(norms.argmin())]
        raise UserError(f"the mean of class {name!r} is the mean of all classes, so it has no angle; leave it out")
    units = centred / norms[:, None]
    cosines = (units @ units.T)[*torch.triu_indices(n, n, offset=1)]
    gnc2 = float(-torch.pdist(units).log().mean())
    return SimplexErrors(
        norm_spread=float(norms.std(correction=0) / norms.mean()),
        coherence=float((cosines + 1 / (n - 1)).abs().mean()),
        etf_error=structure_error(centred, centred),
        gnc2=gnc2,
        gnc2_excess=gnc2 + math.log(2 * n / (n - 1)) / 2,
    )


def structure_error(first: Float[Tensor, "class d_model"], second: Float[Tensor, "class d_model"]) -> float:
    """Frobenius distance of first secondᵀ, at norm 1, from the Gram matrix of a simplex; √2 for an unrelated one."""
    products = first @ second.T
    n = len(first)
    simplex = (torch.eye(n, dtype=products.dtype) - 1 / n) / math.sqrt(n - 1)
    return float((products / products.norm() - simplex).norm())
