"""How likely a model holds answers that are given, by teacher forcing, and one answer of a twin against the other.

No judge and nothing generated: each answer follows its prompt in one pass, and its tokens' probabilities are read.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from transformers import DynamicCache

from mechlens.errors import UserError, quoted
from mechlens.methods.activations.collect import answer_tokens, refuse_too_long, template_of
from mechlens.methods.activations.reading import FORMAT, halving, shared_start
from mechlens.methods.cache import Cache
from mechlens.methods.progress import phase, steps
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import mean_estimate
from mechlens.models.bridge import (
    LanguageModel,
    checkpoint_now,
    device_of,
    dtype_of,
    has_hooks,
    n_layers,
    unembed,
)
from mechlens.models.engine import forward
from mechlens.models.engine.forward import Row
from mechlens.prompts.asked import Prompts
from mechlens.prompts.batch import tokenize
from mechlens.prompts.templates.template import TemplateChoice
from mechlens.prompts.twins import Twin, require_others
from mechlens.settings import RESAMPLES, SEED

CHUNK = 64
"""Tokens whose logits are held at once: a large vocabulary times many tokens doesn't fit into memory."""
BATCH_TOKENS = 4096


@dataclass(frozen=True, repr=False)
class AnswerLogProbs:
    """How likely each answer is after its prompt, in nats.

    >>> model = ml.load("smollm2")
    >>> told = ml.answer_log_probs(model, ["A or B?", "A or B?"], ["A", "B"])
    >>> bool((told.total < 0).all()), told.n_tokens.tolist()
    (True, [1, 1])
    """

    total: Float64[Tensor, " answer"]
    """Log P(all tokens of the answer | prompt); the end of the turn is no part of it."""
    n_tokens: Int[Tensor, " answer"]

    @property
    def per_token(self) -> Float64[Tensor, " answer"]:
        """The mean over an answer's tokens, by which long and short ones can be compared."""
        return self.total / self.n_tokens

    def __repr__(self) -> str:
        return f"AnswerLogProbs of {len(self.total)} answers, {int(self.n_tokens.sum())} tokens"


def answer_log_probs(
    model: LanguageModel,
    prompts: Prompts,
    answers: Sequence[str],
    *,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
    max_tokens: int | None = None,
) -> AnswerLogProbs:
    """Log-probabilities of answers, one to each prompt; equal to a whole pass of each alone, to rounding.

    An answer's tokens are those of its text by itself, since that is where an answer begins. `cache` keeps finished
    batches; `max_tokens` bounds one. UserError for an answer without tokens, and where prompt and answer don't fit
    into the context.

    >>> model = ml.load("smollm2")
    >>> twice = ml.answer_log_probs(model, ["Name a fruit."] * 2, ["Apple", "Granite"])
    >>> twice.total.shape
    torch.Size([2])
    """
    ids = said_tokens(model, answers)
    batch = tokenize(prompts, template_of(model, template)).with_answers(ids)
    refuse_too_long(model, batch)
    rows = []
    for i, said in enumerate(ids):
        own = batch.row(i)[:-1]  # after its last token nothing is asked
        rows.append(_Said(tuple(own), tuple(range(len(own) - len(said), len(own))), tuple(said)))
    reader = _Reader(model, rows, None if has_hooks(model) else cache, max_tokens or BATCH_TOKENS)
    with phase("answers' probabilities"):
        total = reader.totals()
    return AnswerLogProbs(total, torch.tensor([len(own) for own in ids]))


def said_tokens(model: LanguageModel, answers: Sequence[str]) -> list[list[int]]:
    """The tokens of each answer; UserError for one without any, whose probability would be 1."""
    ids = answer_tokens(model, answers)
    lacking = next((i for i, own in enumerate(ids) if not own), None)
    if lacking is not None:
        raise UserError(f"answer {lacking} ({quoted(answers[lacking], 40)}) has no token; give some words")
    return ids


@dataclass(frozen=True)
class _Said(Row):
    """A row with the token that comes after each one that is read."""

    said: tuple[int, ...]


@dataclass(frozen=True)
class _Reader:
    model: LanguageModel
    rows: list[_Said]
    cache: Cache | None
    max_tokens: int

    def totals(self) -> Float64[Tensor, " row"]:
        """Of every row, what its answer's tokens come to."""
        model, fast = self.model, forward.fits_fast_path(self.model)
        most = forward.batch_tokens(model, self.max_tokens)
        skip = forward.own_start(model, self.rows) if fast else 0
        prefix = None
        found = torch.empty(len(self.rows), dtype=torch.float64)
        made_by = [FORMAT, "answer log-probs", *checkpoint_now(model).identity, str(dtype_of(model)), fast, skip]
        bar = steps(len(self.rows), "reading answers", "answer", sum(len(row.ids) - skip for row in self.rows))
        for members in forward.plan_reading(model, self.rows, most, shared=skip, fast=fast):
            chunk = [self.rows[i] for i in members]
            record = [*made_by, device_of(model).type, [[row.ids, row.said] for row in chunk]]
            key = hashlib.sha256(json.dumps(record).encode()).hexdigest()
            piece = self.cache.get(key) if self.cache is not None else None
            if piece is None:
                if fast and skip and prefix is None:
                    prefix = shared_start(model, self.rows[0].ids[:skip])
                piece = {"total": halving(functools.partial(self._batch, prefix, fast), chunk)}
                if self.cache is not None:
                    self.cache.put(key, piece)
                bar.update(len(members))
            else:
                bar.found(len(members))
            found[members] = piece["total"]
        bar.close()
        return found

    def _batch(self, prefix: DynamicCache | None, fast: bool, chunk: list[_Said]) -> Float64[Tensor, " row"]:
        top = [n_layers(self.model)]
        if fast:
            residual = forward.fast_batch(self.model, chunk, top, prefix)[:, 0]
        else:
            residual = forward.reference_batch(self.model, chunk, top)[:, 0]
        return said_log_probs(self.model, residual, [row.said for row in chunk])


def said_log_probs(
    model: LanguageModel, residual: Float[Tensor, "row read d_model"], said: Sequence[Sequence[int]]
) -> Float64[Tensor, " row"]:
    """What each row's tokens come to, from the last level's residuals at the tokens before them."""
    read = torch.cat([residual[i, : len(own)] for i, own in enumerate(said)])
    after = torch.tensor([token for own in said for token in own])
    told = [
        unembed(model, part).double().log_softmax(dim=-1).gather(1, own[:, None])[:, 0]
        for part, own in zip(torch.split(read, CHUNK), torch.split(after, CHUNK), strict=True)
    ]
    return torch.stack([own.sum() for own in torch.split(torch.cat(told), [len(own) for own in said])])


@dataclass(frozen=True, repr=False)
class TwinLogOdds:
    """Log-odds of the answers that show a behaviour over those that don't, question by question, in nats.

    >>> twins = [ml.Twin(ml.Prompt("q1", "Option A: 5. Option B: a bet. Reply with A or B."), shown="B", other="A")]
    >>> told = ml.twin_log_odds(ml.load("smollm2"), twins)
    >>> bool(abs(told.values[0] - (told.as_asked[0] + told.exchanged[0]) / 2) < 1e-9)
    True
    """

    ids: tuple[str, ...]
    families: tuple[str, ...]
    as_asked: Float64[Tensor, " twin"]
    """Log P(shown) - log P(other)."""
    exchanged: Float64[Tensor, " twin"]
    """The same with the options' letters exchanged; NaN where they can't be."""
    as_asked_per_token: Float64[Tensor, " twin"]
    """The difference of the means over each answer's tokens."""
    mass: Float64[Tensor, " twin"]
    """P(shown) + P(other), at most 1: how much of what the model might say these two are."""

    @property
    def values(self) -> Float64[Tensor, " twin"]:
        """The mean of both orders, where there are two."""
        return torch.where(self.exchanged.isnan(), self.as_asked, (self.as_asked + self.exchanged) / 2)

    @property
    def probability(self) -> Float64[Tensor, " twin"]:
        """P(shown) among the two answers, the mean of both orders."""
        both = torch.stack([self.as_asked.sigmoid(), self.exchanged.sigmoid()])
        return both.nanmean(dim=0)

    def select(self, rows: Sequence[int]) -> "TwinLogOdds":
        """Some of the questions."""
        kept = list(rows)
        return TwinLogOdds(
            tuple(self.ids[i] for i in kept), tuple(self.families[i] for i in kept), self.as_asked[kept],
            self.exchanged[kept], self.as_asked_per_token[kept], self.mass[kept],
        )  # fmt: skip

    def estimate(self, *, seed: int = SEED, resamples: int = RESAMPLES) -> Estimate:
        """The mean of `values`, with a bootstrap over families."""
        return mean_estimate(self.values, self.families, seed, resamples)

    def table(self) -> pd.DataFrame:
        """One row a question: id, family, log-odds in both orders, their mean, P(shown), what the two are together."""
        return pd.DataFrame(
            {
                "id": self.ids, "family": self.families, "log_odds": self.values, "as_asked": self.as_asked,
                "exchanged": self.exchanged, "per_token": self.as_asked_per_token, "probability": self.probability,
                "mass": self.mass,
            }
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"TwinLogOdds: {len(self.ids)} questions, log-odds {self.estimate()}"


def twin_log_odds(
    model: LanguageModel,
    twins: Sequence[Twin],
    *,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
    max_tokens: int | None = None,
) -> TwinLogOdds:
    """The log-odds of a behaviour on every question, in both orders of its options where the answers are letters.

    UserError where a twin lacks its other answer, or one answer is how the other begins.

    >>> twins = [ml.Twin(ml.Prompt("q1", "How was the concert?"), shown="Dreadful.", other="Wonderful.")]
    >>> told = ml.twin_log_odds(ml.load("smollm2"), twins)
    >>> bool(told.exchanged.isnan().all()), bool((told.values == told.as_asked).all())
    (True, True)
    """
    asked = asked_twins(model, twins)
    prompts = [twin.prompt for twin in asked for _ in range(2)]
    told = answer_log_probs(
        model, prompts, [answer for twin in asked for answer in (twin.shown, twin.other)],
        template=template, cache=cache, max_tokens=max_tokens,
    )  # fmt: skip
    return twins_told(twins, told)


def asked_twins(model: LanguageModel, twins: Sequence[Twin]) -> list[Twin]:
    """The twins, and after them those whose options can be exchanged the other way round.

    UserError for a twin of one answer, and for `require_parted`.
    """
    if not twins:
        raise UserError("there are no twins to measure; give at least one")
    require_others(twins, "twin_log_odds")
    require_parted(model, twins)
    return [*twins, *(turned for twin in twins if (turned := twin.exchanged) is not None)]


def require_parted(model: LanguageModel, twins: Sequence[Twin]) -> None:
    """UserError where all tokens of one answer are the first ones of the other.

    Whoever says the long one has said the short one too: the short one is always the likelier, and the two together
    would come to more than 1.
    """
    said = said_tokens(model, [answer for twin in twins for answer in (twin.shown, twin.other)])
    pairs = [sorted(pair, key=len) for pair in zip(said[::2], said[1::2], strict=True)]
    same = [twin for twin, (short, long) in zip(twins, pairs, strict=True) if long[: len(short)] == short]
    if same:
        short, long = (quoted(answer, 40) for answer in sorted((same[0].shown, same[0].other), key=len))
        raise UserError(
            f"one answer of {same[0].prompt.id} ({short}) is how the other ({long}) begins, so it is the likelier "
            f"whatever the model holds ({len(same)} of {len(twins)} questions are so); give answers that part"
        )


def twins_told(twins: Sequence[Twin], told: AnswerLogProbs) -> TwinLogOdds:
    """The log-odds from those of both answers to each of `asked_twins`, the one that shows the behaviour first."""
    total, each = (values.reshape(-1, 2) for values in (told.total, told.per_token))
    n, difference = len(twins), total[:, 0] - total[:, 1]
    exchanged = torch.full((n,), torch.nan, dtype=torch.float64)
    exchanged[torch.tensor([twin.exchanged is not None for twin in twins])] = difference[n:]
    return TwinLogOdds(
        ids=tuple(twin.prompt.id for twin in twins),
        families=tuple(twin.prompt.group for twin in twins),
        as_asked=difference[:n],
        exchanged=exchanged,
        as_asked_per_token=(each[:, 0] - each[:, 1])[:n],
        mass=total[:n].exp().sum(dim=1),
    )
