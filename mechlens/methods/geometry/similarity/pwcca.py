"""Projection-weighted canonical correlation (Morcos et al. 2018): alike up to any invertible linear map."""

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError

MOST_OF_PROMPTS = 5
"""Leading principal components are kept, one for so many prompts: with as many as prompts all correlations are 1."""


def pwcca(first: Float[Tensor, "prompt d_first"], second: Float[Tensor, "prompt d_second"]) -> float:
    """Canonical correlations of the leading components of two representations, weighted by what they say of `first`.

    A canonical variate weighs as much as the sum of its |products| with the kept components of `first`, so the value
    isn't symmetric. It is above 0 for unrelated ones, the more the fewer prompts: read it beside its null
    (`similarity`). NaN where one is constant.

    >>> import torch
    >>> values = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    >>> round(ml.pwcca(values, values @ torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))), 4)
    1.0
    """
    n = len(first)
    if n < 2 * MOST_OF_PROMPTS:
        raise UserError(f"canonical correlations of {n} prompts say nothing; give at least {2 * MOST_OF_PROMPTS}")
    (one, scores), (other, _) = (_components(side, n // MOST_OF_PROMPTS) for side in (first, second))
    if not one.shape[1] or not other.shape[1]:
        return float("nan")
    left, correlations, _ = torch.linalg.svd(one.T @ other, full_matrices=False)
    weights = ((one @ left).T @ scores).abs().sum(dim=1)
    return float((weights * correlations.clamp(max=1.0)).sum() / weights.sum())


def _components(
    values: Float[Tensor, "prompt d_model"], most: int
) -> tuple[Float[Tensor, "prompt k"], Float[Tensor, "prompt k"]]:
    """Orthonormal leading components of the centred values, and the same with their lengths."""
    exact = values.double() - values.double().mean(dim=0)
    scores, lengths, _ = torch.linalg.svd(exact, full_matrices=False)
    real = (lengths > lengths.max() * max(exact.shape) * torch.finfo(lengths.dtype).eps).nonzero()[:most, 0]
    return scores[:, real], scores[:, real] * lengths[real]
