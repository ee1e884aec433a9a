"""Tokens drawn from what the model finds likely: the same ones for a seed, however prompts are batched and ordered.

A token is the one that a number from 0 to 1 falls on, and the number is a hash of the seed, the row's stream and the
place in the answer. No generator has a state, so rows, devices and versions of PyTorch can't shift each other's draws.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from mechlens.errors import UserError, kind_of, quoted
from mechlens.prompts.batch import TokenBatch
from mechlens.prompts.prompt import Prompt


def require_length(max_new_tokens: object) -> None:
    """UserError for a length of answers that isn't a whole number from 1."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, Integral):
        said = f"{quoted(max_new_tokens, 40)} ({kind_of(max_new_tokens)}); give a whole number, such as 64"
        raise UserError(f"max_new_tokens is {said}")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; ask for at least one token")


@dataclass(frozen=True)
class Draws:
    """How answers are drawn: `n` of each prompt, of the distribution that transformers' own sampling has."""

    temperature: float
    top_p: float
    n: int
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; give 0 for greedy answers, or a number above it")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; give a share of the probability above 0 and at most 1")
        if self.n < 1:
            raise UserError(f"n is {self.n}; ask for at least one answer to each prompt")
        if self.temperature == 0 and (self.n > 1 or self.top_p < 1):
            given = f"n={self.n}" if self.n > 1 else f"top_p={self.top_p}"
            raise UserError(
                f"{given} says how answers are drawn, and without a temperature they are greedy, all the same; give "
                "one, such as temperature=0.7"
            )

    @property
    def greedy(self) -> bool:
        """True where the likeliest token is taken."""
        return self.temperature == 0

    @property
    def described(self) -> str:
        """In words; empty for greedy answers."""
        return "" if self.greedy else f"temperature {self.temperature:g}, top-p {self.top_p:g}, seed {self.seed}"

    def pick(self, streams: Sequence[str]) -> "Drawn | None":
        """What draws the tokens of a batch's rows; None for greedy answers."""
        return None if self.greedy else Drawn(self, streams)

    @property
    def key(self) -> str:
        """What a cache knows them by, beside the streams."""
        return f"{self.temperature} {self.top_p} {self.seed}"

    def probabilities(self, logits: Float[Tensor, "row vocab"]) -> Float64[Tensor, "row vocab"]:
        """What tokens are drawn with: transformers' temperature, then its top-p."""
        if logits.device.type == "mps":
            logits = logits.cpu()  # which has float64
        # Without their largest, logits can be divided by any temperature and stay finite numbers or -inf.
        scores = logits.double()
        scores = scores - scores.max(dim=-1, keepdim=True).values
        unused = torch.empty(0, dtype=torch.long)
        scores = TemperatureLogitsWarper(float(self.temperature))(unused, scores)
        if self.top_p < 1:
            scores = TopPLogitsWarper(float(self.top_p))(unused, scores)
        chances: Tensor = scores.softmax(dim=-1)
        return chances


@dataclass(frozen=True)
class Drawn:
    """Draws for the rows of a batch, each from its own stream of numbers."""

    draws: Draws
    streams: Sequence[str]
    """Of each row: equal streams draw alike."""

    def __call__(self, logits: Float[Tensor, "row vocab"], rows: Sequence[int], place: int) -> Int[Tensor, " row"]:
        """A token for each of these rows, at this place of its answer."""
        chances = self.draws.probabilities(logits)
        at = [_number(f"{self.draws.seed} {self.streams[row]} {place}") for row in rows]
        reached = chances.cumsum(dim=-1)
        # Of the whole, which rounding leaves a little beside 1: the last token with a chance is never passed.
        wanted = torch.tensor(at, dtype=torch.float64, device=reached.device) * reached[:, -1]
        return torch.searchsorted(reached, wanted.unsqueeze(1), right=True).squeeze(1).to(logits.device)


def _number(text: str) -> float:
    """At least 0 and below 1, and the same for the same text everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def streams_of(batch: TokenBatch, draws: Draws) -> list[str]:
    """A stream for each draw of each prompt: of its tokens, so that order and ids don't matter.

    Prompts of the same tokens and other names draw apart; the same prompt under several interventions draws alike.
    """
    if draws.greedy:
        return [""] * len(batch.prompts)
    known: dict[str, dict[str, int]] = {}
    found = []
    for i, prompt in enumerate(batch.prompts):
        digest = hashlib.sha256(str(batch.row(i)).encode()).hexdigest()
        alike = known.setdefault(digest, {})
        number = alike.setdefault(prompt.id, len(alike))
        found += [f"{digest} {number} {k}" for k in range(draws.n)]
    return found


def drawn_batch(batch: TokenBatch, n: int) -> TokenBatch:
    """Every prompt `n` times over, called ID#0, ID#1, ...; one family, which no split separates."""
    if n == 1:
        return batch
    rows = [i for i in range(len(batch.prompts)) for _ in range(n)]
    named = drawn_prompts(batch.prompts, n)
    return replace(batch.select(rows), prompts=tuple(named))


def drawn_prompts(prompts: Sequence[Prompt], n: int) -> list[Prompt]:
    """Every prompt `n` times over, called ID#0, ID#1, ..."""
    return [replace(prompt, id=f"{prompt.id}#{k}", family=prompt.group) for prompt in prompts for k in range(n)]
