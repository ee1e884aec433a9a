"""NC1, variability collapse: how far vectors lie from their class means, as a share of how far these lie apart.

The three published forms don't give the same number, and each has its own name. All are 0 where every vector is its
class mean. Σ_W is the mean of (h - μ_c)(h - μ_c)ᵀ over vectors, Σ_B that of (μ_c - μ_G)(μ_c - μ_G)ᵀ over classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.geometry.collapse.class_means import ClassMeans, class_means


@dataclass(frozen=True)
class VariabilityCollapse:
    """NC1 as it was published, four times.

    >>> import torch
    >>> corners = torch.eye(3).repeat(2, 1)
    >>> ml.variability_collapse(corners, ["a", "b", "c"] * 2)
    VariabilityCollapse(trace=0.0, svd=0.0, cdnv=0.0, quotient=0.0)
    """

    trace: float
    """tr(Σ_W Σ_B⁺) / C, the pseudo-inverse over every direction that the means span (Papyan et al. 2020)."""
    svd: float
    """tr(Σ_W Σ_B⁺), the pseudo-inverse by the leading C - 1 singular vectors and not divided by C (its code)."""
    cdnv: float
    """Mean over pairs of (s_c + s_c') / (2 |μ_c - μ_c'|²), s a class's mean squared distance (Galanti et al. 2021)."""
    quotient: float
    """tr(Σ_W) / tr(Σ_B) (Hui et al. 2022; Tirer et al. 2023)."""


def variability_collapse(values: Float[Tensor, "prompt d_model"], labels: Sequence[str]) -> VariabilityCollapse:
    """NC1 of vectors with one label each; infinite where class means coincide.

    Means of few prompts differ by chance, and prompts are near to a mean that they are part of: compare with the same
    numbers of permuted labels, and models with each other at equal counts. UserError for a class of one vector, which
    has no spread.

    >>> import torch
    >>> corners = torch.eye(3).repeat(2, 1)
    >>> ml.variability_collapse(corners, ["a", "b", "c"] * 2)
    VariabilityCollapse(trace=0.0, svd=0.0, cdnv=0.0, quotient=0.0)
    """
    means = class_means(values, labels)
    single = [name for name, n in zip(means.classes, means.counts.tolist(), strict=True) if n < 2]
    if single:
        raise UserError(f"the class {single[0]!r} has one vector, so it has no spread; leave it out or add prompts")
    along, gaps = _spread_along_means(means)
    # As torch.linalg.pinv has it: singular values of Σ_B below this share of the largest are rounding.
    real = gaps > gaps.max() * max(values.shape[1], len(gaps)) * torch.finfo(gaps.dtype).eps
    leading = len(means.classes) - 1
    within, between = means.residuals.square().sum() / len(values), means.centred.square().sum() / len(means.classes)
    return VariabilityCollapse(
        trace=float(_share(along[real], gaps[real])) / len(means.classes),
        svd=float(_share(along[:leading], gaps[:leading])),
        cdnv=_cdnv(means),
        quotient=float(_share(within[None], between[None])),
    )


def _spread_along_means(means: ClassMeans) -> tuple[Float[Tensor, " axis"], Float[Tensor, " axis"]]:
    """Variance within classes and between them along the singular vectors of the centred means, the largest first."""
    _, lengths, axes = torch.linalg.svd(means.centred, full_matrices=False)
    along = (means.residuals @ axes.T).square().mean(dim=0)
    return along, lengths.square() / len(means.classes)


def _share(within: Float[Tensor, " axis"], between: Float[Tensor, " axis"]) -> Float[Tensor, ""]:
    """Sum of ratios; 0 where nothing varies within, infinite where something does and nothing between."""
    if not len(within):
        return torch.tensor(torch.inf, dtype=torch.float64)
    return torch.where(within == 0, 0.0, within / between).sum()


def _cdnv(means: ClassMeans) -> float:
    apart = torch.pdist(means.means).square()
    first, second = torch.triu_indices(len(means.classes), len(means.classes), offset=1)
    mutual = (means.variances[first] + means.variances[second]) / 2
    return float(torch.where(mutual == 0, 0.0, mutual / apart).mean())
