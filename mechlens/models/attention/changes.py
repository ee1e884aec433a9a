"""What can be done to a layer's attention during a pass: its pattern changed, or tokens hidden from all later ones."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.errors import UserError, many

Pattern = Float[Tensor, "head query key"]
PatternChange = Callable[[int, Pattern, Bool[Tensor, "query key"]], Pattern]
"""A layer, its pattern and what each query can see -> the pattern to take in its place."""


@dataclass(frozen=True)
class Hidden:
    """No later token sees these, as if they were masked."""

    places: tuple[int, ...]

    def over(self, logits: Pattern) -> Pattern:
        """The logits with minus infinity where a later query would see one of them.

        Before the softmax: a token that took nearly all leaves to the others what float32 can't tell from nothing.
        """
        n = logits.shape[-1]
        require_places(self.places, n)
        hidden = torch.zeros(n, n, dtype=torch.bool, device=logits.device)
        for place in self.places:
            hidden[place + 1 :, place] = True
        return logits.masked_fill(hidden, -torch.inf)


Change = PatternChange | Hidden


def require_places(places: Collection[int], n: int) -> None:
    """UserError for tokens that a text of `n` has not."""
    wrong = [place for place in places if not 0 <= place < n]
    if wrong:
        raise UserError(f"there is no token {wrong[0]} in a text of {many(n, 'token')}; choose from 0 to {n - 1}")
