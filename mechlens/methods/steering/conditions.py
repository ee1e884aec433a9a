"""Many interventions on the same prompts: every arm of an experiment on every prompt, as the rows of one sweep.

An arm is a list with an intervention for each prompt, or None where nothing is done.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.behaviour.judges import refusal_log_odds
from mechlens.methods.cache import Shelf
from mechlens.methods.steering.interventions import Intervention
from mechlens.methods.steering.steering import answer_under, logits_under
from mechlens.models.bridge import LanguageModel
from mechlens.models.engine.generate import Decided
from mechlens.prompts.batch import TokenBatch

Arm = Sequence[Intervention | None]


@dataclass(frozen=True)
class Readout:
    """What is kept of the first answer token's logits: some of them, then the log-odds of a refusal."""

    tokens: tuple[int, ...]
    refusal: tuple[int, ...]

    @property
    def key(self) -> str:
        """What a shelf knows it by."""
        return f"readout {self.tokens} {self.refusal}"

    def __call__(self, logits: Float[Tensor, "row vocab"], rows: list[int]) -> Float[Tensor, "row out"]:
        """Logits of the tokens, and the log-odds that one of the refusal tokens comes (float64)."""
        odds = refusal_log_odds(logits, self.refusal)
        return torch.cat([logits[:, list(self.tokens)].double(), odds.unsqueeze(1)], dim=1)


def first_token_of_arms(
    model: LanguageModel, batch: TokenBatch, arms: Sequence[Arm], readout: Readout, *, shelf: Shelf | None = None
) -> Float[Tensor, "arm prompt out"]:
    """The readout of every arm on every prompt."""
    part, given = _rows(batch, arms)
    values = logits_under(model, part, given, reduce=readout, shelf=shelf)
    return values.reshape(len(batch.prompts), len(arms), -1).transpose(0, 1)


def answers_of_arms(
    model: LanguageModel,
    batch: TokenBatch,
    arms: Sequence[Arm],
    *,
    max_new_tokens: int,
    decided: Decided | None = None,
    shelf: Shelf | None = None,
) -> list[list[str]]:
    """The answer of every arm to every prompt, cut where it is `decided`."""
    part, given = _rows(batch, arms)
    said = answer_under(model, part, given, max_new_tokens=max_new_tokens, decided=decided, shelf=shelf)
    return [list(said.texts[k :: len(arms)]) for k in range(len(arms))]


def _rows(batch: TokenBatch, arms: Sequence[Arm]) -> tuple[TokenBatch, list[list[Intervention]]]:
    """Prompt by prompt all arms, so that rows which are alike up to some layer meet in one batch."""
    prompts = range(len(batch.prompts))
    given = [[one] if (one := arm[i]) is not None else [] for i in prompts for arm in arms]
    return batch.select([i for i in prompts for _ in arms]), given
