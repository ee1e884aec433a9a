"""How well one representation is laid on another by a rotation (orthogonal Procrustes)."""

import torch
from jaxtyping import Float
from torch import Tensor


def procrustes(first: Float[Tensor, "prompt d_first"], second: Float[Tensor, "prompt d_second"]) -> float:
    """1 - |A - B R|² / 2 for the best rotation R of the two, each centred and of norm 1: 1 for the same up to rotation.

    The nuclear norm of AᵀB. High by chance where dimensions are many and prompts few: read it beside its null
    (`similarity`). NaN where one is constant.

    >>> import torch
    >>> values = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    >>> turned = torch.linalg.qr(values[:5]).Q
    >>> round(ml.procrustes(values, 3 * values @ turned + 1), 4)
    1.0
    """
    sides = []
    for values in (first, second):
        centred = values.double() - values.double().mean(dim=0)
        # Of more dimensions than prompts only the products matter, and a square factor has the same.
        factor = torch.linalg.qr(centred.T).R.T if centred.shape[1] > len(centred) else centred
        sides.append(factor / factor.norm())
    if not all(bool(torch.isfinite(side).all()) for side in sides):
        return float("nan")
    return float(torch.linalg.svdvals(sides[0].T @ sides[1]).sum())
