"""The battery's second half: the chosen layer and strength on test prompts, beside random and shuffled directions."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.behaviour.answers import Answers
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction, random_like
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.steering.interventions import ResidualNorms
from mechlens.models.bridge import LanguageModel
from mechlens.studies.causal.answers import answers_under, replies_under
from mechlens.studies.causal.config import CausalPlan
from mechlens.studies.causal.directions import HARMLESS, ContrastSource, Setting, pushes
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
    values = refused(model, who.batch.select(rows), every, plan.max_new_tokens, cache)
    return values[1:] - values[0], rows
