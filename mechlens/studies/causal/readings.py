"""What is read off the first answer token under each condition: willingness to answer, and belief about the request."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.behaviour.chosen_judge import judge_of, once_refused, verdicts_by
from mechlens.methods.behaviour.inversion import SCOPES, Questioned, WordPair, ask
from mechlens.methods.behaviour.judges import RefusalTokens
from mechlens.methods.cache import Cache
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import mean_estimate
from mechlens.methods.steering.interventions import Ablate, Add
from mechlens.methods.steering.steering import Readout, answers_of_arms, first_token_of_arms
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.settings import Answering
from mechlens.studies.causal.config import CausalPlan
from mechlens.studies.causal.directions import HARMFUL

MEASURES = ("refusal", "inversion.before", "inversion.all", "own_words.before", "own_words.all")
"""Refusal log-odds of the plain request; logit(Certainly) - logit(No) of the question about it, and the same with the
model's own words, with the intervention before the question and everywhere."""
Condition = Sequence[Add | Ablate | None]


@dataclass(frozen=True)
class Subjects:
    """The prompts of one part of the split, as requests and as questions about them."""

    prompts: tuple[Prompt, ...]
    batch: TokenBatch
    asked: Questioned

    @property
    def labels(self) -> tuple[str, ...]:
        """Class of each prompt."""
        return tuple(prompt.label for prompt in self.prompts)

    @property
    def harmful(self) -> Bool[Tensor, " prompt"]:
        """True for the harmful ones."""
        return torch.tensor([label == HARMFUL for label in self.labels])

    @property
    def families(self) -> tuple[str, ...]:
        """Family of each prompt."""
        return tuple(prompt.group for prompt in self.prompts)

    def of(self, label: str) -> list[int]:
        """Rows of one class."""
        return [i for i, given in enumerate(self.labels) if given == label]

    def estimate(
        self, values: Float[Tensor, " prompt"], plan: CausalPlan, rows: Sequence[int] | None = None
    ) -> Estimate:
        """Mean over the prompts, or over some of them, with its interval over families."""
        kept = range(len(self.prompts)) if rows is None else rows
        return family_mean(values[list(kept)], [self.families[i] for i in kept], plan)


def family_mean(values: Float[Tensor, " prompt"], families: Sequence[str], plan: CausalPlan) -> Estimate:
    """Mean with its interval over families."""
    return mean_estimate(values, families, plan.seed, plan.resamples)


def subjects(prompts: Sequence[Prompt], template: ChatTemplate) -> Subjects:
    """Tokenises requests and questions."""
    return Subjects(tuple(prompts), tokenize(prompts, template), ask(prompts, template))


@dataclass(frozen=True)
class ReadTokens:
    """The tokens that are read."""

    asked: WordPair
    preferred: WordPair
    refusal: RefusalTokens

    @property
    def readout(self) -> Readout:
        """What is kept of each row of logits."""
        return Readout((self.asked.yes, self.asked.no, self.preferred.yes, self.preferred.no), tuple(self.refusal.ids))


def read(
    model: LanguageModel, who: Subjects, conditions: Sequence[Condition], words: ReadTokens, cache: Cache | None
) -> Float[Tensor, "condition prompt measure"]:
    """Every measure of every condition on every prompt, in the order of MEASURES."""
    plain = first_token_of_arms(model, who.batch, conditions, words.readout, cache=cache)
    by_measure = {"refusal": plain[..., -1]}
    for scope in SCOPES:
        within = [
            [edit and who.asked.within(i, edit, scope) for i, edit in enumerate(condition)] for condition in conditions
        ]
        logits = first_token_of_arms(model, who.asked.batch, within, words.readout, cache=cache)
        by_measure[f"inversion.{scope}"] = logits[..., 0] - logits[..., 1]
        by_measure[f"own_words.{scope}"] = logits[..., 2] - logits[..., 3]
    return torch.stack([by_measure[name] for name in MEASURES], dim=-1)


def pushed(
    values: Float[Tensor, "*condition prompt measure"],
    unsteered: Float[Tensor, "prompt measure"],
    harmful: Bool[Tensor, " prompt"],
) -> Float[Tensor, "*condition prompt measure"]:
    """Change of every measure towards the other class: up where a harmless prompt was pushed, down where a harmful
    one was. Positive is what the direction's name promises."""
    return (values - unsteered) * torch.where(harmful, -1.0, 1.0)[:, None]


def refused(
    model: LanguageModel, batch: TokenBatch, conditions: Sequence[Condition], answering: Answering, cache: Cache | None
) -> Float[Tensor, "condition prompt"]:
    """1 where the answer of a condition is a refusal, else 0 (float64)."""
    judge, length = judge_of(answering.judge), answering.max_new_tokens
    decided = once_refused(judge, loaded(model).tokenizer)
    said = answers_of_arms(model, batch, conditions, max_new_tokens=length, decided=decided, cache=cache)
    verdicts = [verdicts_by(judge, batch.prompts, texts) for texts in said]
    return torch.tensor([[verdict == "refused" for verdict in row] for row in verdicts]).double()
