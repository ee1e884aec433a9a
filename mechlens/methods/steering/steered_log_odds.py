"""Log-odds of twins under interventions: many conditions in one go, what they have in common run once."""

import hashlib
import json
from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor
from transformers import DynamicCache

from mechlens.errors import UserError
from mechlens.methods.activations.collect import template_of
from mechlens.methods.behaviour.log_odds import (
    AnswerLogProbs,
    TwinLogOdds,
    asked_twins,
    said_log_probs,
    said_tokens,
    twins_told,
)
from mechlens.methods.cache import Cache
from mechlens.methods.progress import phase
from mechlens.methods.steering.fits import acts_of
from mechlens.methods.steering.interventions import ALL, Intervention
from mechlens.methods.steering.steered_batch import Engine, steered_batch
from mechlens.methods.steering.steering import MAX_TOKENS
from mechlens.models.bridge import LanguageModel, n_layers
from mechlens.models.engine import forward
from mechlens.models.engine.forward import Row
from mechlens.models.engine.generate import steered_residuals
from mechlens.models.engine.intervene.token_mask import TokenMask
from mechlens.models.engine.shared_rows import SharedRows
from mechlens.prompts.batch import tokenize
from mechlens.prompts.templates.template import TemplateChoice
from mechlens.prompts.twins import Twin


def steered_log_odds(
    model: LanguageModel,
    twins: Sequence[Twin],
    conditions: Sequence[Sequence[Intervention]],
    *,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
    force: bool = False,
    max_tokens: int = MAX_TOKENS,
) -> list[TwinLogOdds]:
    """`twin_log_odds` under each list of interventions; an empty list is the model as it is.

    Interventions act on every token, those of the answers too, or on named tokens of the prompt. Equal to
    `twin_log_odds` inside `applied`, to rounding, and faster: a question is run once for both of its answers, and
    blocks below an intervention once for all.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> direction = ml.mean_difference(ml.collect(model, prompts), "harmful", "harmless", level=2, position="last")
    >>> push = ml.Add(direction, strength=0.0, unit="raw", layers=(2,))
    >>> twins = [ml.Twin(ml.Prompt("q1", "How was the concert?"), shown="Dreadful.", other="Wonderful.")]
    >>> plain, pushed = ml.steered_log_odds(model, twins, [[], [push]])
    >>> bool(plain.values[0] == pushed.values[0])  # of strength 0
    True
    """
    acts = [act for own in conditions for one in own for act in acts_of(one)]
    if any((act.positions == ALL) != (act.phase == "both") for act in acts):
        raise UserError(
            "log-odds are read under interventions on every token (positions='all', phase='both') or on named tokens "
            "of the prompt (phase='prompt'); give one of the two"
        )
    asked = asked_twins(model, twins)
    said = said_tokens(model, [answer for twin in asked for answer in (twin.shown, twin.other)])
    # After an answer's last token nothing is asked, so it isn't run.
    batch = tokenize([twin.prompt for twin in asked for _ in range(2)], template_of(model, template))
    batch = batch.with_answers([own[:-1] for own in said])
    n = len(said)
    rows = batch.select([i for _ in conditions for i in range(n)])
    each = [list(own) for own in conditions for _ in range(n)]
    steered = steered_batch(model, rows, each, "tokenizer", force, 0)
    reading = _Reading(model, [said[i % n] for i in range(len(each))])
    work = Engine(reading.fast, reading.plain, lambda values, rows: values, "answer log-probs", reading.keys)
    with phase("answers under interventions"):
        total = steered.run(work, forward.batch_tokens(model, max_tokens), cache)
    n_tokens = torch.tensor([len(own) for own in said])
    return [twins_told(twins, AnswerLogProbs(own, n_tokens)) for own in total.reshape(len(conditions), n)]


class _Reading:
    """How the rows of a steered batch are read: the probabilities of what each is to say."""

    def __init__(self, model: LanguageModel, said: Sequence[Sequence[int]]) -> None:
        self.model, self.said = model, said
        self.keys = [hashlib.sha256(json.dumps(list(own)).encode()).hexdigest() for own in said]

    def fast(
        self, rows: list[Row], prefix: DynamicCache | None, token_mask: TokenMask, shared_rows: SharedRows
    ) -> Float64[Tensor, " row"]:
        said = self._of(rows)
        read = forward.read_places(_placed(rows, said))
        residual = steered_residuals(self.model, rows, read, prefix, token_mask, shared_rows)
        return said_log_probs(self.model, residual, said)

    def plain(self, rows: list[Row], token_mask: TokenMask) -> Float64[Tensor, " row"]:
        token_mask.advance(token_mask.rows, token_mask.start, 0)
        said = self._of(rows)
        residual = forward.reference_batch(self.model, _placed(rows, said), [n_layers(self.model)])[:, 0]
        return said_log_probs(self.model, residual, said)

    def _of(self, rows: Sequence[Row]) -> list[Sequence[int]]:
        return [self.said[row.number] for row in rows]  # type: ignore[attr-defined]


def _placed(rows: Sequence[Row], said: Sequence[Sequence[int]]) -> list[Row]:
    """The rows, reading the token before each one that is said."""
    return [
        Row(row.ids, tuple(range(len(row.ids) - len(own), len(row.ids)))) for row, own in zip(rows, said, strict=True)
    ]
