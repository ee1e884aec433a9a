"""What training did to a matrix: how large its change is, over how many directions it spreads, and where they point."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.models.lora import LowRank

LEADING = 4
"""Singular directions that are kept."""


@dataclass(frozen=True)
class MatrixChange:
    """The leading part of a change's singular value decomposition."""

    norm: float
    """Frobenius."""
    stable_rank: float
    """norm^2 / (largest singular value)^2: 1 for a rank-one change; NaN where nothing changed."""
    share: float
    """Part of norm^2 in the leading direction (methods.md 7.8)."""
    outputs: Float[Tensor, "output leading"]
    """Left singular vectors: what the change writes."""
    inputs: Float[Tensor, "input leading"]
    """Right singular vectors: what it reads."""
    values: Float[Tensor, " leading"]


def matrix_change(change: LowRank | Float[Tensor, "output input"]) -> MatrixChange:
    """Exact for a low-rank change, from its factors alone; leading directions by subspace iteration for a full one."""
    if isinstance(change, LowRank):
        left, upper = torch.linalg.qr(change.up.double() * change.scale)
        right, lower = torch.linalg.qr(change.down.double().T)
        u, values, v = torch.linalg.svd(upper @ lower.T)
        outputs, inputs = left @ u, right @ v.T
        squared = float(values.square().sum())
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            outputs, values, inputs = torch.svd_lowrank(change.double(), q=min(2 * LEADING, *change.shape), niter=8)
        squared = float(change.double().square().sum())
    largest = float(values[0] ** 2)
    return MatrixChange(
        norm=squared**0.5,
        stable_rank=squared / largest if largest > 0 else float("nan"),
        share=largest / squared if squared > 0 else float("nan"),
        outputs=outputs[:, :LEADING],
        inputs=inputs[:, :LEADING],
        values=values[:LEADING],
    )
