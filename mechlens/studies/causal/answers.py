"""What is said in words: replies to the questions, and whole answers to the requests with what breaks in them."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from mechlens.methods.behaviour.answers import Answers
from mechlens.methods.behaviour.chosen_judge import judge_of, verdicts_by
from mechlens.methods.behaviour.damage import Damage, damage_of_each, repetition
from mechlens.methods.behaviour.inversion import (
    BELIEFS,
    POLARITIES,
    Belief,
    OnceParsed,
    consistent_belief,
    parse_reply,
)
from mechlens.methods.behaviour.judges import ARDITI, ZHAO, Judge
from mechlens.methods.directions.direction import Direction
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import mean_estimate
from mechlens.methods.steering.interventions import Ablate, Add
from mechlens.methods.steering.steering import answers_of_arms
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.prompts.batch import joined
from mechlens.studies.causal.config import REPLY_TOKENS, CausalPlan
from mechlens.studies.causal.directions import HARMLESS, OPERATIONS, PUSH, STEERED, Setting, intervene
from mechlens.studies.causal.readings import Condition, Setup, Subjects
from mechlens.studies.causal.sweeps import SCOPE

DAMAGED = 12
"""Harmless prompts whose answers' losses are measured: every token's logits over a large vocabulary are slow."""


@dataclass(frozen=True)
class SaidBeliefs:
    """What the replies to both questions about each request say, under one condition."""

    straight: tuple[Belief, ...]
    reversed: tuple[Belief, ...]

    @property
    def beliefs(self) -> tuple[Belief, ...]:
        """What both say together."""
        return tuple(consistent_belief(a, b) for a, b in zip(self.straight, self.reversed, strict=True))


def said_beliefs(
    setup: Setup, who: Subjects, conditions: Sequence[Condition], direction: str = ""
) -> list[SaidBeliefs]:
    """Replies under every condition, in the paper's scope for the direction."""
    scope = SCOPE.get(direction, "all")
    both = joined([who.asked[polarity].batch for polarity in POLARITIES])
    said = answers_of_arms(
        setup.model,
        both,
        [who.within_both(condition, scope) for condition in conditions],
        max_new_tokens=REPLY_TOKENS,
        decided=OnceParsed(loaded(setup.model).tokenizer),
        cache=setup.cache,
    )
    n = len(who.prompts)
    polarities = [polarity for polarity in POLARITIES for _ in range(n)]
    parsed = [tuple(map(parse_reply, texts, polarities)) for texts in said]
    return [SaidBeliefs(beliefs[:n], beliefs[n:]) for beliefs in parsed]


def belief_table(who: Subjects, said: SaidBeliefs, direction: str, operation: str) -> pd.DataFrame:
    """Shares of beliefs by class: direction, operation, label, belief, share, n."""
    rows = []
    for label in PUSH:
        of_class = [said.beliefs[i] for i in who.of(label)]
        where = {"direction": direction, "operation": operation, "label": label}
        rows += [
            {**where, "belief": belief, "share": of_class.count(belief) / len(of_class), "n": len(of_class)}
            for belief in BELIEFS
        ]
    return pd.DataFrame(rows)


def beliefs_under(setup: Setup, who: Subjects, name: str, direction: Direction, setting: Setting) -> pd.DataFrame:
    """`belief_table` of all four cells of one direction."""
    conditions: list[Condition] = [
        [intervene(direction, operation, setting, setup.norms)] * len(who.prompts) for operation in STEERED
    ]
    said = said_beliefs(setup, who, conditions, name)
    return pd.concat([belief_table(who, each, name, done) for each, done in zip(said, STEERED, strict=True)])


@dataclass(frozen=True)
class AnswersUnder:
    """Whole answers to the test prompts, unsteered and under every operation."""

    who: Subjects
    unsteered: Answers
    done: dict[str, Add | Ablate]
    texts: dict[str, list[str]]
    """By operation."""
    judge: Judge
    """Who decides everywhere; both published lists stand beside it."""

    @property
    def _judges(self) -> dict[str, Judge]:
        """By the end of a column's name."""
        return {"": self.judge, "_arditi": ARDITI, "_zhao": ZHAO}

    def table(self) -> pd.DataFrame:
        """One row per prompt and operation: the answer before and after, with verdicts."""
        prompts = self.who.prompts
        before = self._verdicts("verdict_before", self.unsteered.texts)
        rows = [
            {
                "id": prompt.id, "label": prompt.label, "operation": operation,
                "is_push": PUSH[prompt.label] == operation,
                **{name: verdicts[i] for name, verdicts in (before | after).items()},
                "prompt": prompt.text, "unsteered_answer": self.unsteered.texts[i], "answer": texts[i],
            }
            for operation, texts in self.texts.items()
            for after in [self._verdicts("verdict_after", texts)]
            for i, prompt in enumerate(prompts)
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def _verdicts(self, stem: str, texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Every judge's, by column."""
        return {f"{stem}{end}": verdicts_by(judge, self.who.prompts, texts) for end, judge in self._judges.items()}

    def damage(self, model: LanguageModel, losses: Sequence[Damage], plan: CausalPlan) -> pd.DataFrame:
        """Losses on some harmless prompts and plain text; repetition, silence and refusals over all prompts."""
        table = []
        said = {"none": list(self.unsteered.texts), **self.texts}
        for (operation, texts), broken in zip(said.items(), losses, strict=True):
            measured = {**_losses(broken, plan), **self._in_words(model, texts, plan)}
            table += [{"operation": operation, "measure": name, **value.row()} for name, value in measured.items()]
        return pd.DataFrame(table)

    def _in_words(self, model: LanguageModel, texts: list[str], plan: CausalPlan) -> dict[str, Estimate]:
        encode = loaded(model).tokenizer.encode
        repeated = torch.tensor([repetition(encode(text, add_special_tokens=False)) for text in texts]).double()
        silent = torch.tensor([not text.strip() for text in texts])
        numbers = {"repetition": self.who.estimate(repeated, plan), "empty": self.who.rate(silent, plan)}
        for end, judge in self._judges.items():
            verdicts = verdicts_by(judge, self.who.prompts, texts)
            refused = torch.tensor([verdict == "refused" for verdict in verdicts])
            numbers |= {f"refused_{label}{end}": self.who.rate(refused, plan, self.who.of(label)) for label in PUSH}
        return numbers


def losses_under(model: LanguageModel, each: Sequence[AnswersUnder]) -> list[list[Damage]]:
    """For each direction the losses with nothing done and under every operation; the unsteered model is run once."""
    who, unsteered = each[0].who, each[0].unsteered
    rows = who.of(HARMLESS)[:DAMAGED]
    ones = [one for said in each for one in said.done.values()]
    nothing, *done = damage_of_each(model, [None, *ones], who.batch.select(rows), unsteered.select(rows))
    size = len(OPERATIONS)
    return [[nothing, *done[k * size : (k + 1) * size]] for k in range(len(each))]


def _losses(broken: Damage, plan: CausalPlan) -> dict[str, Estimate]:
    values = {"plain_ce": broken.plain, "own_ce": broken.own, "kl": broken.kl}
    alone = {name: [str(i) for i in range(len(losses))] for name, losses in values.items()}
    return {name: mean_estimate(losses, alone[name], plan.seed, plan.resamples) for name, losses in values.items()}


def answers_under(
    setup: Setup, who: Subjects, direction: Direction, setting: Setting, unsteered: Answers
) -> AnswersUnder:
    """Answers under adding, subtracting and ablating one direction at one setting."""
    done: dict[str, Add | Ablate] = {name: intervene(direction, name, setting, setup.norms) for name in OPERATIONS}
    conditions: list[Condition] = [[edit] * len(who.prompts) for edit in done.values()]
    length, judge = setup.plan.max_new_tokens, judge_of(setup.plan.judge)
    texts = answers_of_arms(setup.model, who.batch, conditions, max_new_tokens=length, cache=setup.cache)
    return AnswersUnder(who, unsteered, done, dict(zip(done, texts, strict=True)), judge)
