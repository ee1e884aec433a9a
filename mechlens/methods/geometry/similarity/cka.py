"""Centred kernel alignment without the bias that few prompts and many dimensions give it (Kornblith et al. 2019)."""

import torch
from jaxtyping import Float
from torch import Tensor


def unbiased_cka(first: Float[Tensor, "prompt d_first"], second: Float[Tensor, "prompt d_second"]) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with the unbiased estimator of Song et al. 2012, linear kernels.

    1 for the same representation up to rotation and scale, about 0 for unrelated ones. The usual biased CKA of
    unrelated Gaussians is 0.8 where dimensions are many and prompts few. NaN where one is constant. Not invariant to
    other linear maps: a few dimensions with large variance have nearly all the say.

    >>> import torch
    >>> values = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    >>> turned = torch.linalg.qr(values[:5]).Q
    >>> round(ml.unbiased_cka(values, 3 * values @ turned), 4)
    1.0
    """
    kernels = torch.stack([centred_kernel(values).flatten() for values in (first, second)])
    return float(alignments(kernels[:1], kernels[1:])[0, 0])


def alignments(
    first: Float[Tensor, "first pair"], second: Float[Tensor, "second pair"]
) -> Float[Tensor, "first second"]:
    """Unbiased CKA of every two flattened `centred_kernel`s; NaN where one is of constant vectors."""
    own = first.square().sum(dim=1)[:, None] * second.square().sum(dim=1)
    return torch.where(own > 0, first @ second.T / own.sqrt(), torch.nan)


def centred_kernel(values: Float[Tensor, "prompt d_model"]) -> Float[Tensor, "prompt prompt"]:
    """The linear kernel with an empty diagonal and rows that add up to 0 (U-centring; Székely & Rizzo 2014).

    The sum of the products of two of these is the unbiased HSIC times n (n - 3).
    """
    # Centring changes no unbiased estimate, and keeps large common means from eating the digits.
    # Counted from one prompt's vector, equal vectors are exactly 0 and rounding can't part them.
    shifted = values.double() - values[0].double()
    centred = shifted - shifted.mean(dim=0)
    kernel = centred @ centred.T
    kernel.fill_diagonal_(0.0)
    n = len(kernel)
    rows = kernel.sum(dim=1) / (n - 2)
    kernel = kernel - rows[:, None] - rows + kernel.sum() / ((n - 1) * (n - 2))
    kernel.fill_diagonal_(0.0)
    return kernel
