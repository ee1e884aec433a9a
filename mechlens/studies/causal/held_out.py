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
from mechlens.settings import Answering
from mechlens.studies.causal.answers import answers_under, replies_under
from mechlens.studies.causal.directions import HARMLESS, ContrastSource, Setting, pushes
from mechlens.studies.causal.readings import (
    MEASURES,
    Condition,
    ReadTokens,
    Resampling,
    Subjects,
    pushed,
    read,
    refused,
)


@dataclass(frozen=True)
class Control:
    """What directions of nothing do in a direction's place."""

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
    chance: Resampling,
    controls: tuple[int, int],
    answers: Answers,
    answering: Answering,
    cache: Cache | None,
) -> HeldOutEffect:
    """Pushes with controls (so many random and so many shuffled directions), all operations in words, damage.

    `answers` are the unsteered ones to the same prompts.
    """
    direction = source.direction(setting.layer)
    n_random, n_shuffled = controls
    conditions: list[Condition] = [
        pushes(one, setting, norms, who.labels)
        for one in (direction, *random_like(direction, n_random, chance.seed + 1))
    ]
    for one in source.shuffled(setting.layer, n_shuffled, chance.seed + 2):
        # As many times its own length as the direction is pushed; one of no length does nothing.
        share = setting.times(one.norm / direction.norm)
        conditions.append(pushes(one, share, norms, who.labels) if one.norm else [None] * len(who.prompts))
    values = read(model, who, [[None] * len(who.prompts), *conditions], words, cache)
    change = pushed(values[1:], values[0], who.harmful)
    by_measure = {name: (change[:, :, k], list(range(len(who.prompts)))) for k, name in enumerate(MEASURES)}
    by_measure["rate"] = _rate_changes(model, who, conditions, answering, cache)
    found: dict[str, list[Control]] = {}
    for name, (own, rows) in by_measure.items():
        families = [who.families[i] for i in rows]
        found[name] = [_control(part, families, chance) for part in (own[1 : 1 + n_random], own[1 + n_random :])]
    said = answers_under(model, who, direction, setting, norms, answers, answering, cache)
    return HeldOutEffect(
        direction=direction,
        setting=setting,
        pushes={name: chance.mean(own[0], [who.families[i] for i in rows]) for name, (own, rows) in by_measure.items()},
        random={name: control[0] for name, control in found.items()},
        shuffled={name: control[1] for name, control in found.items()},
        answers=said.table(),
        damage=said.damage(model, chance),
        replies=replies_under(model, who, direction, setting, norms, cache),
    )


def _control(change: Float[Tensor, "direction prompt"], families: Sequence[str], chance: Resampling) -> Control:
    if not len(change):
        return Control(Estimate.missing(0), Estimate.missing(0), 0)
    largest = change[int(change.mean(dim=1).argmax())]
    return Control(chance.mean(change.mean(dim=0), families), chance.mean(largest, families), len(change))


def _rate_changes(
    model: LanguageModel, who: Subjects, conditions: Sequence[Condition], answering: Answering, cache: Cache | None
) -> tuple[Float[Tensor, "condition prompt"], list[int]]:
    """How much oftener each harmless prompt is refused under every push, and which rows these are."""
    rows = who.of(HARMLESS)
    every: list[Condition] = [[None] * len(rows), *([condition[i] for i in rows] for condition in conditions)]
    values = refused(model, who.batch.select(rows), every, answering, cache)
    return values[1:] - values[0], rows
