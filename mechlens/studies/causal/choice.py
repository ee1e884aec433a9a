"""Which layer and strength each direction is used at, chosen on validation prompts, from coarse to fine."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.models.bridge import LanguageModel, n_layers
from mechlens.studies.causal.config import CausalPlan
from mechlens.studies.causal.directions import HARMFULNESS, REFUSAL, ContrastSource, Setting, pushes
from mechlens.studies.causal.readings import Condition, Setup, Subjects, read_refusal, read_replies

CLAIMS = {HARMFULNESS: "consistent.before", REFUSAL: "refusal"}
"""What each direction is claimed to change, by which its layer and strength are chosen."""
USABLE_DEPTH = 0.8
"""Layers from this share of the depth on are not chosen (Arditi et al. 2024): they write the output's words."""

PushAt = Callable[[Sequence[Setting]], Float[Tensor, "setting prompt"]]


@dataclass(frozen=True)
class Choice:
    """What was tried, and taken."""

    chosen: dict[str, Setting]
    """By direction."""
    table: pd.DataFrame
    """Mean change towards the other class under a push: direction, layer, strength, measure, value, low, high, n."""
    cells: pd.DataFrame
    """How many cells of the whole grid (layers below the last fifth, strengths) were tried, and why the others
    weren't: direction, outcome (see `TRIED`), n."""


TRIED, NOT_ASKED = "tried", "not tried: layer not asked for"
FAR, WEAKER = "not tried: layer not beside the best of the first", "not tried: not the best layer, so one strength only"
"""Outcomes of a cell."""


def grid_layers(model: LanguageModel, asked: Sequence[int], every: int) -> tuple[int, ...]:
    """The layers asked for, or every so many; not the first, at whose input all prompts have one vector at `last`."""
    last = n_layers(model) - 1
    wrong = [layer for layer in asked if not 1 <= layer <= last]
    if wrong:
        raise UserError(
            f"there is no layer {wrong[0]} to intervene at, only 1 to {last}; leave --layers out or change it"
        )
    layers = tuple(asked) or tuple(range(min(max(every - 1, 1), last), last + 1, every))
    if min(layers) >= USABLE_DEPTH * n_layers(model):
        raise UserError(
            f"the lowest layer is {min(layers)} of {last}, and none in the last fifth of the depth can be chosen; add "
            "lower ones"
        )
    return layers


def middle(strengths: Sequence[float]) -> float:
    """The strength at which layers are compared."""
    return sorted(strengths)[len(strengths) // 2]


def choose(
    setup: Setup,
    who: Subjects,
    sources: dict[str, ContrastSource],
    layers: Sequence[int],
    known: dict[str, Float[Tensor, "layer prompt"]],
) -> Choice:
    """From coarse to fine (see `_coarse_to_fine`), or every cell if the plan says so.

    `known` are pushes that were measured at all `layers` already, by direction. Where belief isn't measurable, the
    harmfulness direction is chosen by refusal too.
    """
    rows: list[dict[str, object]] = []
    cells: list[dict[str, object]] = []
    chosen = {}
    depth, plan = n_layers(setup.model), setup.plan
    # In a model of one block its input is all there is.
    usable = [layer for layer in range(1, depth) if layer < USABLE_DEPTH * depth] or list(layers)
    whole = [Setting(layer, strength) for layer in usable for strength in plan.strengths]
    for name, source in sources.items():
        measure = CLAIMS[name] if setup.believes else CLAIMS[REFUSAL]
        pushed = _pusher(setup, who, source, measure)
        first = [Setting(layer, middle(plan.strengths)) for layer in layers]
        before = dict(zip(first, known[name], strict=True)) if name in known else {}
        if plan.grid == "all":
            tried = _tried(pushed, whole, before)
        else:
            tried = _coarse_to_fine(pushed, first, before, depth, plan)
        of_name = [
            {
                "direction": name, "layer": setting.layer, "strength": setting.strength, "measure": measure,
                **who.estimate(change, plan).row(),
            }
            for setting, change in tried.items()
        ]  # fmt: skip
        chosen[name] = best(pd.DataFrame(of_name), depth)
        rows += of_name
        outcomes = Counter(_outcome(cell, tried, plan) for cell in whole)
        cells += [{"direction": name, "outcome": outcome, "n": n} for outcome, n in outcomes.items()]
    return Choice(chosen, pd.DataFrame(rows), pd.DataFrame(cells))


def _outcome(cell: Setting, tried: Mapping[Setting, object], plan: CausalPlan) -> str:
    """What became of a cell of the whole grid."""
    if cell in tried:
        return TRIED
    if plan.layers and cell.layer not in plan.layers:
        return NOT_ASKED
    return WEAKER if Setting(cell.layer, middle(plan.strengths)) in tried else FAR


def _pusher(setup: Setup, who: Subjects, source: ContrastSource, measure: str) -> PushAt:
    """Settings to the change towards the other class that pushing every prompt there makes."""
    sign = torch.where(who.harmful, -1.0, 1.0).double()

    def pushed(settings: Sequence[Setting]) -> Float[Tensor, "setting prompt"]:
        if not settings:
            return torch.empty(0, len(who.prompts), dtype=torch.float64)
        conditions: list[Condition] = [[None] * len(who.prompts)]
        conditions += [pushes(source.direction(at.layer), at, setup.norms, who.labels) for at in settings]
        if measure == CLAIMS[REFUSAL]:
            values = read_refusal(setup, who, conditions)
            return (values[1:] - values[0]) * sign
        return read_replies(setup, who, conditions, "before").changes().consistent * sign

    return pushed


Pushed = dict[Setting, Float[Tensor, " prompt"]]


def _tried(pushed: PushAt, settings: Sequence[Setting], before: Pushed) -> Pushed:
    """What was tried before, and the settings that weren't."""
    new = [setting for setting in settings if setting not in before]
    return before | dict(zip(new, pushed(new), strict=True))


def _coarse_to_fine(pushed: PushAt, first: Sequence[Setting], known: Pushed, depth: int, plan: CausalPlan) -> Pushed:
    """The first layers that can be chosen at the middle strength, the best one's neighbours, its other strengths."""
    usable = USABLE_DEPTH * depth
    tried = _tried(pushed, [at for at in first if at.layer < usable], known)

    def top() -> int:
        return max((at for at in tried if at.layer < usable), key=lambda at: float(tried[at].mean())).layer

    beside = [] if plan.layers else [top() - 1, top() + 1]
    tried = _tried(pushed, [Setting(at, middle(plan.strengths)) for at in beside if 1 <= at < usable], tried)
    return _tried(pushed, [Setting(top(), strength) for strength in plan.strengths], tried)


def best(pushes: pd.DataFrame, depth: int) -> Setting:
    """The weakest strength with a push inside the interval of the largest, at the layer where it pushes most.

    A stronger push that does little more mostly breaks more.
    """
    mine = pushes[pushes["layer"] < USABLE_DEPTH * depth].sort_values("value", ascending=False, kind="stable")
    near = mine[~(mine["value"] < mine["low"].iloc[0])]  # all of them where none is a number
    row = near[near["strength"] == near["strength"].min()].iloc[0]
    return Setting(int(row["layer"]), float(row["strength"]))
