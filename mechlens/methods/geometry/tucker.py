"""What a series of changes of one matrix has in common: shared written and read directions, and a core for each."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError


@dataclass(frozen=True, eq=False)
class SharedFactors:
    """A Tucker decomposition of a series of changes; see `shared_factors`.

    >>> import torch
    >>> one = torch.outer(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 2.0]))
    >>> found = ml.shared_factors(torch.stack([one, -3 * one]), rank=1)
    >>> round(found.kept, 6), (found.cores[1] / found.cores[0]).round(decimals=4).tolist()
    (1.0, [[-3.0]])
    """

    outputs: Float[Tensor, "output rank"] = field(repr=False)
    """Orthonormal directions that all checkpoints write."""
    inputs: Float[Tensor, "input read"] = field(repr=False)
    """Orthonormal directions that all of them read."""
    cores: Float[Tensor, "checkpoint rank read"] = field(repr=False)
    """How much of each written direction a checkpoint writes where its input has each read direction."""
    kept: float
    """Share of the series' squared size that these factors hold."""

    def product(self) -> Float[Tensor, "checkpoint output input"]:
        """The changes as the factors have them."""
        return self.outputs @ self.cores @ self.inputs.T


def shared_factors(changes: Float[Tensor, "checkpoint output input"], *, rank: int) -> SharedFactors:
    """The leading `rank` directions that a series writes and those that it reads (Tucker 1966, by HOSVD).

    Factors are shared and the core is each checkpoint's own, as in FLoRA (Si et al. 2024). At full rank nothing is
    lost. A training that only grows along what it began with keeps nearly all at the rank of its first checkpoint.

    >>> import torch
    >>> one = torch.outer(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 2.0]))
    >>> found = ml.shared_factors(torch.stack([one, -3 * one]), rank=1)
    >>> round(found.kept, 6), (found.cores[1] / found.cores[0]).round(decimals=4).tolist()
    (1.0, [[-3.0]])
    """
    if changes.ndim != 3 or not len(changes):
        raise UserError(
            f"the changes have the shape {list(changes.shape)}; stack matrices of one shape, one a checkpoint"
        )
    if not 1 <= rank <= max(changes.shape[1:]):
        raise UserError(f"{rank} shared directions were asked for; ask for 1 to {max(changes.shape[1:])}")
    exact = changes.detach().cpu().double()
    outputs = _leading(exact.transpose(0, 1).flatten(1), rank)
    inputs = _leading(exact.permute(2, 0, 1).flatten(1), rank)
    cores = outputs.T @ exact @ inputs
    size = float(exact.square().sum())
    return SharedFactors(outputs, inputs, cores, float(cores.square().sum()) / size if size else 1.0)


def _leading(unfolded: Float[Tensor, "side rest"], rank: int) -> Float[Tensor, "side kept"]:
    """Leading eigenvectors of the side's second moments."""
    _, vectors = torch.linalg.eigh(unfolded @ unfolded.T)
    kept: Tensor = vectors.flip(1)[:, : min(rank, len(unfolded))]
    return kept
