"""The battery's second half, on test prompts: the chosen pushes beside null directions, answers, and what breaks."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.behaviour.answers import Answers
from mechlens.methods.behaviour.chosen_judge import judge_of, verdicts_by
from mechlens.methods.behaviour.damage import Damage, damage, repetition
from mechlens.methods.behaviour.inversion import BELIEFS, SCOPES, Belief, parse_reply
from mechlens.methods.behaviour.judges import ARDITI, ZHAO, Judge
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction, random_like
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.steering.interventions import Ablate, Add, ResidualNorms
from mechlens.methods.steering.steering import answers_of_arms
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.studies.causal.config import CausalPlan
from mechlens.studies.causal.directions import HARMLESS, OPERATIONS, PUSH, ContrastSource, Setting, intervene, pushes
from mechlens.studies.causal.readings import (
    MEASURES,
    Condition,
    ReadTokens,
    Subjects,
    family_mean,
    pushed,
    read,
    refused,
)

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
        for end, judge in self._judges.items():
            verdicts = verdicts_by(judge, self.who.prompts, texts)
            refused = torch.tensor([verdict == "refused" for verdict in verdicts]).double()
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
    return AnswersUnder(who, unsteered, done, dict(zip(done, texts, strict=True)), judge_of(plan.judge))


def replies(
    model: LanguageModel, who: Subjects, conditions: dict[str, Condition], cache: Cache | None
) -> dict[str, list[Belief]]:
    """What the replies to the questions say under each of the named conditions."""
    texts = answers_of_arms(model, who.asked.batch, list(conditions.values()), max_new_tokens=REPLY_TOKENS, cache=cache)
    return {name: [parse_reply(text) for text in said] for name, said in zip(conditions, texts, strict=True)}


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
        scope: [who.asked.within(i, edit, scope) for i, edit in enumerate(done)] for scope in SCOPES
    }
    return reply_table(who, replies(model, who, conditions, cache))


def reply_table(who: Subjects, said: dict[str, list[Belief]]) -> pd.DataFrame:
    """Shares of beliefs by class: scope ("none" is unsteered), label, belief, share, n."""
    rows = []
    for scope, beliefs in said.items():
        for label in PUSH:
            of_class = [beliefs[i] for i in who.of(label)]
            shares = {belief: of_class.count(belief) / len(of_class) for belief in BELIEFS}
            where = {"scope": scope, "label": label}
            rows += [{**where, "belief": name, "share": share, "n": len(of_class)} for name, share in shares.items()]
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Control:
    """What null directions (random ones, or those from shuffled labels) do in a direction's place."""

    mean: Estimate
    """Mean over them, with the interval over prompts."""
    maximum: Estimate
    """The one that does most."""
    n: int
    """How many they are."""


@dataclass(frozen=True)
class HeldOutEffect:
    """One direction at its chosen setting, on test prompts."""

    direction: Direction
    setting: Setting
    pushes: dict[str, Estimate]
    """Mean change towards the other class by measure; "rate" is the change of the share of refusals among harmless
    prompts under addition."""
    random: dict[str, Control]
    shuffled: dict[str, Control]
    answers: pd.DataFrame
    """Every answer before and after, with verdicts."""
    damage: pd.DataFrame
    """By operation, and unsteered: plain_ce, own_ce, kl, repetition, empty, and refusals by class and judge."""
    replies: pd.DataFrame
    """What was replied to the questions under a push: scope, label, belief, share."""


def run_test(
    model: LanguageModel,
    who: Subjects,
    source: ContrastSource,
    setting: Setting,
    norms: ResidualNorms,
    words: ReadTokens,
    plan: CausalPlan,
    answers: Answers,
    cache: Cache | None,
) -> HeldOutEffect:
    """Pushes with both kinds of null directions, all operations in words, damage; `answers` are the unsteered ones."""
    direction = source.direction(setting.layer)
    conditions: list[Condition] = [
        pushes(each, setting, norms, who.labels)
        for each in (direction, *random_like(direction, plan.random_directions, plan.seed + 1))
    ]
    for null in source.shuffled(setting.layer, plan.shuffled_directions, plan.seed + 2):
        # As many times its own length as the direction is pushed; one of no length does nothing.
        share = setting.times(null.norm / direction.norm)
        conditions.append(pushes(null, share, norms, who.labels) if null.norm else [None] * len(who.prompts))
    values = read(model, who, [[None] * len(who.prompts), *conditions], words, cache)
    change = pushed(values[1:], values[0], who.harmful)
    by_measure = {name: (change[:, :, k], list(range(len(who.prompts)))) for k, name in enumerate(MEASURES)}
    by_measure["rate"] = _rate_changes(model, who, conditions, plan, cache)
    controls: dict[str, list[Control]] = {}
    for name, (moved, rows) in by_measure.items():
        families = [who.families[i] for i in rows]
        controls[name] = [
            _control(part, families, plan)
            for part in (moved[1 : 1 + plan.random_directions], moved[1 + plan.random_directions :])
        ]
    said = answers_under(model, who, direction, setting, norms, answers, plan, cache)
    return HeldOutEffect(
        direction=direction,
        setting=setting,
        pushes={
            name: family_mean(moved[0], [who.families[i] for i in rows], plan)
            for name, (moved, rows) in by_measure.items()
        },
        random={name: control[0] for name, control in controls.items()},
        shuffled={name: control[1] for name, control in controls.items()},
        answers=said.table(),
        damage=said.damage(model, plan),
        replies=replies_under(model, who, direction, setting, norms, cache),
    )


def _control(change: Float[Tensor, "direction prompt"], families: Sequence[str], plan: CausalPlan) -> Control:
    if not len(change):
        return Control(Estimate.missing(0), Estimate.missing(0), 0)
    largest = change[int(change.mean(dim=1).argmax())]
    return Control(family_mean(change.mean(dim=0), families, plan), family_mean(largest, families, plan), len(change))


def _rate_changes(
    model: LanguageModel, who: Subjects, conditions: Sequence[Condition], plan: CausalPlan, cache: Cache | None
) -> tuple[Float[Tensor, "condition prompt"], list[int]]:
    """How much oftener each harmless prompt is refused under every push, and which rows these are."""
    rows = who.of(HARMLESS)
    every: list[Condition] = [[None] * len(rows), *([condition[i] for i in rows] for condition in conditions)]
    values = refused(model, who.batch.select(rows), every, plan, cache)
    return values[1:] - values[0], rows
