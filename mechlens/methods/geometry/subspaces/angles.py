"""How two subspaces lie to each other: principal angles, and what they are for random ones."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError


@dataclass(frozen=True)
class PrincipalAngles:
    """The angles between two subspaces, the smallest first; see `principal_angles`.

    >>> import torch
    >>> found = ml.principal_angles(torch.eye(6)[:, :2], torch.eye(6)[:, [0, 2]])
    >>> [round(angle, 3) for angle in found.angles], found.overlap, round(found.chordal, 3)
    ([0.0, 1.571], 0.5, 1.0)
    """

    angles: tuple[float, ...]
    """In radians, as many as the smaller subspace has dimensions."""
    expected_overlap: float
    """Of two random subspaces of these dimensions."""

    @property
    def overlap(self) -> float:
        """Mean squared cosine: 1 where the smaller one lies in the larger, 0 at right angles."""
        return sum(math.cos(angle) ** 2 for angle in self.angles) / len(self.angles)

    @property
    def chordal(self) -> float:
        """Square root of the summed squared sines."""
        return math.sqrt(sum(math.sin(angle) ** 2 for angle in self.angles))

    @property
    def expected_chordal(self) -> float:
        """What the chordal distance of two random subspaces is about (its root mean square)."""
        return math.sqrt(len(self.angles) * (1 - self.expected_overlap))


def principal_angles(first: Float[Tensor, "d_model k"], second: Float[Tensor, "other j"]) -> PrincipalAngles:
    """The principal angles of the subspaces that the columns span, which needn't be orthonormal.

    Small angles are exact: they come from sines, as cosines near 1 have lost them (Knyazev & Argentati 2002). Own code
    since SciPy 1.17's `subspace_angles` takes them from cosines where there are large ones too, and 0 becomes 1.5e-8.
    UserError for columns of different spaces, or that depend on each other.

    >>> import torch
    >>> found = ml.principal_angles(torch.eye(6)[:, :2], torch.eye(6)[:, [0, 2]])
    >>> [round(angle, 3) for angle in found.angles], found.overlap, round(found.chordal, 3)
    ([0.0, 1.571], 0.5, 1.0)
    """
    if len(first) != len(second):
        raise UserError(f"the subspaces are of {len(first)} and {len(second)} dimensions; give two of one space")
    one, other = (side.detach().cpu().double() for side in (first, second))
    for side in (one, other):
        rank = int(torch.linalg.matrix_rank(side)) if bool(torch.isfinite(side).all()) else 0
        if not 0 < side.shape[1] == rank:
            raise UserError(f"{side.shape[1]} columns span {rank} dimensions; give columns that don't depend on others")
    wide, narrow = sorted((torch.linalg.qr(side).Q for side in (one, other)), key=lambda side: -side.shape[1])
    along = wide.T @ narrow
    cosines = torch.linalg.svdvals(along).clamp(max=1.0)
    sines = torch.linalg.svdvals(narrow - wide @ along).flip(0).clamp(max=1.0)
    angles = torch.where(cosines.square() >= 0.5, sines.asin(), cosines.acos())
    return PrincipalAngles(tuple(angles.tolist()), wide.shape[1] / len(wide))


def overlap(first: Float[Tensor, "d_model k"], second: Float[Tensor, "d_model k"]) -> float:
    """Mean squared cosine of two orthonormal bases, ||AᵀB||² / k: 1 for one subspace, k / d for unrelated ones."""
    return float((first.T @ second).square().sum() / first.shape[1])
