"""How alike every unit of one model and every unit of another are over the same prompts."""

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.geometry.similarity.cka import alignments, centred_kernel
from mechlens.methods.geometry.similarity.similarity import require_same_prompts


def unit_correlations(
    first: Float[Tensor, "prompt first *size"], second: Float[Tensor, "other second *own_size"]
) -> Float[Tensor, "first second"]:
    """Pearson's correlation of every two neurons (or scores along probe directions); of heads their unbiased CKA.

    Neurons are (prompt, unit), heads (prompt, head, d_head), which may be turned against each other. A unit that is the
    same for every prompt is like no other: 0.

    >>> import torch
    >>> values = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    >>> ml.unit_correlations(values, -2 * values).diagonal().round(decimals=3).tolist()
    [-1.0, -1.0, -1.0]
    """
    require_same_prompts(first, second)
    if first.ndim == 2 and second.ndim == 2:
        one, other = (standardised(side) for side in (first, second))
        return one.T @ other / len(one)
    kernels = [_kernels(side if side.ndim == 3 else side[:, :, None]) for side in (first, second)]
    return alignments(*kernels).nan_to_num(0.0)


def standardised(values: Float[Tensor, "prompt unit"]) -> Float[Tensor, "prompt unit"]:
    """Every unit about its mean, in its standard deviations (float64); zeros where it doesn't vary."""
    exact = values.detach().cpu().double()
    centred = exact - exact.mean(dim=0)
    sizes = centred.square().mean(dim=0).sqrt()
    varies = sizes > 1e-9 * exact.abs().amax(dim=0)
    return torch.where(varies, centred / torch.where(varies, sizes, 1.0), 0.0)


def _kernels(values: Float[Tensor, "prompt head d_head"]) -> Float[Tensor, "head pair"]:
    return torch.stack([centred_kernel(values[:, head]).flatten() for head in range(values.shape[1])])
