"""Clusters that nobody named: a doubly stochastic membership that lowers the rate of the parts (Ding et al. 2022).

Manifold linearising and clustering: who belongs together is a matrix that sums to 1 by row and by column, made by
Sinkhorn's iterations from inner products of codes. Codes are a linear map of the vectors, trained so that the rate of
the whole stays and that of the parts falls; k-means and spectral clustering of the same vectors stand beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.geometry.coding.rate import DISTORTION, coding_rate, unit_rows
from mechlens.methods.statistics.resample import one_thread

DIMENSIONS = 16
"""Leading principal components that are clustered."""
TEMPERATURE = 0.1
"""Of the inner products: the smaller, the fewer neighbours a vector has."""
SINKHORN = 30
STEPS = 10
"""Few: with 40 the rate falls further and planted subspaces are split (adjusted Rand 1.00 after 10, .92 to 1.00)."""
RATE = 0.02


@dataclass(frozen=True, eq=False)
class RateClusters:
    """Clusters by coding rate, and by k-means; see `rate_clusters`.

    >>> import torch
    >>> angles = torch.linspace(0, 6.2, 24)[:, None]
    >>> plane = torch.cat([angles.cos(), angles.sin()], dim=1)
    >>> values = torch.block_diag(plane, plane)
    >>> found = ml.rate_clusters(values, k=2, steps=5)
    >>> found.agreement(["one"] * 24 + ["other"] * 24)
    1.0
    """

    groups: Int[Tensor, " prompt"] = field(repr=False)
    by_means: Int[Tensor, " prompt"] = field(repr=False)
    """Of k-means on the same vectors."""
    membership: Float[Tensor, "prompt prompt"] = field(repr=False)
    """Doubly stochastic: how much two prompts belong together."""
    losses: tuple[float, ...]
    """Rate of the parts minus that of the whole, at every step."""

    def agreement(self, labels: Sequence[str], rows: Sequence[int] | None = None) -> float:
        """Adjusted Rand index of the groups with labels that they never saw: 1 for the same, about 0 by chance.

        `rows` are the prompts that have the labels; None is all.
        """
        return _agreement(labels, self.groups if rows is None else self.groups[list(rows)])

    def means_agreement(self, labels: Sequence[str], rows: Sequence[int] | None = None) -> float:
        """The same of k-means."""
        return _agreement(labels, self.by_means if rows is None else self.by_means[list(rows)])


@one_thread()
def rate_clusters(
    values: Float[Tensor, "prompt d_model"], *, k: int, dimensions: int = DIMENSIONS, steps: int = STEPS
) -> RateClusters:
    """`k` clusters of vectors about their mean, in their leading `dimensions`, by the objective of MCR².

    Without labels: do harmfulness and refusal come out by themselves? Nothing here is random.

    >>> import torch
    >>> angles = torch.linspace(0, 6.2, 24)[:, None]
    >>> plane = torch.cat([angles.cos(), angles.sin()], dim=1)
    >>> values = torch.block_diag(plane, plane)
    >>> found = ml.rate_clusters(values, k=2, steps=5)
    >>> found.agreement(["one"] * 24 + ["other"] * 24)
    1.0
    """
    if not 2 <= k < len(values):
        raise UserError(f"{k} clusters of {len(values)} prompts were asked for; ask for 2 to {len(values) - 1}")
    exact = values.detach().cpu().double()
    left, lengths, _ = torch.linalg.svd(exact - exact.mean(dim=0), full_matrices=False)
    real = (lengths > 1e-9 * lengths.max()).nonzero()[:dimensions, 0]
    scores = left[:, real] * lengths[real]
    units = unit_rows(scores)
    membership, losses = _descend(units, steps)
    spectral = SpectralClustering(k, affinity="precomputed", assign_labels="cluster_qr", random_state=0)
    groups = spectral.fit_predict(((membership + membership.T) / 2).numpy())
    means = KMeans(k, n_init=10, random_state=0).fit_predict(scores.numpy())
    return RateClusters(torch.from_numpy(groups).long(), torch.from_numpy(means).long(), membership, losses)


def _descend(
    units: Float[Tensor, "prompt axis"], steps: int
) -> tuple[Float[Tensor, "prompt prompt"], tuple[float, ...]]:
    weight, losses = torch.eye(units.shape[1], dtype=torch.float64), []
    for _ in range(steps):
        weight.requires_grad_()
        with torch.enable_grad():
            codes = torch.nn.functional.normalize(units @ weight, dim=1)
            loss = parts_rate(codes, doubly_stochastic(codes)) - coding_rate(codes, DISTORTION)
            (gradient,) = torch.autograd.grad(loss, weight)
        losses.append(float(loss.detach()))
        weight = weight.detach() - RATE * gradient / gradient.abs().max().clamp_min(1e-12)
    return doubly_stochastic(torch.nn.functional.normalize(units @ weight, dim=1)), tuple(losses)


def doubly_stochastic(codes: Float[Tensor, "prompt axis"]) -> Float[Tensor, "prompt prompt"]:
    """Squared inner products, as a vector and its opposite span one subspace, through Sinkhorn's iterations."""
    logits = (codes @ codes.T).square() / TEMPERATURE
    for _ in range(SINKHORN):
        logits = logits - logits.logsumexp(dim=1, keepdim=True)
        logits = logits - logits.logsumexp(dim=0, keepdim=True)
    return logits.exp()


def parts_rate(codes: Float[Tensor, "prompt axis"], membership: Float[Tensor, "prompt prompt"]) -> Float[Tensor, ""]:
    """Mean over columns of log det(I + d / distortion Zᵀ diag(column) Z) / 2, a column summing to 1."""
    outer = codes[:, :, None] * codes[:, None]
    weighted = (membership.T @ outer.flatten(1)).view(outer.shape)
    eye = torch.eye(codes.shape[1], dtype=codes.dtype)
    rates: Tensor = torch.linalg.slogdet(eye + codes.shape[1] / DISTORTION * weighted).logabsdet
    return rates.mean() / 2


def _agreement(labels: Sequence[str], groups: Int[Tensor, " prompt"]) -> float:
    if len(labels) != len(groups):
        raise UserError(f"there are {len(groups)} prompts and {len(labels)} labels; give one label for each prompt")
    return float(adjusted_rand_score(list(labels), groups.tolist()))
