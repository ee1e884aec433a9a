"""The Bigram-Backcopy task of Guo et al. 2024: letters that follow a bigram table, and triggers that repeat.

A sequence starts with a token of its own. After a trigger comes the letter before the trigger, after any other letter
what the table of bigrams draws. So a head that copies has nothing to do at most places, and the least loss that any
model can have is known at every place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.errors import UserError, kind_of, many
from mechlens.prompts.builtin import builtin_prompts
from mechlens.registry import whole_numbers

START = 0
"""The token that every sequence starts with."""


class Sequences(NamedTuple):
    """Drawn sequences, and what is known of them."""

    tokens: Int[Tensor, "sequence place"]
    trigger: Bool[Tensor, "sequence place"]
    """Where a trigger stands, after which the next token is certain."""
    oracle: Float[Tensor, "sequence place"]
    """Entropy of what comes next: the least loss there, 0 after triggers."""


@dataclass(frozen=True, repr=False)
class BackcopyTask:
    """Letters, the table that draws them, and those that are triggers.

    >>> task = ml.backcopy_task("abracadabra abracadabra", triggers=1)
    >>> task.letters[task.triggers[0] - 1]
    'a'
    >>> drawn = task.draw(2, 12, seed=0)
    >>> at = drawn.trigger[:, 1:-1]
    >>> bool((drawn.tokens[:, 2:][at] == drawn.tokens[:, :-2][at]).all())
    True
    """

    letters: str
    """Letter k has the token k + 1."""
    triggers: tuple[int, ...]
    """Tokens, the most frequent first."""
    marginal: Float[Tensor, " token"] = field(repr=False)
    """Of the first letter: no trigger."""
    bigram: Float[Tensor, "token after"] = field(repr=False)
    """What follows a token that is no trigger."""

    @property
    def n_tokens(self) -> int:
        """The letters and the start."""
        return len(self.letters) + 1

    def draw(self, n: int, length: int, seed: int) -> Sequences:
        """`n` sequences of `length` tokens, the start among them."""
        for name, given in (("n", n), ("length", length)):
            if whole_numbers(name, [given], "count")[0] < 1:
                raise UserError(f"{name} is {given}; draw at least 1 sequence of at least 1 token")
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.full((n, length), START)
        below = self._next.cumsum(dim=1)
        chance = torch.rand(length, n, 1, generator=generator, dtype=torch.float64)
        for at in range(1, length):
            now = tokens[:, at - 1]
            drawn = torch.searchsorted(below[now], chance[at]).squeeze(1).clamp(max=self.n_tokens - 1)
            tokens[:, at] = torch.where(self._is_trigger[now], tokens[:, at - 2], drawn) if at > 1 else drawn
        trigger = self._is_trigger[tokens]
        entropy = torch.special.entr(self._next).sum(dim=1)[tokens]
        return Sequences(tokens, trigger, torch.where(trigger, 0.0, entropy).float())

    @property
    def _next(self) -> Float[Tensor, "token after"]:
        table = self.bigram.clone()
        table[START] = self.marginal
        return table

    @property
    def _is_trigger(self) -> Bool[Tensor, " token"]:
        flags = torch.zeros(self.n_tokens, dtype=torch.bool)
        flags[list(self.triggers)] = True
        return flags

    def __repr__(self) -> str:
        named = ", ".join(repr(self.letters[one - 1]) for one in self.triggers)
        return f"BackcopyTask({len(self.letters)} letters; triggers {named})"


def backcopy_task(text: str | None = None, *, triggers: int = 3) -> BackcopyTask:
    """The task with the bigrams of a text's letters, by default of the built-in harmless prompts.

    The authors take tiny Shakespeare's. UserError where so many triggers leave no letter to copy.

    >>> ml.backcopy_task()
    BackcopyTask(27 letters; triggers ' ', 'e', 'a')
    """
    if text is not None and not isinstance(text, str):
        raise UserError(f"text is {kind_of(text)}; give one text, whose letters are counted")
    whole_numbers("triggers", [triggers], "count")
    if text is None:
        text = " ".join(_plain(prompt.text) for prompt in builtin_prompts("benign"))
    letters = "".join(sorted(set(text)))
    if len(letters) < 3:
        raise UserError(
            f"the text has {many(len(letters), 'letter')}, and 3 are needed: a trigger and two to tell apart"
        )
    if not 0 < triggers < len(letters) - 1:
        raise UserError(
            f"{triggers} of the text's {len(letters)} letters can't be triggers; choose 1 to {len(letters) - 2}"
        )
    tokens = torch.tensor([letters.index(one) + 1 for one in text])
    size = len(letters) + 1
    counts = torch.bincount(tokens, minlength=size).double()
    most = tuple(counts.argsort(descending=True, stable=True)[:triggers].tolist())
    first = counts.clone()
    first[list(most)] = 0
    pairs = torch.bincount(tokens[:-1] * size + tokens[1:], minlength=size * size).view(size, size).double()
    pairs[:, 1:] += _SMOOTHING
    pairs[:, START] = 0
    return BackcopyTask(letters, most, first / first.sum(), pairs / pairs.sum(dim=1, keepdim=True))


_SMOOTHING = 0.01
"""Added to every count of two letters, so that each letter has something after it."""


def _plain(text: str) -> str:
    kept: Sequence[str] = [one for one in text.lower() if one.isascii() and (one.isalpha() or one == " ")]
    return "".join(kept)
