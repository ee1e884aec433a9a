"""Whether two models hold the same prompts in the same places, the same shape turned, or another shape."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.geometry.similarity.cka import unbiased_cka
from mechlens.methods.geometry.similarity.similarity import require_same_prompts
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import family_codes, jackknife_variance, one_thread

PARTS = 20
"""Groups of families that are left out in turn; fewer where there are fewer families."""
STUDENT = 2.09
"""Quantile of Student's t for 19 degrees of freedom."""


@dataclass(frozen=True)
class RepresentationChange:
    """How two representations of the same prompts lie to each other; see `representation_change`.

    >>> import torch
    >>> values = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    >>> turned = values @ torch.linalg.qr(values[:5]).Q
    >>> found = ml.representation_change(values, turned, [str(i) for i in range(60)])
    >>> round(found.shape.value, 3), found.in_place.value < 0.5
    (1.0, True)
    """

    in_place: Estimate
    """Cosine of the two matrices, each about its mean: 1 where every prompt is where it was; missing where the two have
    other dimensions."""
    shape: Estimate
    """Unbiased CKA, which no rotation and no scale changes."""
    words: Estimate
    """Unbiased CKA of the first with vectors of the words alone; missing where none were given."""
    beyond_words: Estimate
    """`shape` minus `words`."""


@one_thread()
def representation_change(
    first: Float[Tensor, "prompt d_first"],
    second: Float[Tensor, "other d_second"],
    families: Sequence[str],
    words: Float[Tensor, "third d_words"] | None = None,
) -> RepresentationChange:
    """Alike in one basis and up to a rotation, with intervals that leave groups of families out in turn.

    A bootstrap would hold prompts twice, which are near to themselves. `words` are vectors of the same prompts, such as
    mean token embeddings: any two models share what these say.

    >>> import torch
    >>> values = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    >>> turned = values @ torch.linalg.qr(values[:5]).Q
    >>> found = ml.representation_change(values, turned, [str(i) for i in range(60)])
    >>> round(found.shape.value, 3), found.in_place.value < 0.5
    (1.0, True)
    """
    require_same_prompts(first, second)
    missing = Estimate.missing(len(first))

    def estimate(measure: Callable[[Tensor], float]) -> Estimate:
        return jackknifed(measure, families)

    def shape(rows: Tensor) -> float:
        return unbiased_cka(first[rows], second[rows])

    def of_words(rows: Tensor) -> float:
        assert words is not None
        return unbiased_cka(first[rows], words[rows])

    given = words is not None
    return RepresentationChange(
        estimate(lambda rows: in_place(first[rows], second[rows])) if first.shape == second.shape else missing,
        estimate(shape),
        estimate(of_words) if given else missing,
        estimate(lambda rows: shape(rows) - of_words(rows)) if given else missing,
    )


def in_place(first: Float[Tensor, "prompt d_model"], second: Float[Tensor, "prompt d_model"]) -> float:
    """Cosine of two matrices, each about its mean; NaN where one is constant."""
    one, other = (side.double() - side.double().mean(dim=0) for side in (first, second))
    sizes = float(one.norm() * other.norm())
    return float((one * other).sum()) / sizes if sizes > 0 else math.nan


def jackknifed(measure: Callable[[Tensor], float], families: Sequence[str]) -> Estimate:
    """The measure of all rows, with the interval of what it is without each group of families."""
    codes, n = family_codes(families)
    parts = min(PARTS, n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    group = torch.empty(n, dtype=torch.long).index_copy_(0, order, torch.arange(n) % parts)[codes]
    value = measure(torch.arange(len(families)))
    without = torch.tensor([measure((group != part).nonzero()[:, 0]) for part in range(parts)], dtype=torch.float64)
    reach = STUDENT * math.sqrt(float(jackknife_variance(without)))
    return Estimate(value, value - reach, value + reach, len(families))
