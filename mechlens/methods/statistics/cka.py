"""How alike two representations of the same prompts are, whatever their rotation: unbiased linear CKA."""

from jaxtyping import Float
from torch import Tensor


def unbiased_cka(first: Float[Tensor, "prompt d_first"], second: Float[Tensor, "prompt d_second"]) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with the unbiased estimator of Song et al. 2012, linear kernels.

    1 for the same representation up to rotation and scale, about 0 for unrelated ones. The usual biased CKA of
    unrelated Gaussians is 0.8 where dimensions are many and prompts few (methods.md 7.6). NaN where one is constant.
    """
    kernels = [_kernel(values) for values in (first, second)]
    own = hsic(kernels[0], kernels[0]) * hsic(kernels[1], kernels[1])
    return float(hsic(*kernels) / own.sqrt()) if own > 0 else float("nan")


def hsic(first: Float[Tensor, "prompt prompt"], second: Float[Tensor, "prompt prompt"]) -> Float[Tensor, ""]:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion from kernels with empty diagonals."""
    n = len(first)
    joint = (first * second).sum()
    means = first.sum() * second.sum() / ((n - 1) * (n - 2))
    mixed = 2 * (first.sum(dim=0) @ second.sum(dim=0)) / (n - 2)
    return (joint + means - mixed) / (n * (n - 3))


def _kernel(values: Tensor) -> Tensor:
    # Centring changes no unbiased estimate, and keeps large common means from eating the digits.
    # Counted from one prompt's vector, equal vectors are exactly 0 and rounding can't part them.
    shifted = values.double() - values[0].double()
    centred = shifted - shifted.mean(dim=0)
    kernel = centred @ centred.T
    kernel.fill_diagonal_(0.0)
    return kernel
