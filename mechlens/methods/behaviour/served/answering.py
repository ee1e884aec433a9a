"""A study's plain answers: the loaded model's own, or, where a server is named, that server's to the same token ids."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mechlens.errors import UserError
from mechlens.methods.activations.collect import refuse_too_long
from mechlens.methods.activations.reading import FORMAT
from mechlens.methods.behaviour.answers import Answers, answer, until_decided
from mechlens.methods.behaviour.judges import OnceSettled
from mechlens.methods.behaviour.served.agreement import Served
from mechlens.methods.behaviour.served.completions import completed, endpoint_of
from mechlens.methods.behaviour.served.endpoint import Endpoint, Line
from mechlens.methods.behaviour.thought import answer_texts
from mechlens.methods.cache import Cache
from mechlens.methods.progress import phase
from mechlens.models.bridge import LanguageModel, embedding_rows, has_hooks, loaded
from mechlens.models.engine.forward import in_turn
from mechlens.models.engine.generate import stop_tokens
from mechlens.prompts.batch import TokenBatch
from mechlens.settings import ServedAnswering

COMPARED = 32
"""Answers that are compared with the loaded model's own before the others are asked for."""


def answers_to(
    model: LanguageModel,
    batch: TokenBatch,
    plan: ServedAnswering,
    *,
    decided: OnceSettled | None = None,
    cache: Cache | None = None,
) -> Answers:
    """Greedy answers to the batch, by whom the plan says; `cache` keeps each of them.

    UserError where a server's first answers, to prompts from all over the batch, are too seldom the loaded model's own.
    """
    endpoint = endpoint_of(plan)
    if endpoint is None:
        return answer(model, batch, max_new_tokens=plan.max_new_tokens, decided=decided, cache=cache)
    if has_hooks(model):
        raise UserError(
            "the model has hooks, and the one behind a server has none; take them off, or leave the server out"
        )
    refuse_too_long(model, batch, plan.max_new_tokens)
    n = len(batch.prompts)
    compared = [i * n // COMPARED for i in range(COMPARED)] if n > COMPARED else list(range(n))
    own = answer(model, batch.select(compared), max_new_tokens=plan.max_new_tokens, decided=decided, cache=cache)
    asking = _Asking(model, batch, plan.max_new_tokens, decided, cache)
    with phase("answering"), endpoint.opened() as line:
        first = asking.all_of(line, compared)
        same = tuple(first[i].tokens == tokens for i, tokens in zip(compared, own.tokens, strict=True))
        families = tuple(batch.prompts[i].group for i in compared)
        in_ids = all(one.in_ids for one in first.values())
        served = Served(endpoint.host, endpoint.model, same, families, in_ids)
        _require_agreement(served, endpoint, plan.least_agreement)
        rest = [i for own_batch in in_turn([[i] for i in range(n) if i not in first]) for i in own_batch]
        found = first | asking.all_of(line, rest)
    tokens = tuple(found[i].tokens for i in range(n))
    long = plan.max_new_tokens
    return replace(
        own,
        ids=tuple(prompt.id for prompt in batch.prompts),
        texts=answer_texts(loaded(model).tokenizer, batch, tokens),
        tokens=tokens,
        engine="served",
        why_plain="",
        cut=() if decided is None else tuple(len(one) < long and decided(list(one)) for one in tokens),
        served=replace(served, in_ids=all(one.in_ids for one in found.values())),
    )


def _require_agreement(served: Served, endpoint: Endpoint, least: float) -> None:
    if served.same and served.share < least:
        raise UserError(
            f"{sum(served.same)} of the first {len(served.same)} answers of {served.model!r} at {served.host} are the "
            f"loaded model's own, token for token: a share of {served.share:.2f}, where {least:g} is the least; serve "
            "the same weights in the same type, or take a lower --least-agreement"
        )


@dataclass(frozen=True)
class _Row:
    tokens: tuple[int, ...]
    in_ids: bool


@dataclass(frozen=True)
class _Asking:
    """Asks a server for answers to rows of a batch."""

    model: LanguageModel
    batch: TokenBatch
    max_new_tokens: int
    decided: OnceSettled | None
    cache: Cache | None

    def all_of(self, line: Line, rows: Sequence[int]) -> dict[int, _Row]:
        """What is said to each of the rows, ended where the loaded model's own answers end."""
        found = line.all_of(rows, lambda row: self._kept(line, row), "prompt")
        return {row: self._ended(one) for row, one in zip(rows, found, strict=True)}

    def _kept(self, line: Line, row: int) -> _Row:
        """The server's word, which is kept whole: what ends it sooner is ours."""
        prompt = list(self.batch.row(row))
        record = [FORMAT, "served answer", line.endpoint.url, line.endpoint.model, self.max_new_tokens, prompt]
        key = hashlib.sha256(json.dumps(record).encode()).hexdigest()
        piece = self.cache.get(key) if self.cache is not None else None
        if piece is None:
            said = completed(line, prompt, self.max_new_tokens)
            in_ids = said.tokens is not None
            tokens = said.tokens or () if in_ids else self._tokenised(said.text)
            piece = {"tokens": torch.tensor([int(in_ids), *tokens], dtype=torch.long)}
            if self.cache is not None:
                self.cache.put(key, piece)
        in_ids, *tokens = piece["tokens"].tolist()
        return _Row(tuple(tokens), bool(in_ids))

    def _tokenised(self, text: str) -> list[int]:
        found: list[int] = loaded(self.model).tokenizer.encode(text, add_special_tokens=False)
        return found

    def _ended(self, said: _Row) -> _Row:
        known = embedding_rows(self.model)
        if strange := [token for token in said.tokens if not 0 <= token < known]:
            raise UserError(
                f"the answering server wrote the token {strange[0]}, and the loaded model has {known}; serve the same "
                "model, with the same tokenizer"
            )
        stop = stop_tokens(self.model)
        end = next((i for i, token in enumerate(said.tokens) if token in stop), len(said.tokens))
        row = list(said.tokens[:end][: self.max_new_tokens])
        return replace(said, tokens=tuple(until_decided(row, self.decided)))
