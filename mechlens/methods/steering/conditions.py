"""Many interventions on the same prompts: every condition of an experiment on every prompt, as the rows of one sweep.

An condition is a list with an intervention for each prompt, or None where nothing is done.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.behaviour.judges import refusal_log_odds
from mechlens.methods.cache import Cache
from mechlens.methods.steering.interventions import Intervention
from mechlens.methods.steering.steering import answer_under, logits_under
from mechlens.models.bridge import LanguageModel
from mechlens.models.engine.generate import Decided
from mechlens.prompts.batch import TokenBatch

Condition = Sequence[Intervention | None]


@dataclass(frozen=True)
class Readout:
    """What is kept of the first answer token's logits: some of them, then the log-odds of a refusal."""

    tokens: tuple[int, ...]
    refusal: tuple[int, ...]

    @property
    def key(self) -> str:
        """What a cache knows it by."""
        return f"readout {self.tokens} {self.refusal}"

    def __call__(self, logits: Float[Tensor, "row vocab"], rows: list[int]) -> Float[Tensor, "row out"]:
        """Logits of the tokens, and the log-odds that one of the refusal tokens comes (float64)."""
        odds = refusal_log_odds(logits, self.refusal)
        return torch.cat([logits[:, list(self.tokens)].double(), odds.unsqueeze(1)], dim=1)


def first_token_of_arms(
    model: LanguageModel,
    batch: TokenBatch,
    conditions: Sequence[Condition],
    readout: Readout,
    *,
    cache: Cache | None = None,
) -> Float[Tensor, "condition prompt out"]:
    """The readout of every condition on every prompt."""
    part, given = _rows(batch, conditions)
    values = logits_under(model, part, given, reduce=readout, cache=cache)
    return values.reshape(len(batch.prompts), len(conditions), -1).transpose(0, 1)


def answers_of_arms(
    model: LanguageModel,
    batch: TokenBatch,
    conditions: Sequence[Condition],
    *,
    max_new_tokens: int,
    decided: Decided | None = None,
    cache: Cache | None = None,
) -> list[list[str]]:
    """The answer of every condition to every prompt, cut where it is `decided`."""
    part, given = _rows(batch, conditions)
    said = answer_under(model, part, given, max_new_tokens=max_new_tokens, decided=decided, cache=cache)
    return [list(said.texts[k :: len(conditions)]) for k in range(len(conditions))]


def _rows(batch: TokenBatch, conditions: Sequence[Condition]) -> tuple[TokenBatch, list[list[Intervention]]]:
    """Prompt by prompt all conditions, so that rows which are alike up to some layer meet in one batch."""
    prompts = range(len(batch.prompts))
    given = [[one] if (one := condition[i]) is not None else [] for i in prompts for condition in conditions]
    return batch.select([i for i in prompts for _ in conditions]), given
