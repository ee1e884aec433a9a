"""What the two directions change on test prompts, cell by cell, beside null directions of both kinds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import NamedTuple

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.behaviour.inversion import SCOPES
from mechlens.methods.directions.direction import random_like
from mechlens.methods.statistics.estimate import Estimate
from mechlens.studies.causal.choice import CLAIMS
from mechlens.studies.causal.config import CausalPlan
from mechlens.studies.causal.directions import (
    CELLS,
    HARMFUL,
    HARMLESS,
    PUSHES,
    STEERED,
    Cell,
    ContrastSource,
    Setting,
    intervene,
    pushes,
)
from mechlens.studies.causal.readings import Condition, Setup, Subjects, read_in_scopes, read_refusal


class EffectKey(NamedTuple):
    """Which number it is."""

    measure: str
    """"refusal": log-odds of a refusal of the plain request. Of logit(yes) - logit(no), acted on before the question or
    everywhere (".before", ".all"): "belief", half the difference between the two questions; "consistent", the part that
    both bear out; "agreement", their mean."""
    direction: str
    at: str
    """At whose best layer and strength: its own, or the other direction's."""
    cell: Cell

    @property
    def name(self) -> str:
        """In run.json."""
        return f"{self.measure}.{self.direction}.at_{self.at}.{self.cell.operation}_{self.cell.label}"


@dataclass(frozen=True)
class CellEffect:
    """What a direction does to the prompts of one class."""

    change: Estimate
    """Mean change; above 0 is what the direction's name promises: up under addition, down under subtraction."""
    random_max: float
    """The largest mean change of random directions there, whatever its sign; see `_largest`."""
    shuffled_max: float = nan
    """That of null directions from shuffled labels; measured for what a direction is claimed to change."""


Effects = dict[EffectKey, CellEffect]


def effects_at(
    setup: Setup, who: Subjects, sources: dict[str, ContrastSource], at: str, settings: Mapping[str, Setting]
) -> Effects:
    """All four cells of both directions at one of the two places; refusal alone where belief isn't measurable.

    `settings`: how strongly each direction is put there; null directions as strongly as the one whose place it is.
    Null directions are tried on `n_null` prompts of each class. Random ones are added only: one and its opposite are
    equally random, so what adding does is what subtracting does.
    """
    plan, norms, setting = setup.plan, setup.norms, settings[at]
    directions = {name: source.direction(setting.layer) for name, source in sources.items()}
    done: list[Condition] = [
        [intervene(direction, operation, settings[name], norms)] * len(who.prompts)
        for name, direction in directions.items()
        for operation in STEERED
    ]
    few = who.few(plan.n_null)
    random = random_like(directions[at], plan.random_directions, plan.seed + 1 + setting.layer)
    added: list[Condition] = [[intervene(one, "add", setting, norms)] * len(few.prompts) for one in random]
    shuffled = []
    for one in sources[at].shuffled(setting.layer, plan.shuffled_directions, plan.seed + 2):
        # As many times its own length as the direction is pushed; one of no length does nothing.
        own = Setting(setting.layer, setting.strength * one.norm / directions[at].norm)
        shuffled.append(pushes(one, own, norms, few.labels) if one.norm else [None] * len(few.prompts))
    claim = CLAIMS[at] if setup.believes else "refusal"
    return cell_effects(
        who, few, list(directions), at, _changes(setup, who, done), _changes(setup, few, added),
        {claim: _changes(setup, few, shuffled, claim)[claim]}, plan,
    )  # fmt: skip


def _changes(
    setup: Setup, who: Subjects, conditions: Sequence[Condition], only: str | None = None
) -> dict[str, Float[Tensor, "condition prompt"]]:
    """The difference from the unsteered model in every measure, or in `only` one; above 0: refused, or harmful."""
    everything: list[Condition] = [[None] * len(who.prompts), *conditions]
    found = {}
    if only in (None, "refusal"):
        values = read_refusal(setup, who, everything)
        found["refusal"] = values[1:] - values[0]
    scopes = [scope for scope in SCOPES if setup.believes and only in (None, f"consistent.{scope}")]
    for scope, replies in read_in_scopes(setup, who, everything, scopes).items() if scopes else ():
        moved = replies.changes()
        found[f"belief.{scope}"], found[f"consistent.{scope}"] = moved.belief, moved.consistent
        found[f"agreement.{scope}"] = moved.agreement
    return found


def cell_effects(
    who: Subjects,
    few: Subjects,
    names: Sequence[str],
    at: str,
    changes: Mapping[str, Float[Tensor, "done prompt"]],
    random: Mapping[str, Float[Tensor, "random few"]],
    shuffled: Mapping[str, Float[Tensor, "shuffled few"]],
    plan: CausalPlan,
) -> Effects:
    """Estimates and their nulls from the changes: of every direction added, subtracted; of nulls on few prompts."""
    effects = {}
    for measure, values in changes.items():
        chance = {label: _largest(random[measure][:, few.of(label)]) for label in (HARMFUL, HARMLESS)}
        for k, name in enumerate(names):
            for cell in CELLS:
                j = STEERED.index(cell.operation)
                promised = values[2 * k + j] * (1.0 if cell.operation == "add" else -1.0)
                tested = name == at and cell in PUSHES and measure in shuffled
                effects[EffectKey(measure, name, at, cell)] = CellEffect(
                    who.estimate(promised, plan, who.of(cell.label)),
                    chance[cell.label],
                    _largest(shuffled[measure][:, few.of(cell.label)]) if tested else nan,
                )
    return effects


def _largest(changes: Float[Tensor, "direction prompt"]) -> float:
    """Of the mean changes under several directions the largest, whatever its sign; NaN of none.

    The means are over few prompts, which adds to their spread, so they are shrunk to the spread that is left without
    it (Louis 1984). A tested direction's own interval says what prompts do to it.
    """
    if not len(changes):
        return nan
    means, n = changes.mean(dim=1), changes.shape[1]
    spread = float(means.square().mean())
    by_prompts = float(changes.var(dim=1).mean()) / n if n > 1 else 0.0
    kept = max(spread - by_prompts, 0.0) / spread if spread > 0 else 0.0
    return float(means.abs().max()) * math.sqrt(kept)


def effect_table(effects: Effects, places: Mapping[str, Mapping[str, Setting]]) -> pd.DataFrame:
    """One row a number: measure, direction, at, layer, strength, operation, label, value, low, high, n and nulls."""
    return pd.DataFrame(
        [
            {
                "measure": key.measure, "direction": key.direction, "at": key.at,
                "layer": places[key.at][key.direction].layer, "strength": places[key.at][key.direction].strength,
                "operation": key.cell.operation, "label": key.cell.label, "is_push": key.cell in PUSHES,
                **effect.change.row(), "random_max": effect.random_max, "shuffled_max": effect.shuffled_max,
            }
            for key, effect in effects.items()
        ]
    )  # fmt: skip
