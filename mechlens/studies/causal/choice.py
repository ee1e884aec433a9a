"""Which layer and strength each direction is used at, chosen on validation prompts, from coarse to fine."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.behaviour.answers import Answers
from mechlens.methods.steering.equal_damage import FIRST, Calibration, calibrated
from mechlens.methods.steering.interventions import Add
from mechlens.models.bridge import LanguageModel, n_layers
from mechlens.prompts.batch import TokenBatch
from mechlens.studies.causal.config import CausalPlan
from mechlens.studies.causal.directions import HARMFULNESS, REFUSAL, ContrastSource, Setting, intervene, pushes
from mechlens.studies.causal.readings import Condition, Setup, Subjects, read_refusal, read_replies

CLAIMS = {HARMFULNESS: "consistent.before", REFUSAL: "refusal"}
"""What each direction is claimed to change, by which its layer and strength are chosen."""
USABLE_DEPTH = 0.8
"""Layers from this share of the depth on are not chosen (Arditi et al. 2024): they write the output's words."""

PushAt = Callable[[Sequence[Setting]], Float[Tensor, "setting prompt"]]


@dataclass(frozen=True)
class Choice:
    """What was tried, and taken."""

    places: dict[str, dict[str, Setting]]
    """By the direction whose best layer it is: how strongly each direction is put there."""
    table: pd.DataFrame
    """Mean change towards the other class under a push: direction, layer, strength, measure, value, low, high, n."""
    cells: pd.DataFrame
    """How many cells of the whole grid (layers below the last fifth, strengths) were tried, and why the others
    weren't: direction, outcome (see `TRIED`), n."""

    @property
    def chosen(self) -> dict[str, Setting]:
        """By direction."""
        return {name: beside[name] for name, beside in self.places.items()}


TRIED, NOT_ASKED = "tried", "not tried: layer not asked for"
UNREACHED = "not tried: the KL isn't reached there"
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


@dataclass(frozen=True)
class Strengths:
    """How strongly directions are put at layers: by the plan's strengths, or by the one of equal damage."""

    setup: Setup
    sources: dict[str, ContrastSource]
    harmless: TokenBatch
    """Validation prompts, by whose unsteered answers the damage of a push is measured."""
    said: Answers
    found: dict[tuple[str, int], Calibration] = field(default_factory=dict)
    """By direction and layer; each is worked out once, when it is asked for."""

    @property
    def plan(self) -> CausalPlan:
        """What was asked for."""
        return self.setup.plan

    def calibration(self, name: str, layer: int) -> Calibration:
        """The strength at which adding a direction there damages harmless answers by the plan's KL."""
        assert self.plan.calibrate_kl is not None
        if (name, layer) not in self.found:
            push = intervene(self.sources[name].direction(layer), "add", Setting(layer, FIRST), self.setup.norms)
            assert isinstance(push, Add)
            kl = self.plan.calibrate_kl
            self.found[name, layer] = calibrated(self.setup.model, push, self.harmless, self.said, kl)
        return self.found[name, layer]

    def at(self, name: str, layer: int) -> list[Setting]:
        """What can be chosen at a layer; nothing where the KL isn't reached."""
        if self.plan.calibrate_kl is None:
            return [Setting(layer, strength) for strength in self.plan.strengths]
        own = self.calibration(name, layer)
        return [Setting(layer, own.push.strength)] if own.reached else []

    def compared(self, name: str, layers: Sequence[int]) -> list[Setting]:
        """By which layers are compared."""
        if self.plan.calibrate_kl is None:
            return [Setting(layer, middle(self.plan.strengths)) for layer in layers]
        return [setting for layer in layers for setting in self.at(name, layer)]

    def beside(self, name: str, setting: Setting) -> Setting:
        """How strongly this direction is put where another is: as strongly, or for the same damage."""
        if self.plan.calibrate_kl is None:
            return setting
        return Setting(setting.layer, self.calibration(name, setting.layer).push.strength)

    def outcome(self, name: str, layer: int, strength: float | None, tried: Mapping[Setting, object]) -> str:
        """What became of a cell of the whole grid; `strength` is None where it is found by damage."""
        if any(one.layer == layer and strength in (None, one.strength) for one in tried):
            return TRIED
        if (name, layer) in self.found:
            return UNREACHED
        if self.plan.layers and layer not in self.plan.layers:
            return NOT_ASKED
        return WEAKER if any(one.layer == layer for one in tried) else FAR

    def table(self) -> pd.DataFrame:
        """What was found: direction, layer, strength, kl, reached, passes, tokens; empty without a KL."""
        rows = [
            {
                "direction": name, "layer": layer, "strength": one.push.strength, "kl": one.kl, "reached": one.reached,
                "passes": one.passes, "tokens": one.tokens,
            }
            for (name, layer), one in sorted(self.found.items())
        ]  # fmt: skip
        return pd.DataFrame(rows)


def choose(
    setup: Setup,
    who: Subjects,
    strengths: Strengths,
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
    for name, source in strengths.sources.items():
        measure = CLAIMS[name] if setup.believes else CLAIMS[REFUSAL]
        pushed = _pusher(setup, who, source, measure)
        before = dict(zip(strengths.compared(name, layers), known[name], strict=True)) if name in known else {}
        if plan.grid == "all":
            tried = _tried(pushed, [one for layer in usable for one in strengths.at(name, layer)], before)
        else:
            tried = _coarse_to_fine(pushed, name, layers, before, depth, strengths)
        of_name = [
            {
                "direction": name, "layer": setting.layer, "strength": setting.strength, "measure": measure,
                **who.estimate(change, plan).row(),
            }
            for setting, change in tried.items()
        ]  # fmt: skip
        chosen[name] = best(pd.DataFrame(of_name), depth, equal_damage=plan.calibrate_kl is not None)
        rows += of_name
        given = plan.strengths if plan.calibrate_kl is None else (None,)
        outcomes = Counter(strengths.outcome(name, layer, one, tried) for layer in usable for one in given)
        cells += [{"direction": name, "outcome": outcome, "n": n} for outcome, n in outcomes.items()]
    places = {
        at: {name: setting if name == at else strengths.beside(name, setting) for name in strengths.sources}
        for at, setting in chosen.items()
    }
    return Choice(places, pd.DataFrame(rows), pd.DataFrame(cells))


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


def _coarse_to_fine(
    pushed: PushAt, name: str, layers: Sequence[int], known: Pushed, depth: int, strengths: Strengths
) -> Pushed:
    """The first layers that can be chosen at the middle strength, the best one's neighbours, its other strengths."""
    usable = USABLE_DEPTH * depth
    tried = _tried(pushed, strengths.compared(name, [layer for layer in layers if layer < usable]), known)

    def top() -> int:
        return max((at for at in tried if at.layer < usable), key=lambda at: float(tried[at].mean())).layer

    if not any(at.layer < usable for at in tried):
        raise UserError(
            f"adding the {name} direction reaches {strengths.plan.calibrate_kl:g} nats at none of the layers "
            f"{', '.join(map(str, layers))}; give a smaller --calibrate-kl, or other --layers"
        )
    beside = [] if strengths.plan.layers else [at for at in (top() - 1, top() + 1) if 1 <= at < usable]
    tried = _tried(pushed, strengths.compared(name, beside), tried)
    return _tried(pushed, strengths.at(name, top()), tried)


def best(pushes: pd.DataFrame, depth: int, *, equal_damage: bool = False) -> Setting:
    """The weakest strength with a push inside the interval of the largest, at the layer where it pushes most.

    A stronger push that does little more mostly breaks more; at equal damage it is simply the largest.
    """
    mine = pushes[pushes["layer"] < USABLE_DEPTH * depth].sort_values("value", ascending=False, kind="stable")
    near = mine[~(mine["value"] < mine["low"].iloc[0])]  # all of them where none is a number
    row = mine.iloc[0] if equal_damage else near[near["strength"] == near["strength"].min()].iloc[0]
    return Setting(int(row["layer"]), float(row["strength"]))
