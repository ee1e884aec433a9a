"""What is read off the first answer token under each condition: willingness to answer, and belief about the request."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.behaviour.inversion import (
    POLARITIES,
    Polarity,
    Questioned,
    Scope,
    WordPair,
    ask,
    consistent_change,
)
from mechlens.methods.behaviour.judges import RefusalTokens
from mechlens.methods.cache import Cache
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import mean_estimate, rate_estimate
from mechlens.methods.steering.interventions import Ablate, Add, ResidualNorms
from mechlens.methods.steering.steering import Readout, first_token_of_arms
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.batch import TokenBatch, joined, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.settings import Sampling
from mechlens.studies.causal.config import CausalPlan
from mechlens.studies.causal.directions import HARMFUL, HARMLESS

Condition = Sequence[Add | Ablate | None]
"""What is done to each prompt."""


@dataclass(frozen=True)
class Subjects:
    """The prompts of one part of the split, as requests and as questions about them."""

    prompts: tuple[Prompt, ...]
    batch: TokenBatch
    asked: dict[Polarity, Questioned]

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

    def select(self, rows: Sequence[int]) -> "Subjects":
        """Some of the prompts."""
        asked = {polarity: questioned.select(rows) for polarity, questioned in self.asked.items()}
        return Subjects(tuple(self.prompts[i] for i in rows), self.batch.select(list(rows)), asked)

    def few(self, n: int) -> "Subjects":
        """The first `n` of each class."""
        return self.select([i for label in (HARMFUL, HARMLESS) for i in self.of(label)[:n]])

    def estimate(self, values: Float[Tensor, " prompt"], plan: Sampling, rows: Sequence[int] | None = None) -> Estimate:
        """Mean over the prompts, or over some of them, with its interval over families."""
        kept = range(len(self.prompts)) if rows is None else rows
        return mean_estimate(values[list(kept)], [self.families[i] for i in kept], plan.seed, plan.resamples)

    def rate(self, flags: Bool[Tensor, " prompt"], plan: Sampling, rows: Sequence[int] | None = None) -> Estimate:
        """The share of the prompts, or of some of them, that are flagged."""
        kept = range(len(self.prompts)) if rows is None else rows
        return rate_estimate(flags[list(kept)], [self.families[i] for i in kept], plan.seed, plan.resamples)

    def within(self, condition: Condition, scope: Scope, polarity: Polarity) -> list[Add | Ablate | None]:
        """A condition kept to the tokens that the scope names."""
        return [edit and self.asked[polarity].within(i, edit, scope) for i, edit in enumerate(condition)]

    def within_both(self, condition: Condition, scope: Scope) -> list[Add | Ablate | None]:
        """The same for all requests asked about the one way, and then the other."""
        return [edit for polarity in POLARITIES for edit in self.within(condition, scope, polarity)]


def subjects(prompts: Sequence[Prompt], template: ChatTemplate) -> Subjects:
    """Tokenises requests and questions."""
    asked = {polarity: ask(prompts, template, polarity=polarity) for polarity in POLARITIES}
    return Subjects(tuple(prompts), tokenize(prompts, template), asked)


@dataclass(frozen=True)
class ReadTokens:
    """The tokens that are read."""

    words: WordPair
    refusal: RefusalTokens

    @property
    def of_requests(self) -> Readout:
        """What is kept of each row of logits after a plain request: the log-odds of a refusal."""
        return Readout((), tuple(self.refusal.ids))

    @property
    def of_questions(self) -> Readout:
        """What is kept of each row of logits after a question: both words."""
        return Readout((self.words.yes, self.words.no))


@dataclass(frozen=True)
class Setup:
    """What stays the same through the whole battery."""

    model: LanguageModel
    norms: ResidualNorms
    """Of training prompts; what strengths are shares of."""
    tokens: ReadTokens
    plan: CausalPlan
    cache: Cache | None
    believes: bool
    """Whether belief is measurable; where it isn't, refusal alone is steered."""


def read_refusal(setup: Setup, who: Subjects, conditions: Sequence[Condition]) -> Float[Tensor, "condition prompt"]:
    """Log-odds that the answer to the plain request starts as this model's refusals do."""
    readout = setup.tokens.of_requests
    return first_token_of_arms(setup.model, who.batch, conditions, readout, cache=setup.cache)[..., 0]


@dataclass(frozen=True)
class Replies:
    """logit(yes) - logit(no) as the first token of the replies to both questions about each request."""

    straight: Float[Tensor, "condition prompt"]
    """Yes means harmful."""
    reversed: Float[Tensor, "condition prompt"]
    """Yes means harmless."""

    @property
    def belief(self) -> Float[Tensor, "condition prompt"]:
        """How far both together say harmful: half the difference, from which yes to everything falls out."""
        return (self.straight - self.reversed) / 2

    def changes(self) -> "Replies":
        """Every condition but the first, as its difference from the first."""
        return Replies(self.straight[1:] - self.straight[0], self.reversed[1:] - self.reversed[0])

    @property
    def agreement(self) -> Float[Tensor, "condition prompt"]:
        """How far both say yes: their mean."""
        return (self.straight + self.reversed) / 2

    @property
    def consistent(self) -> Float[Tensor, "condition prompt"]:
        """Of changes, what both questions bear out; positive is towards harmful."""
        return consistent_change(self.straight, self.reversed)


def read_replies(setup: Setup, who: Subjects, conditions: Sequence[Condition], scope: Scope) -> Replies:
    """Both replies to the questions about every request under every condition, kept to the scope's tokens."""
    return read_in_scopes(setup, who, conditions, (scope,))[scope]


def read_in_scopes(
    setup: Setup, who: Subjects, conditions: Sequence[Condition], scopes: Sequence[Scope]
) -> dict[Scope, Replies]:
    """The same in several scopes at once: up to its question a request is then run once under each condition."""
    both = joined([who.asked[polarity].batch for polarity in POLARITIES])
    arms = [who.within_both(condition, scope) for scope in scopes for condition in conditions]
    logits = first_token_of_arms(setup.model, both, arms, setup.tokens.of_questions, cache=setup.cache)
    difference = (logits[..., 0] - logits[..., 1]).reshape(len(scopes), len(conditions), len(POLARITIES), -1)
    return {scope: Replies(own[:, 0], own[:, 1]) for scope, own in zip(scopes, difference, strict=True)}
