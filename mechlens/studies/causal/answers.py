"""What the model says in words under the chosen interventions, and what they break."""

from dataclasses import dataclass

import pandas as pd
import torch

from mechlens.methods.behaviour.answers import Answers
from mechlens.methods.behaviour.damage import Damage, damage, repetition
from mechlens.methods.behaviour.inversion import BELIEFS, SCOPES, Belief, parse_reply
from mechlens.methods.behaviour.judges import ARDITI, PHRASES, ZHAO
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.steering.conditions import answers_of_arms
from mechlens.methods.steering.interventions import Ablate, Add, ResidualNorms
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.studies.causal.config import CausalPlan
from mechlens.studies.causal.directions import HARMLESS, OPERATIONS, PUSH, Setting, intervene, pushes
from mechlens.studies.causal.readings import Condition, Subjects, family_mean

JUDGES = {"": PHRASES, "_arditi": ARDITI, "_zhao": ZHAO}
"""By the end of a column's name. The first decides everywhere; the published two stand beside it."""
REPLY_TOKENS = 8
"""Enough for the word, or for the phrase of a refusal."""


@dataclass(frozen=True)
class AnswersUnder:
    """Whole answers to the test prompts, unsteered and under every operation."""

    who: Subjects
    unsteered: Answers
    done: dict[str, Add | Ablate]
    texts: dict[str, list[str]]
    """By operation."""

    def table(self) -> pd.DataFrame:
        """One row per prompt and operation: the answer before and after, with verdicts."""
        prompts = self.who.prompts
        before = {f"verdict_before{end}": judge(prompts, self.unsteered.texts) for end, judge in JUDGES.items()}
        rows = [
            {
                "id": prompt.id, "label": prompt.label, "operation": operation,
                "is_push": PUSH[prompt.label] == operation,
                **{name: verdicts[i] for name, verdicts in (before | after).items()},
                "prompt": prompt.text, "unsteered_answer": self.unsteered.texts[i], "answer": texts[i],
            }
            for operation, texts in self.texts.items()
            for after in [{f"verdict_after{end}": judge(prompts, texts) for end, judge in JUDGES.items()}]
            for i, prompt in enumerate(prompts)
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def damage(self, model: LanguageModel, plan: CausalPlan) -> pd.DataFrame:
        """Losses on harmless prompts and plain text; repetition, silence and refusals over all prompts."""
        rows = self.who.of(HARMLESS)
        answers = self.unsteered.select(rows)
        table = []
        for operation, texts in {"none": list(self.unsteered.texts), **self.texts}.items():
            losses = damage(model, self.done.get(operation), self.who.batch.select(rows), answers)
            measured = {**_losses(losses, plan), **self._in_words(model, texts, plan)}
            table += [{"operation": operation, "measure": name, **value.row()} for name, value in measured.items()]
        return pd.DataFrame(table)

    def _in_words(self, model: LanguageModel, texts: list[str], plan: CausalPlan) -> dict[str, Estimate]:
        encode = loaded(model).tokenizer.encode
        repeated = torch.tensor([repetition(encode(text, add_special_tokens=False)) for text in texts]).double()
        silent = torch.tensor([not text.strip() for text in texts]).double()
        estimate = self.who.estimate
        numbers = {"repetition": estimate(repeated, plan), "empty": estimate(silent, plan)}
        for end, judge in JUDGES.items():
            refused = torch.tensor([verdict == "refused" for verdict in judge(self.who.prompts, texts)]).double()
            numbers |= {f"refused_{label}{end}": estimate(refused, plan, self.who.of(label)) for label in PUSH}
        return numbers


def _losses(broken: Damage, plan: CausalPlan) -> dict[str, Estimate]:
    values = {"plain_ce": broken.plain, "own_ce": broken.own, "kl": broken.kl}
    return {name: family_mean(losses, [str(i) for i in range(len(losses))], plan) for name, losses in values.items()}


def answers_under(
    model: LanguageModel,
    who: Subjects,
    direction: Direction,
    setting: Setting,
    norms: ResidualNorms,
    unsteered: Answers,
    plan: CausalPlan,
    cache: Cache | None,
) -> AnswersUnder:
    """Answers under adding, subtracting and ablating one direction at one setting."""
    done: dict[str, Add | Ablate] = {name: intervene(direction, name, setting, norms) for name in OPERATIONS}
    conditions: list[Condition] = [[edit] * len(who.prompts) for edit in done.values()]
    texts = answers_of_arms(model, who.batch, conditions, max_new_tokens=plan.max_new_tokens, cache=cache)
    return AnswersUnder(who, unsteered, done, dict(zip(done, texts, strict=True)))


def replies(
    model: LanguageModel, who: Subjects, conditions: dict[str, Condition], cache: Cache | None
) -> dict[str, list[Belief]]:
    """What the replies to the questions say under each of the named conditions."""
    texts = answers_of_arms(model, who.asked.batch, list(conditions.values()), max_new_tokens=REPLY_TOKENS, cache=cache)
    return {name: [parse_reply(text) for text in own] for name, own in zip(conditions, texts, strict=True)}


def replies_under(
    model: LanguageModel,
    who: Subjects,
    direction: Direction,
    setting: Setting,
    norms: ResidualNorms,
    cache: Cache | None,
) -> pd.DataFrame:
    """Replies to the questions under a push, in both scopes: scope, label, belief, share."""
    done = pushes(direction, setting, norms, who.labels)
    conditions: dict[str, Condition] = {
        scope: [who.asked.within(i, one, scope) for i, one in enumerate(done)] for scope in SCOPES
    }
    return reply_table(who, replies(model, who, conditions, cache))


def reply_table(who: Subjects, said: dict[str, list[Belief]]) -> pd.DataFrame:
    """Shares of beliefs by class: scope ("none" is unsteered), label, belief, share, n."""
    return pd.DataFrame(
        [
            {"scope": scope, "label": label, "belief": belief, "share": own.count(belief) / len(own), "n": len(own)}
            for scope, beliefs in said.items()
            for label in PUSH
            for own in [[beliefs[i] for i in who.of(label)]]
            for belief in BELIEFS
        ]
    )
