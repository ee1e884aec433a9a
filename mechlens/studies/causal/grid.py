"""The battery's first half, on validation prompts: every operation at every layer and strength, and the choice."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import random_like
from mechlens.methods.steering.interventions import ResidualNorms
from mechlens.models.bridge import LanguageModel, n_layers
from mechlens.studies.causal.config import CausalPlan
from mechlens.studies.causal.directions import (
    HARMFUL,
    HARMFULNESS,
    HARMLESS,
    OPERATIONS,
    PUSH,
    REFUSAL,
    ContrastSource,
    Operation,
    Setting,
    intervene,
    pushes,
)
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

RANDOM = "random"
GRID_RANDOM = 2
"""Random directions at every layer and strength, for the curves; the verdict's controls are on test prompts."""
CHOSEN_BY = {HARMFULNESS: "inversion.before", REFUSAL: "refusal"}
"""What each direction is claimed to change, by which its layer and strength are chosen."""
USABLE_DEPTH = 0.8
"""Layers from this share of the depth on are not chosen (Arditi et al. 2024): they write the output's words."""


@dataclass(frozen=True)
class GridCell:
    """One operation with one direction at one setting, on every prompt."""

    direction: str
    operation: Operation
    setting: Setting
    condition: Condition

    @property
    def columns(self) -> dict[str, object]:
        """How tables name it; an ablation has no strength."""
        strength = nan if self.operation == "ablate" else self.setting.strength
        return {
            "direction": self.direction, "operation": self.operation, "layer": self.setting.layer, "strength": strength
        }  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """What every operation did at every layer and strength, by means over validation prompts."""

    values: pd.DataFrame
    """Every measure by class: direction, operation, layer, strength, label, measure, value, low, high, n."""
    pushes: pd.DataFrame
    """Mean change towards the other class, of random directions too: direction, layer, strength, measure, value, ..."""
    rates: pd.DataFrame
    """Share of refusals: harmless prompts under addition, harmful ones under subtraction and ablation."""
    chosen: dict[str, Setting]
    """Layer and strength by direction."""


def grid_layers(model: LanguageModel, asked: Sequence[int], every: int) -> tuple[int, ...]:
    """The layers asked for, or every so many; not the first, at whose input all prompts have one vector at `last`."""
    last = n_layers(model) - 1
    wrong = [layer for layer in asked if not 1 <= layer <= last]
    if wrong:
        raise UserError(
            f"there is no layer {wrong[0]} to intervene at, only 1 to {last}; leave --layers out or change it"
        )
    layers = tuple(asked) or tuple(range(min(max(every - 1, 1), last), last + 1, every))
    if layers[0] >= USABLE_DEPTH * n_layers(model):
        raise UserError(
            f"the lowest layer is {layers[0]} of {last}, and none in the last fifth of the depth can be chosen; add "
            "lower ones"
        )
    return layers


def run_grid(
    model: LanguageModel,
    who: Subjects,
    contrasts: dict[str, ContrastSource],
    settings: Sequence[Setting],
    norms: ResidualNorms,
    words: ReadTokens,
    plan: CausalPlan,
    cache: Cache | None,
) -> Grid:
    """Every condition on every validation prompt, and the choice of a setting by its push (see `CHOSEN_BY`)."""
    cells = _cells(contrasts, settings, norms, len(who.prompts))
    chances = _random_pushes(contrasts, settings, norms, who, plan.seed)
    conditions: list[Condition] = [
        [None] * len(who.prompts),
        *(cell.condition for cell in cells),
        *(condition for _, condition in chances),
    ]
    everything = read(model, who, conditions, words, cache)
    first = 1 + len(cells)
    unsteered, values, controls = everything[:1], everything[1:first], everything[first:]
    table = _pushes(who, cells, values, unsteered[0], plan)
    table += _random_rows(who, chances, controls, unsteered[0], plan)
    frame = pd.DataFrame(table)
    return Grid(
        values=pd.DataFrame(_values(who, cells, values, unsteered[0], plan)),
        pushes=frame,
        rates=pd.DataFrame(_rates(model, who, cells, plan, cache)),
        chosen={name: _best(frame, name, n_layers(model)) for name in contrasts},
    )


def _cells(
    contrasts: dict[str, ContrastSource], settings: Sequence[Setting], norms: ResidualNorms, n: int
) -> list[GridCell]:
    """Every operation of every direction; an ablation once a layer, as it has no strength."""
    cells = []
    for name, source in contrasts.items():
        directions = {layer: source.direction(layer) for layer in dict.fromkeys(s.layer for s in settings)}
        first = {layer: next(s for s in settings if s.layer == layer) for layer in directions}
        for operation in OPERATIONS:
            for setting in first.values() if operation == "ablate" else settings:
                edit = intervene(directions[setting.layer], operation, setting, norms)
                cells.append(GridCell(name, operation, setting, [edit] * n))
    return cells


def _random_pushes(
    contrasts: dict[str, ContrastSource], settings: Sequence[Setting], norms: ResidualNorms, who: Subjects, seed: int
) -> list[tuple[Setting, Condition]]:
    """A few random directions at every setting; strengths are shares of the residual norm, so one set serves all."""
    source = next(iter(contrasts.values()))
    return [
        (setting, pushes(direction, setting, norms, who.labels))
        for setting in settings
        for direction in random_like(source.direction(setting.layer), GRID_RANDOM, seed + setting.layer)
    ]


def _values(
    who: Subjects, cells: Sequence[GridCell], values: Tensor, unsteered: Tensor, plan: CausalPlan
) -> list[dict[str, object]]:
    named = [({"direction": "", "operation": "none", "layer": -1, "strength": nan}, unsteered)]
    named += [(cell.columns, row) for cell, row in zip(cells, values, strict=True)]
    return [
        {**name, "label": label, "measure": measure, **who.estimate(row[:, k], plan, who.of(label)).row()}
        for name, row in named
        for label in PUSH
        for k, measure in enumerate(MEASURES)
    ]


def _pushes(
    who: Subjects, cells: Sequence[GridCell], values: Tensor, unsteered: Tensor, plan: CausalPlan
) -> list[dict[str, object]]:
    """Added to harmless prompts and subtracted from harmful ones: two cells make one push."""
    rows: list[dict[str, object]] = []
    by_name = {(c.direction, c.setting, c.operation): value for c, value in zip(cells, values, strict=True)}
    for direction, setting in dict.fromkeys((c.direction, c.setting) for c in cells if c.operation == "add"):
        added, taken = (by_name[direction, setting, PUSH[label]] for label in (HARMLESS, HARMFUL))
        change = pushed(torch.where(who.harmful[:, None], taken, added), unsteered, who.harmful)
        rows += _push_rows(direction, setting, change, who, plan)
    return rows


def _random_rows(
    who: Subjects, chances: Sequence[tuple[Setting, Condition]], values: Tensor, unsteered: Tensor, plan: CausalPlan
) -> list[dict[str, object]]:
    """Mean over the random directions of a setting."""
    change = pushed(values, unsteered, who.harmful)
    rows: list[dict[str, object]] = []
    for setting in dict.fromkeys(setting for setting, _ in chances):
        mine = [i for i, (of, _) in enumerate(chances) if of == setting]
        rows += _push_rows(RANDOM, setting, change[mine].mean(dim=0), who, plan)
    return rows


def _push_rows(
    direction: str, setting: Setting, change: Float[Tensor, "prompt measure"], who: Subjects, plan: CausalPlan
) -> list[dict[str, object]]:
    return [
        {
            "direction": direction,
            "layer": setting.layer,
            "strength": setting.strength,
            "measure": measure,
            **who.estimate(change[:, k], plan).row(),
        }
        for k, measure in enumerate(MEASURES)
    ]


def _rates(
    model: LanguageModel, who: Subjects, cells: Sequence[GridCell], plan: CausalPlan, cache: Cache | None
) -> list[dict[str, object]]:
    """Refusals where there is something to change: of harmless prompts under addition, of harmful ones otherwise."""
    rows: list[dict[str, object]] = []
    for label in PUSH:
        members = who.of(label)
        mine = [cell for cell in cells if (cell.operation == PUSH[HARMLESS]) == (label == HARMLESS)]
        conditions: list[Condition] = [[None] * len(members), *([cell.condition[i] for i in members] for cell in mine)]
        values = refused(model, who.batch.select(members), conditions, plan, cache)
        families = [who.families[i] for i in members]
        named = [{"direction": "", "operation": "none", "layer": -1, "strength": nan}, *(c.columns for c in mine)]
        rows += [
            {**name, "label": label, **family_mean(value, families, plan).row()}
            for name, value in zip(named, values, strict=True)
        ]
    return rows


def _best(pushes: pd.DataFrame, direction: str, layers: int) -> Setting:
    """The weakest strength with a push inside the interval of the largest, at the layer where it pushes most.

    A stronger push that does little more mostly breaks more.
    """
    usable = pushes["layer"] < USABLE_DEPTH * layers
    mine = pushes[(pushes["direction"] == direction) & (pushes["measure"] == CHOSEN_BY[direction]) & usable]
    mine = mine.sort_values("value", ascending=False, kind="stable")
    near = mine[mine["value"] >= mine["low"].iloc[0]]
    row = near[near["strength"] == near["strength"].min()].iloc[0]
    return Setting(int(row["layer"]), float(row["strength"]))
