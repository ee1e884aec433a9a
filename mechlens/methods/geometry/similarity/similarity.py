"""Two representations of the same prompts compared, beside what permuted prompts give."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.geometry.permuted import Measured, beside_chance, permutations
from mechlens.methods.geometry.similarity.cka import unbiased_cka
from mechlens.methods.geometry.similarity.neighbours import mutual_neighbours
from mechlens.methods.geometry.similarity.procrustes import procrustes
from mechlens.methods.geometry.similarity.pwcca import pwcca
from mechlens.registry import unknown_name

SIMILARITIES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "cka": unbiased_cka,
    "pwcca": pwcca,
    "procrustes": procrustes,
    "neighbours": mutual_neighbours,
}
"""Each compares two representations, row by row, and doesn't change when one is rotated."""
FEWEST = 10
"""Prompts."""
MASSIVE = 10.0
"""A dimension is massive whose root mean square is more than this many times the median one's."""


def similarity(
    measure: str,
    first: Float[Tensor, "prompt d_first"],
    second: Float[Tensor, "other d_second"],
    *,
    n: int,
    seed: int,
    families: Sequence[str] | None = None,
) -> Measured:
    """One of "cka", "pwcca", "procrustes" or "neighbours", and its null: the prompts of `second` permuted `n` times.

    Rows are prompts, at a position that isn't the first token of all: there every prompt has the same vector. Take
    dimensions that dwarf all others out with `without_massive`, and give both numbers. With `families` only whole ones
    exchange places.

    >>> import torch
    >>> values = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    >>> found = ml.similarity("cka", values, values @ torch.diag(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])), n=19, seed=0)
    >>> found.value > found.highest, found.p
    (True, 0.05)
    """
    if measure not in SIMILARITIES:
        raise unknown_name("similarity", measure, tuple(SIMILARITIES))
    require_same_prompts(first, second)
    compare, (one, other) = SIMILARITIES[measure], (_scores(side) for side in (first, second))
    orders = permutations(len(one), n, seed, families)
    return beside_chance(compare(one, other), lambda order: compare(one, other[order]), orders)


def require_same_prompts(first: Tensor, second: Tensor) -> None:
    """UserError unless both have a finite row for each of enough prompts."""
    if len(first) != len(second):
        raise UserError(f"there are {len(first)} and {len(second)} prompts; read the same ones of both")
    if len(first) < FEWEST:
        raise UserError(f"{len(first)} prompts are too few to compare representations by; give at least {FEWEST}")
    if not all(bool(torch.isfinite(side).all()) for side in (first, second)):
        raise UserError(
            "some of the vectors are not finite; leave prompts without the position out, or read in float32"
        )


def _scores(values: Float[Tensor, "prompt d_model"]) -> Float[Tensor, "prompt axis"]:
    """The centred values in a basis of as few dimensions as there are prompts at most: every measure has the same."""
    exact = values.detach().cpu().double()
    centred = exact - exact.mean(dim=0)
    if centred.shape[1] <= len(centred):
        return centred
    factor: Tensor = torch.linalg.qr(centred.T).R.T
    return factor


def massive_columns(values: Float[Tensor, "prompt d_model"]) -> tuple[int, ...]:
    """Dimensions that dwarf the others (`MASSIVE`), as rogue dimensions and massive activations do.

    >>> import torch
    >>> values = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    >>> values[:, 3] += 100
    >>> ml.massive_columns(values), ml.without_massive(values, values).shape
    ((3,), torch.Size([60, 4]))
    """
    sizes = values.double().square().mean(dim=0).sqrt()
    return tuple(torch.nonzero(sizes > MASSIVE * sizes.median()).flatten().tolist())


def without_massive(
    values: Float[Tensor, "prompt d_model"], *of: Float[Tensor, "any d_model"]
) -> Float[Tensor, "prompt kept"]:
    """The values without the dimensions that are massive in any of `of`: of both models, where these share a basis.

    >>> import torch
    >>> values = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    >>> values[:, 3] += 100
    >>> ml.massive_columns(values), ml.without_massive(values, values).shape
    ((3,), torch.Size([60, 4]))
    """
    left_out = {column for one in of for column in massive_columns(one)}
    return values[:, [column for column in range(values.shape[1]) if column not in left_out]]
