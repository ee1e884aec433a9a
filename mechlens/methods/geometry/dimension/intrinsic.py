"""How many dimensions representations have: by nearest neighbours, and by the variances of principal components."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.geometry.dimension.effective_rank import participation_ratio

LEFT_OUT = 0.1
"""Share of the prompts with the largest ratios, which TwoNN leaves out (Facco et al. 2017)."""
NEIGHBOURS = 20
"""Of the maximum likelihood estimate; fewer of few prompts."""
FEWEST = 20
"""Prompts."""


@dataclass(frozen=True)
class IntrinsicDimension:
    """Three answers that needn't agree; see `intrinsic_dimension`.

    >>> import torch
    >>> plane = torch.rand(300, 2, generator=torch.Generator().manual_seed(0)) @ torch.eye(2, 9)
    >>> found = ml.intrinsic_dimension(plane)
    >>> round(found.two_nn), round(found.likelihood), round(found.participation)
    (2, 2, 2)
    """

    two_nn: float
    """By the ratio of the second to the first nearest neighbour (Facco et al. 2017)."""
    likelihood: float
    """By the distances to `neighbours` (Levina & Bickel 2004; averaged as MacKay & Ghahramani 2005 have it)."""
    participation: float
    """(Σ λ)² / Σ λ² of the principal variances: linear, so that a curved line has more than one."""
    neighbours: int
    n: int
    """Prompts that were counted: those with the same vector as an earlier one are left out."""


def intrinsic_dimension(values: Float[Tensor, "prompt d_model"]) -> IntrinsicDimension:
    """The dimension of what the prompts' vectors lie on; UserError for too few that differ.

    Estimates by neighbours are too low where dimensions are many: n prompts tell about 2 log10(n) of them (Eckmann &
    Ruelle 1992), 200 prompts about 5. Compare models at equal counts.

    >>> import torch
    >>> plane = torch.rand(300, 2, generator=torch.Generator().manual_seed(0)) @ torch.eye(2, 9)
    >>> found = ml.intrinsic_dimension(plane)
    >>> round(found.two_nn), round(found.likelihood), round(found.participation)
    (2, 2, 2)
    """
    if not bool(torch.isfinite(values).all()):
        raise UserError(
            "some of the vectors are not finite; leave prompts without the position out, or read in float32"
        )
    exact: Tensor = torch.unique(values.detach().cpu().double(), dim=0)
    n = len(exact)
    if n < FEWEST:
        raise UserError(f"{n} prompts with vectors that differ say nothing of a dimension; give at least {FEWEST}")
    k = min(NEIGHBOURS, n // 4)
    centred = exact - exact.mean(dim=0)
    # By differences, not through products: those of near neighbours would be rounding.
    apart = torch.cdist(centred, centred, compute_mode="donot_use_mm_for_euclid_dist")
    near = apart.topk(k + 1, dim=1, largest=False).values[:, 1:]
    return IntrinsicDimension(
        _two_nn(near), _likelihood(near), participation_ratio(torch.linalg.svdvals(centred).square()), k, n
    )


def _two_nn(near: Float[Tensor, "prompt k"]) -> float:
    """The slope through 0 of -log(1 - F) over log(ratio), F the empirical distribution."""
    n = len(near)
    ratios = (near[:, 1] / near[:, 0]).log().sort().values
    kept = int(n * (1 - LEFT_OUT))
    x, y = ratios[:kept], -(1 - torch.arange(1, kept + 1, dtype=torch.float64) / n).log()
    return float(x @ y / (x @ x)) if bool(x.any()) else math.inf


def _likelihood(near: Float[Tensor, "prompt k"]) -> float:
    """One over the mean of log(farthest / nearer) over prompts and neighbours."""
    logs = (near[:, -1:] / near[:, :-1]).log()
    inverse = float(logs.sum(dim=1).mean()) / (near.shape[1] - 2)
    return 1 / inverse if inverse > 0 else math.inf
