"""How far a training run's LoRA adapters went, by their matrices alone: no model is loaded.

What an adapter adds to all matrices is one long vector; its length, and the inner products of checkpoints, are sums
over matrices of small products of A and B, which are never multiplied out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from mechlens.models.checkpoints.lora import LowRank


@dataclass(frozen=True, repr=False)
class AdapterPath:
    """Adapters of one run in their order, after the base, which is 0; see `adapter_path`.

    >>> from mechlens.models.packaged import adapter_folder
    >>> path = ml.adapter_path([ml.read_lora(adapter_folder("smollm2-refuser"))])
    >>> path.rank, path.norms.tolist()[0], path.norms.shape
    (8, 0.0, torch.Size([2]))
    """

    products: Float64[Tensor, "checkpoint checkpoint"]
    """Inner products of what the checkpoints add to the weights, over all matrices."""
    a_norms: Float64[Tensor, " checkpoint"]
    """Of all A, as one vector; before training they aren't 0, and what they were isn't known (the base has NaN)."""
    b_norms: Float64[Tensor, " checkpoint"]
    rank: int
    """The largest of all matrices; 1 is a rank-one adapter."""

    def __repr__(self) -> str:
        lengths = ", ".join(f"{length:.3g}" for length in self.norms.tolist())
        return f"AdapterPath(rank {self.rank}; norms {lengths})"

    @property
    def norms(self) -> Float64[Tensor, " checkpoint"]:
        """Length of the whole change of the weights (Frobenius)."""
        return self.products.diagonal().clamp(min=0).sqrt()


def adapter_path(adapters: Sequence[Mapping[str, LowRank]]) -> AdapterPath:
    """Of the adapters of one run in their order, each as `read_lora` has it; a matrix that one lacks is 0 there.

    >>> from mechlens.models.packaged import adapter_folder
    >>> refuser = ml.read_lora(adapter_folder("smollm2-refuser"))
    >>> same = ml.adapter_path([refuser, refuser])
    >>> bool(same.products[1, 1] == same.products[1, 2])
    True
    """
    found = [{name: _wide(one) for name, one in changes.items()} for changes in adapters]
    n = len(found)
    products = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    for i in range(n):
        for k in range(i, n):
            both = [(found[i][name], found[k][name]) for name in found[i] if name in found[k]]
            products[i + 1, k + 1] = products[k + 1, i + 1] = sum(_product(*pair) for pair in both)
    lengths = [[_length(getattr(one, side) for one in own.values()) for own in found] for side in ("down", "up")]
    rank = max((len(one.down) for own in found for one in own.values()), default=0)
    return AdapterPath(
        products, torch.tensor([math.nan, *lengths[0]]).double(), torch.tensor([0.0, *lengths[1]]).double(), rank
    )


def _wide(change: LowRank) -> LowRank:
    return LowRank(change.up.double(), change.down.double(), change.scale)


def _product(first: LowRank, second: LowRank) -> float:
    """The inner product of two changes of one matrix, <s B A, s' B' A'> = s s' tr((B^T B')(A' A^T))."""
    small = (first.up.T @ second.up) * (first.down @ second.down.T)
    return first.scale * second.scale * float(small.sum())


def _length(parts: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in parts))
