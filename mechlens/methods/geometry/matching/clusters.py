"""Groups of units that two models have in common, where no single unit has its partner (Li et al. 2015)."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from sklearn.cluster import SpectralClustering
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.geometry.matching.correlation import unit_correlations


@dataclass(frozen=True, eq=False)
class UnitClusters:
    """Many-to-many groups of units; see `unit_clusters`.

    >>> import torch
    >>> values = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    >>> found = ml.unit_clusters(values, values[:, [2, 0, 1, 3]], k=4)
    >>> (found.first[[2, 0, 1, 3]] == found.second).all().item()
    True
    """

    first: Int[Tensor, " first"] = field(repr=False)
    """The group of every unit of the first model."""
    second: Int[Tensor, " second"] = field(repr=False)
    sizes: tuple[tuple[int, int], ...]
    """Units of each model in every group."""

    @property
    def shared(self) -> float:
        """Share of the units that have their like in the other model.

        1 where groups are half and half, 0 where no group has units of both.
        """
        total = sum(map(sum, self.sizes))
        return sum(2 * min(pair) for pair in self.sizes) / total


def unit_clusters(
    first: Float[Tensor, "prompt first *size"], second: Float[Tensor, "other second *own_size"], *, k: int
) -> UnitClusters:
    """Spectral clustering into `k` groups of all units of both models, by squared similarities within and between them.

    A rotation of a few units among themselves leaves no unit its own partner and the group whole.

    >>> import torch
    >>> values = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    >>> found = ml.unit_clusters(values, values[:, [2, 0, 1, 3]], k=4)
    >>> (found.first[[2, 0, 1, 3]] == found.second).all().item()
    True
    """
    sides = (first, second)
    n, total = first.shape[1], first.shape[1] + second.shape[1]
    if not 2 <= k <= total:
        raise UserError(f"{k} groups of {total} units were asked for; ask for 2 to {total}")
    # Squares: many small correlations of chance would outweigh the few that are real.
    graph = torch.cat([torch.cat([unit_correlations(one, other) for other in sides], dim=1) for one in sides]).square()
    groups = SpectralClustering(k, affinity="precomputed", assign_labels="cluster_qr", random_state=0)
    found = torch.from_numpy(groups.fit_predict(graph.numpy())).long()
    counts = [torch.bincount(own, minlength=k).tolist() for own in (found[:n], found[n:])]
    return UnitClusters(found[:n], found[n:], tuple(zip(*counts, strict=True)))
