"""What chance gives: prompts dealt out anew, so that nothing ties one to its own vector in another model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.errors import UserError


@dataclass(frozen=True)
class Measured:
    """A number beside what it is by chance.

    >>> import torch
    >>> values = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    >>> found = ml.similarity("cka", values, values @ torch.diag(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])), n=19, seed=0)
    >>> found.value > found.highest, found.p
    (True, 0.05)
    """

    value: float
    mean: float
    """Of the permutations; NaN where there was none."""
    highest: float
    p: float
    """(1 + permutations at least as large) / (1 + permutations): for a measure that is large where things agree."""
    n: int
    """Permutations."""

    def __str__(self) -> str:
        return f"{self.value:.3f} (chance {self.mean:.3f}, at most {self.highest:.3f}; p {self.p:.3g})"


def permutations(n_rows: int, n: int, seed: int, families: Sequence[str] | None = None) -> Int[Tensor, "draw row"]:
    """`n` orders of the rows; with `families` whole ones exchange places with others of their size.

    Inside a family the order is drawn too. A family whose size is unique only changes its inner order.
    """
    generator = torch.Generator().manual_seed(seed)
    if families is None:
        return torch.rand(n, n_rows, generator=generator).argsort(dim=1)
    if len(families) != n_rows:
        raise UserError(f"there are {n_rows} prompts and {len(families)} families; give one for each prompt")
    numbers = {family: number for number, family in enumerate(dict.fromkeys(families))}
    codes = torch.tensor([numbers[family] for family in families])
    rows = [torch.nonzero(codes == number).flatten() for number in range(len(numbers))]
    orders = torch.arange(n_rows).repeat(n, 1)
    for size in sorted({len(row) for row in rows}):
        alike = torch.stack([row for row in rows if len(row) == size])
        outer = torch.rand(n, len(alike), generator=generator).argsort(dim=1)
        inner = torch.rand(n, *alike.shape, generator=generator).argsort(dim=2)
        orders[:, alike.flatten()] = alike[outer].gather(2, inner).flatten(1)
    return orders


def beside_chance(value: float, by_order: Callable[[Tensor], float], orders: Int[Tensor, "draw row"]) -> Measured:
    """The number, and what it is for every order of the rows."""
    if not len(orders):
        return Measured(value, float("nan"), float("nan"), float("nan"), 0)
    drawn = torch.tensor([by_order(order) for order in orders], dtype=torch.float64)
    # The tolerance keeps an equal number, summed in another order, from counting as smaller.
    as_large = int((drawn >= value - 1e-9).sum())
    return Measured(value, float(drawn.mean()), float(drawn.max()), (1 + as_large) / (1 + len(orders)), len(orders))
