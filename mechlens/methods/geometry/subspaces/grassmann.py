"""A subspace for every class instead of a vector (Grassmann class representation; Wang et al. 2023).

The logit of a class is gamma times the length of the unit vector's projection on its subspace. A projection doesn't
know which way a vector points, and the mean that all residual vectors share would be in every subspace. So vectors are
taken about their mean, in units of their usual distance from it, with one more axis on which all are 1: opposite
classes differ there, as they do in the paper's features, none of which is negative.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.geometry.collapse.class_means import class_numbers

GAMMA = 25.0
"""The paper's."""
STEPS = 40
RATE = 0.1
"""Of the whole gradient along the geodesic; ours."""
ORTHONORMALISE_EVERY = 5
"""Steps, as in the paper: rounding adds up."""


@dataclass(frozen=True, eq=False)
class GrassmannClasses:
    """Class subspaces that score vectors; see `fit_grassmann`.

    >>> import torch
    >>> values = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    >>> values[:20, 0] += 5
    >>> found = ml.fit_grassmann(values, ["a"] * 20 + ["b"] * 20, k=1, steps=20)
    >>> found.bases.shape, found.predict(values)[:2], found.predict(values)[-2:]
    (torch.Size([2, 7, 1]), ('a', 'a'), ('b', 'b'))
    """

    classes: tuple[str, ...]
    bases: Float[Tensor, "class axis k"] = field(repr=False)
    """Orthonormal; the last axis is the one on which all vectors are 1."""
    centre: Float[Tensor, " d_model"] = field(repr=False)
    scale: float
    """Root mean square distance from the centre."""
    losses: tuple[float, ...]
    """Cross-entropy on what it was fitted to, at the start and after every step."""

    def logits(self, values: Float[Tensor, "prompt d_model"]) -> Float[Tensor, "prompt class"]:
        """A score of every vector for every class."""
        return subspace_logits(self.bases, values, self.centre, self.scale)

    def predict(self, values: Float[Tensor, "prompt d_model"]) -> tuple[str, ...]:
        """The class of the largest logit."""
        return tuple(self.classes[k] for k in self.logits(values).argmax(dim=1).tolist())

    def scores(self, values: Float[Tensor, "prompt d_model"], label: str) -> Float[Tensor, " prompt"]:
        """Log-odds of one class against all others: above 0 it is likelier than not."""
        if label not in self.classes:
            raise UserError(f"there is no class {label!r}; there are {', '.join(self.classes)}")
        logits, own = self.logits(values), self.classes.index(label)
        others = [k for k in range(len(self.classes)) if k != own]
        return logits[:, own] - logits[:, others].logsumexp(dim=1)


def fit_grassmann(
    values: Float[Tensor, "prompt d_model"], labels: Sequence[str], *, k: int, steps: int = STEPS
) -> GrassmannClasses:
    """Subspaces of `k` dimensions: the leading singular vectors of each class, then Riemannian gradient descent.

    Steps go along geodesics of the Grassmann manifold, down the cross-entropy in which all classes weigh alike. Nothing
    here is random. With `steps=0` they stay at the singular vectors.

    >>> import torch
    >>> values = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    >>> values[:20, 0] += 5
    >>> found = ml.fit_grassmann(values, ["a"] * 20 + ["b"] * 20, k=1, steps=20)
    >>> found.bases.shape, found.predict(values)[:2], found.predict(values)[-2:]
    (torch.Size([2, 7, 1]), ('a', 'a'), ('b', 'b'))
    """
    of = class_numbers(values, labels)
    fewest = min(int(torch.bincount(of).min()), values.shape[1] + 1)
    if not 1 <= k <= fewest:
        raise UserError(f"subspaces of {k} dimensions were asked for; the prompts and dimensions allow 1 to {fewest}")
    exact = values.detach().cpu().double()
    centre = exact.mean(dim=0)
    scale = float((exact - centre).square().sum(dim=1).mean().sqrt())
    if scale == 0:
        raise UserError("all vectors are the same, so no class has a subspace; take another level, position or site")
    lifted, classes = _lifted(exact, centre, scale), tuple(dict.fromkeys(labels))
    # No gradient leaves the span of the vectors: of more dimensions than prompts these coordinates are all.
    axes = torch.linalg.qr(lifted.T).Q
    inside = lifted @ axes
    starts = [torch.linalg.svd(inside[of == c], full_matrices=False).Vh[:k].T for c in range(len(classes))]
    bases, losses = _descend(torch.stack(starts), inside, of, steps)
    return GrassmannClasses(classes, axes @ bases, centre, scale, losses)


def subspace_logits(
    bases: Float[Tensor, "class axis k"],
    values: Float[Tensor, "prompt d_model"],
    centre: Float[Tensor, " d_model"],
    scale: float,
) -> Float[Tensor, "prompt class"]:
    """Gamma times the length of every vector's projection on every subspace, about `centre` in units of `scale`."""
    lengths: Tensor = (_lifted(values, centre, scale) @ bases).norm(dim=2)
    return GAMMA * lengths.T


def _lifted(values: Tensor, centre: Tensor, scale: float) -> Float[Tensor, "prompt axis"]:
    """Unit vectors: about the centre in units of `scale`, with one more axis on which all are 1."""
    centred = (values.detach().cpu().double() - centre) / scale
    ones = torch.ones(len(centred), 1, dtype=torch.float64)
    return torch.nn.functional.normalize(torch.cat([centred, ones], dim=1), dim=1)


def _descend(
    bases: Float[Tensor, "class axis k"], units: Float[Tensor, "prompt axis"], of: Int[Tensor, " prompt"], steps: int
) -> tuple[Float[Tensor, "class axis k"], tuple[float, ...]]:
    weights = (1 / torch.bincount(of).double())[of] / len(bases)
    truth = torch.nn.functional.one_hot(of, len(bases)).double()
    losses = []
    for step in range(steps + 1):
        along = units @ bases
        lengths = along.norm(dim=2).clamp_min(1e-12)
        chances = (GAMMA * lengths.T).log_softmax(dim=1)
        losses.append(float(-(weights @ (chances * truth).sum(dim=1))))
        if step < steps:
            pull = (weights[:, None] * (chances.exp() - truth)).T * GAMMA / lengths
            bases = geodesic(bases, -RATE * units.T @ (pull[:, :, None] * along))
            if step % ORTHONORMALISE_EVERY == ORTHONORMALISE_EVERY - 1:
                bases = torch.linalg.qr(bases).Q
    return bases, tuple(losses)


def geodesic(
    bases: Float[Tensor, "class axis k"], towards: Float[Tensor, "class axis k"]
) -> Float[Tensor, "class axis k"]:
    """Where the shortest way leads that starts in the direction of `towards`, as far as its tangent part is long."""
    tangent = towards - bases @ (bases.mT @ towards)
    left, angles, right = torch.linalg.svd(tangent, full_matrices=False)
    moved: Tensor = (bases @ right.mT * angles.cos()[:, None] + left * angles.sin()[:, None]) @ right
    return moved
