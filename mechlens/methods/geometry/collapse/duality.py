"""NC3 and NC4: whether a classifier's weights are its class means, and whether it decides as the nearest mean does."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.geometry.collapse.class_means import ClassMeans
from mechlens.methods.geometry.collapse.simplex import structure_error


@dataclass(frozen=True)
class SelfDuality:
    """NC3 of a classifier and the class means of what it reads; see `self_duality`.

    >>> import torch
    >>> means = ml.class_means(torch.eye(3).repeat(2, 1), ["a", "b", "c"] * 2)
    >>> found = ml.self_duality(means, 7 * (torch.eye(3) - 1 / 3))
    >>> round(found.distance, 9), round(found.cosine, 9)
    (0.0, 1.0)
    """

    distance: float
    """|W / |W| - M / |M||² (Frobenius): 0 for one matrix up to scale, 2 for unrelated ones (Papyan et al. 2020)."""
    etf_error: float
    """How far the products of weights and means are from a simplex's Gram matrix (Kothapalli 2023)."""
    cosine: float
    """Mean cosine of a class's weights with its mean."""
    unc3: float
    """Variance of that cosine over classes (Wu & Papyan 2024): 0 also where all are equally wrong."""


def self_duality(means: ClassMeans, weight: Float[Tensor, "class d_model"]) -> SelfDuality:
    """NC3: `weight` has a row for each of `means.classes`, of a probe or of the unembedding, in their order.

    >>> import torch
    >>> means = ml.class_means(torch.eye(3).repeat(2, 1), ["a", "b", "c"] * 2)
    >>> found = ml.self_duality(means, 7 * (torch.eye(3) - 1 / 3))
    >>> round(found.distance, 9), round(found.cosine, 9)
    (0.0, 1.0)
    """
    rows, centred = _rows(means, weight), means.centred
    cosines = torch.nn.functional.cosine_similarity(rows, centred)
    return SelfDuality(
        distance=float((rows / rows.norm() - centred / centred.norm()).square().sum()),
        etf_error=structure_error(centred, rows),
        cosine=float(cosines.mean()),
        unc3=float(cosines.var(correction=0)),
    )


def mean_disagreement(
    means: ClassMeans,
    values: Float[Tensor, "prompt d_model"],
    weight: Float[Tensor, "class d_model"],
    bias: Float[Tensor, " class"] | None = None,
) -> float:
    """NC4: the share of vectors that a linear classifier puts into another class than the nearest class mean does.

    The vectors needn't be those that the means were made of.

    >>> import torch
    >>> means = ml.class_means(torch.eye(3).repeat(2, 1), ["a", "b", "c"] * 2)
    >>> [ml.mean_disagreement(means, torch.eye(3), weight) for weight in (torch.eye(3), -torch.eye(3))]
    [0.0, 1.0]
    """
    rows = _rows(means, weight)
    exact = values.detach().cpu().double()
    logits = exact @ rows.T + (0.0 if bias is None else bias.detach().cpu().double())
    nearest = torch.cdist(exact, means.means).argmin(dim=1)
    return float((logits.argmax(dim=1) != nearest).double().mean())


def _rows(means: ClassMeans, weight: Tensor) -> Float[Tensor, "class d_model"]:
    if weight.shape != means.means.shape:
        raise UserError(
            f"the classifier's weights are {tuple(weight.shape)} and the class means {tuple(means.means.shape)}; give "
            "a row for each class, in the order of `classes`"
        )
    return weight.detach().cpu().double()
