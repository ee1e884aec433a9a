"""Softmax collapse: the share of positions that can teach nothing any more, in the type that is computed in."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.errors import UserError

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class NumericalEdge:
    """How near logits are to where their softmax is exact; see `numerical_edge`.

    >>> import torch
    >>> logits = torch.tensor([[20.0, 0.0], [1.0, 0.0]])
    >>> ml.numerical_edge(logits, torch.tensor([0, 0])).collapsed
    0.5
    """

    dtype: str
    collapsed: float
    """Share of positions where Σ exp(z - max z) is exactly 1: loss and gradient are 0 if the largest logit is right."""
    zero_loss: float
    """Share of positions where the loss is exactly 0."""
    scale: float
    """Root mean square of the logits about their mean, over positions."""
    gap: float
    """Median of the right logit minus the largest other one."""


def numerical_edge(
    logits: Float[Tensor, "position vocabulary"], targets: Int[Tensor, " target"], dtype: torch.dtype | None = None
) -> NumericalEdge:
    """The edge in `dtype`, which is the logits' own where none is given; UserError for a type that isn't known.

    >>> import torch
    >>> logits = torch.tensor([[20.0, 0.0], [1.0, 0.0]])
    >>> ml.numerical_edge(logits, torch.tensor([0, 0])).collapsed
    0.5
    """
    kind = _known(dtype or logits.dtype)
    if len(logits) != len(targets) or not len(logits):
        raise UserError(f"there are {len(logits)} rows of logits and {len(targets)} targets; give one target a row")
    own = logits.detach().to(kind)
    shifted = own - own.amax(dim=1, keepdim=True)
    sums = shifted.exp().sum(dim=1)
    losses = sums.log() - shifted.gather(1, targets[:, None])[:, 0]
    exact = logits.detach().double()
    right = exact.gather(1, targets[:, None])[:, 0]
    others = exact.scatter(1, targets[:, None], -math.inf).amax(dim=1)
    return NumericalEdge(
        str(kind).removeprefix("torch."),
        float((sums == 1).double().mean()),
        float((losses == 0).double().mean()),
        float((exact - exact.mean(dim=1, keepdim=True)).square().mean().sqrt()),
        float((right - others).median()),
    )


def collapse_gap(dtype: torch.dtype, rivals: int = 1) -> float:
    """How far the largest logit must be ahead of `rivals` equal ones for their softmax to be exact in `dtype`.

    Found by bisection of what PyTorch computes. With one rival (t + 1) ln 2, t the bits behind the point; how much
    more rivals add depends on the order in which they are summed.

    >>> import torch
    >>> round(ml.collapse_gap(torch.float32), 2), round(ml.collapse_gap(torch.float16), 1)
    (16.64, 7.6)
    """
    kind = _known(dtype)
    if rivals < 1:
        raise UserError(f"{rivals} rivals were asked for; ask for at least 1")
    low, high = 0.0, 60.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        row = torch.full((1, rivals + 1), -middle, dtype=torch.float64)
        row[0, 0] = 0.0
        low, high = (low, middle) if float(row.to(kind).exp().sum(dim=1)) == 1 else (middle, high)
    return high


def _known(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES:
        names = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
        raise UserError(f"a softmax isn't computed in {str(dtype).removeprefix('torch.')}; give one of {names}")
    return dtype
