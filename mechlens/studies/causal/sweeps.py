"""What the two directions do at every layer, and from every position: the figures of Zhao et al. 2025."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.behaviour.inversion import Scope
from mechlens.methods.directions.direction import cosine
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import with_interval
from mechlens.models.bridge import n_layers
from mechlens.studies.causal.config import CausalPlan
from mechlens.studies.causal.directions import (
    CELLS,
    HARMFULNESS,
    HARMLESS,
    REFUSAL,
    STEERED,
    ContrastSource,
    Operation,
    Setting,
    intervene,
    published,
    pushes,
)
from mechlens.studies.causal.readings import Condition, Replies, Setup, Subjects, read_refusal, read_replies

SCOPE: dict[str, Scope] = {HARMFULNESS: "before", REFUSAL: "all"}
"""Where the paper put each direction when it asked about requests."""


# Fig. 4: refusal of harmless requests


@dataclass(frozen=True)
class RefusalByLayer:
    """Harmless requests with each raw direction added at each layer."""

    layers: tuple[int, ...]
    log_odds: dict[str, Float[Tensor, "layer prompt"]]
    """Change of the log-odds that the answer starts as a refusal."""
    table: pd.DataFrame
    """direction, layer, value (share whose likeliest first token is a refusal's by log-odds above 0), low, high, n."""
    families: tuple[str, ...]


def refusal_by_layer(setup: Setup, who: Subjects, sources: dict[str, ContrastSource]) -> RefusalByLayer:
    """Every layer but the first, at whose input all prompts have one vector at `last`."""
    harmless = who.select(who.of(HARMLESS))
    layers, plan = tuple(range(1, n_layers(setup.model))), setup.plan
    conditions: list[Condition] = [[None] * len(harmless.prompts)]
    for source in sources.values():
        for layer in layers:
            conditions.append([published(source.direction(layer), layer, plan.coefficient)] * len(harmless.prompts))
    values = read_refusal(setup, harmless, conditions)
    rows = []
    for k, (direction, layer) in enumerate([("none", -1), *((name, at) for name in sources for at in layers)]):
        rows.append({"direction": direction, "layer": layer, **harmless.rate(values[k] > 0, plan).row()})
    changes = (values[1:] - values[0]).reshape(len(sources), len(layers), len(harmless.prompts))
    by_name = dict(zip(sources, changes, strict=True))
    return RefusalByLayer(layers, by_name, pd.DataFrame(rows), harmless.families)


@dataclass(frozen=True)
class DepthGap:
    """How much deeper the refusal direction raises refusal than the harmfulness direction does."""

    layers: Estimate
    """Difference of the two centres of effect, in layers; above 0: refusal acts later."""
    p: float
    """Of a two-sided permutation test: the two profiles over layers exchanged within prompt families."""


def depth_gap(found: RefusalByLayer, seed: int, resamples: int) -> DepthGap:
    """The early/late split: each direction's centre of effect over the layers, and whether they differ.

    A centre is the mean layer, weighted by the mean change of the log-odds there (changes below 0 count as none), so
    it doesn't depend on how much a direction does. Interval: bootstrap over families; p: profiles are scaled to the
    same height and exchanged between the directions, family by family.
    """
    if set(found.log_odds) != {HARMFULNESS, REFUSAL}:
        return DepthGap(Estimate.missing(len(found.families)), float("nan"))
    families = list(dict.fromkeys(found.families))
    member = torch.tensor([[family == own for own in found.families] for family in families]).double()
    harm, refusal = (_scaled(found.log_odds[name].double() @ member.T) for name in (HARMFULNESS, REFUSAL))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(families), (resamples, len(families)), generator=generator)
    weights = torch.zeros(resamples, len(families), dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    centre = _Centre(torch.tensor(found.layers).double())
    everyone = torch.ones(1, len(families), dtype=torch.float64)
    gap = centre(refusal @ everyone.T) - centre(harm @ everyone.T)
    if not bool(torch.isfinite(gap)):
        return DepthGap(Estimate.missing(len(found.families)), float("nan"))
    resampled = centre(refusal @ weights.T) - centre(harm @ weights.T)
    exchanged = torch.randint(2, (resamples, len(families)), generator=generator).double().T
    swapped = centre(refusal @ (1 - exchanged) + harm @ exchanged) - centre(
        harm @ (1 - exchanged) + refusal @ exchanged
    )
    # An exchange under which a direction does nothing anywhere has no centre; it counts against a difference.
    extreme = int((~(swapped.abs() < gap.abs())).sum())
    estimate = with_interval(float(gap), resampled, len(found.families))
    return DepthGap(estimate, (1 + extreme) / (1 + resamples))


@dataclass(frozen=True)
class _Centre:
    layers: Float[Tensor, " layer"]

    def __call__(self, profile: Float[Tensor, "layer draw"]) -> Float[Tensor, " draw"]:
        """Mean layer weighted by the profile, as far as it is positive; NaN where it nowhere is."""
        weight = profile.clamp(min=0)
        return (self.layers[:, None] * weight).sum(dim=0) / weight.sum(dim=0)


def _scaled(profiles: Float[Tensor, "layer family"]) -> Float[Tensor, "layer family"]:
    """To a mean profile of height 1, so that directions of different effect can be exchanged."""
    height = profiles.mean(dim=1).abs().max()
    return profiles / height if height > 0 else profiles


# Fig. 5: replies to questions about the request


@dataclass(frozen=True)
class RepliesByLayer:
    """Each direction added and subtracted at some layers, in the paper's scope."""

    pushes: dict[str, Float[Tensor, "setting prompt"]]
    """By direction: change of belief towards the other class, added to harmless and subtracted from harmful ones."""
    table: pd.DataFrame
    """direction, layer, strength, operation, label, measure (no.straight: share of No; no.reversed; belief), ..."""


def replies_by_layer(
    setup: Setup, who: Subjects, sources: dict[str, ContrastSource], compared: Mapping[str, Sequence[Setting]]
) -> RepliesByLayer:
    """All four cells at every setting of each direction, both questions each."""
    n = len(who.prompts)
    rows: list[dict[str, object]] = []
    by_name = {}
    for name, source in sources.items():
        conditions: list[Condition] = [[None] * n]
        settings = compared[name]
        for setting in settings:
            direction = source.direction(setting.layer)
            conditions += [[intervene(direction, operation, setting, setup.norms)] * n for operation in STEERED]
        replies = read_replies(setup, who, conditions, SCOPE[name])
        changes = replies.changes().consistent.reshape(len(settings), len(STEERED), n)
        by_name[name] = torch.where(who.harmful, -changes[:, 1], changes[:, 0])
        if not rows:
            rows += _said(who, replies, 0, ("none", None), None, setup.plan)
        for k, setting in enumerate(settings):
            for j, operation in enumerate(STEERED):
                rows += _said(who, replies, 1 + 2 * k + j, (name, operation), setting, setup.plan)
    return RepliesByLayer(by_name, pd.DataFrame(rows))


def _said(
    who: Subjects,
    replies: Replies,
    row: int,
    done: tuple[str, Operation | None],
    setting: Setting | None,
    plan: CausalPlan,
) -> list[dict[str, object]]:
    """One condition's rows of the table."""
    name, operation = done
    place = {"layer": setting.layer if setting else -1, "strength": setting.strength if setting else 0.0}
    says_no = {"no.straight": replies.straight[row] < 0, "no.reversed": replies.reversed[row] < 0}
    rows: list[dict[str, object]] = []
    for label in dict.fromkeys(cell.label for cell in CELLS):
        members = who.of(label)
        where = {"direction": name, "operation": operation or "none", **place, "label": label}
        for measure, flags in says_no.items():
            rows.append({**where, "measure": measure, **who.rate(flags, plan, members).row()})
        rows.append({**where, "measure": "belief", **who.estimate(replies.belief[row], plan, members).row()})
    return rows


# App. F.2: directions from every position


def by_position(
    setup: Setup, who: Subjects, sources: dict[str, ContrastSource], chosen: dict[str, Setting]
) -> pd.DataFrame:
    """Both contrasts' directions from each position at their chosen setting, all before the question.

    Columns direction, position, layer, strength, cosine (with the one that is tested), measure ("refusal", and
    "consistent.before" where belief is measurable: mean change towards the other class under a push), value, low,
    high, n.
    """
    rows = []
    nothing: Condition = [None] * len(who.prompts)
    sign = torch.where(who.harmful, -1.0, 1.0).double()
    for name, source in sources.items():
        setting = chosen[name]
        tested = source.direction(setting.layer)
        positions = source.acts.positions
        others = [replace(source, position=position).direction(setting.layer) for position in positions]
        done = [pushes(one, setting, setup.norms, who.labels) if one.norm else nothing for one in others]
        values = read_refusal(setup, who, [nothing, *done])
        changes = {"refusal": values[1:] - values[0]}
        if setup.believes:
            changes["consistent.before"] = read_replies(setup, who, [nothing, *done], "before").changes().consistent
        for k, (position, one) in enumerate(zip(positions, others, strict=True)):
            where = {
                "direction": name, "position": position, "layer": setting.layer, "strength": setting.strength,
                "cosine": float(cosine(one.vector, tested.vector)),
            }  # fmt: skip
            for measure, change in changes.items():
                rows.append({**where, "measure": measure, **who.estimate(change[k] * sign, setup.plan).row()})
    return pd.DataFrame(rows)
