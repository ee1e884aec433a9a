"""In how many directions checkpoints moved: the spectrum of their differences from the first."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError


@dataclass(frozen=True)
class EffectiveRank:
    """The spectrum of the differences in a few numbers; see `effective_rank`.

    >>> import torch
    >>> found = ml.effective_rank([torch.zeros(3, 2), torch.ones(3, 2), 2 * torch.ones(3, 2)])  # on a straight line
    >>> round(found.participation, 6), round(found.entropy, 6), round(found.stable, 6), found.needed
    (1.0, 1.0, 1.0, 1)
    """

    participation: float
    """(Σ s²)² / Σ s⁴ of the singular values s."""
    entropy: float
    """exp of the entropy of s / Σ s (Roy & Vetterli 2007)."""
    stable: float
    """Σ s² / max s²: 1 where one direction has it all."""
    needed: int
    """Leading directions that hold 90% of Σ s²."""


def effective_rank(checkpoints: Sequence[Float[Tensor, "*shape"]]) -> EffectiveRank:
    """Of one parameter (or of vectors of any kind) at every checkpoint, the first of which the others are counted from.

    A training along a straight line has rank 1 however far it goes; one that turns with every step as many as there are
    steps. UserError where nothing moved.

    >>> import torch
    >>> found = ml.effective_rank([torch.zeros(3, 2), torch.ones(3, 2), 2 * torch.ones(3, 2)])  # on a straight line
    >>> round(found.participation, 6), round(found.entropy, 6), round(found.stable, 6), found.needed
    (1.0, 1.0, 1.0, 1)
    """
    shapes = {tuple(one.shape) for one in checkpoints}
    if len(checkpoints) < 2 or len(shapes) > 1:
        raise UserError(
            f"{len(checkpoints)} checkpoints of shapes {sorted(shapes)} came; give two or more of one parameter"
        )
    first, *others = (one.detach().cpu().double().flatten() for one in checkpoints)
    moved = torch.stack([one - first for one in others])
    # The Gram matrix is as small as there are checkpoints; its roots are exact to 1e-8 of the largest.
    squares = torch.linalg.eigvalsh(moved @ moved.T).flip(0).clamp_min(0.0)
    if float(squares[0]) == 0:
        raise UserError("the checkpoints have the same values, so nothing moved; take another parameter or series")
    sizes = torch.where(squares > 1e-14 * squares[0], squares, 0.0).sqrt()
    shares = sizes / sizes.sum()
    held = sizes.square().cumsum(0) / sizes.square().sum()
    return EffectiveRank(
        participation=participation_ratio(sizes.square()),
        entropy=math.exp(float(torch.special.entr(shares).sum())),
        stable=float(sizes.square().sum() / sizes[0].square()),
        needed=int((held < 0.9 - 1e-12).sum()) + 1,
    )


def participation_ratio(variances: Float[Tensor, " axis"]) -> float:
    """(Σ λ)² / Σ λ²: as many as there are where all are equal, 1 where one has all."""
    return float(variances.sum().square() / variances.square().sum())
