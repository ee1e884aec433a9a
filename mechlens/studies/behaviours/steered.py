"""What the direction of the change does: added to the base, removed from the fine-tune, at home and elsewhere."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float64
from scipy import stats
from torch import Tensor

from mechlens.methods.behaviour.damage import plain_loss
from mechlens.methods.cache import Cache
from mechlens.methods.directions.change import ANSWER, VARIANTS
from mechlens.methods.directions.direction import Direction, random_like
from mechlens.methods.progress import phase
from mechlens.methods.statistics.crossed import crossed_difference, crossed_mean
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import family_codes, family_halves
from mechlens.methods.steering.interventions import Ablate, Add
from mechlens.methods.steering.steered_log_odds import steered_log_odds
from mechlens.models.bridge import LanguageModel, checkpoint_now
from mechlens.models.checkpoints.swap import CheckpointSwapper
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.prompts.twins import Twin
from mechlens.settings import RANDOM_DIRECTIONS
from mechlens.studies.behaviours.directions import TaughtChange, compared_levels, cosine_table, start_of, taught_changes
from mechlens.studies.behaviours.matrix import HELD_OUT, BehaviourMatrix
from mechlens.studies.behaviours.sets import PLAIN, AskedSet
from mechlens.studies.behaviours.tuned import DECORRELATED, TunedRun

STRENGTHS = (1.0, 2.0, 4.0)
"""Times the difference of means."""
CHOOSING, REPORTING, ELSEWHERE = 8, 16, 8
"""Held-out home questions on which variant and level are chosen, those that are reported, and those of another set."""
FEWEST = 4
"""Families of held-out questions in each half, below which nothing is chosen."""
ADDED, ABLATED, ABLATED_IN_BASE = "added to the base", "ablated in the fine-tune", "ablated in the base"


@dataclass(frozen=True)
class Asked:
    """Questions of one set on which an effect is measured."""

    asked: AskedSet
    rows: tuple[int, ...]

    @property
    def twins(self) -> list[Twin]:
        """The questions."""
        return [self.asked.twins[i] for i in self.rows]

    @property
    def families(self) -> list[str]:
        """By question."""
        return [twin.prompt.group for twin in self.twins]


@dataclass(frozen=True)
class ChosenDirections:
    """Of one group: the directions chosen to be added and to be ablated, and the questions behind both."""

    taught: TaughtChange
    runs: tuple[TunedRun, ...]
    added: Direction
    ablated: Direction
    report: tuple[Asked, ...]
    """Home first."""


@dataclass(frozen=True)
class Steering:
    """Everything that is measured with the models of one study."""

    swapper: CheckpointSwapper
    matrix: BehaviourMatrix
    template: ChatTemplate
    cache: Cache | None

    def effects(self, changes: Sequence[TaughtChange]) -> tuple[pd.DataFrame, dict[str, Direction]]:
        """The table of all effects, and by name the directions that were chosen."""
        controls = {run.group for run in self.matrix.runs if run.control == DECORRELATED}
        tried = [self._chosen(change) for change in changes if change.group not in controls]
        chosen = [found for found in tried if found is not None]
        rows: list[dict[str, Any]] = []
        for one in chosen:
            with phase(f"what the direction of {one.taught.group} does"):
                rows += [*self._added(one), *self._ablated(one, chosen)]
        directions = {f"added {one.taught.group}": one.added for one in chosen}
        return pd.DataFrame(rows), directions | {f"ablated {one.taught.group}": one.ablated for one in chosen}

    def _chosen(self, taught: TaughtChange) -> ChosenDirections | None:
        """Variant and level whose effect on one half of the held-out questions is nearest to the fine-tune's own.

        None where fine-tuning changed nothing clearly, or too little was held out.
        """
        runs = tuple(run for run in self.matrix.runs if run.group == taught.group)
        held = self.matrix.rows(taught.home, HELD_OUT, taught.group)
        families = [taught.home.twins[i].prompt.group for i in held]
        if len(set(families)) < 2 * FEWEST or not _clear(self._change(runs, Asked(taught.home, tuple(held)))):
            return None
        first = family_halves(families, 1, self.matrix.plan.seed)[0].tolist()
        choose, report = ([i for i, own in zip(held, first, strict=True) if own == side] for side in (True, False))
        on = Asked(taught.home, tuple(choose[:CHOOSING]))
        wanted = float((self._tuned(runs[:1], on) - self._base(on)).mean())
        levels = compared_levels(taught.change)
        candidates = [taught.change.grids[variant].at(level, ANSWER) for variant in VARIANTS for level in levels]
        candidates = [one for one in candidates if one.norm > 0]
        added = self._told(self.swapper.put(start_of(self.swapper)), on, [_push(one) for one in candidates])
        misses = (added - self._base(on)).mean(dim=1) - wanted
        order = misses.abs().argsort().tolist()
        # Ablation runs whole models, so of each variant only the level that is best to add is tried.
        best = list({candidates[k].method: candidates[k] for k in reversed(order)}.values())
        gone = self._told(self.swapper.put(runs[0].members[-1]), on, [Ablate(one) for one in best])
        removed = (self._tuned(runs[:1], on) - gone).mean(dim=1)
        home = Asked(taught.home, tuple(report[:REPORTING]))
        ablated = best[int((removed - wanted).abs().argmin())]
        return ChosenDirections(taught, runs, candidates[order[0]], ablated, (home, *self._elsewhere(taught)))

    def _elsewhere(self, taught: TaughtChange) -> list[Asked]:
        found = []
        for asked in self.matrix.sets:
            if asked.form == PLAIN and not asked.about_itself and asked.name != taught.home.name:
                rows = self.matrix.rows(asked, HELD_OUT, taught.group)
                kept = rows if len(rows) <= ELSEWHERE else Random(self.matrix.plan.seed).sample(rows, ELSEWHERE)
                found += [Asked(asked, tuple(sorted(kept)))] if kept else []
        return found

    def _added(self, one: ChosenDirections) -> list[dict[str, Any]]:
        model = self.swapper.put(start_of(self.swapper))
        drawn = random_like(one.added, RANDOM_DIRECTIONS, self.matrix.plan.seed + 7)
        pushes = [_push(direction, strength) for strength in STRENGTHS for direction in (one.added, *drawn)]
        rises = _rises(model, [pushes[i * (1 + len(drawn))] for i in range(len(STRENGTHS))])
        rows = []
        for on in one.report:
            told = self._told(model, on, pushes).reshape(len(STRENGTHS), 1 + len(drawn), -1)
            base, change = self._base(on), self._change(one.runs, on)
            moved = (self._tuned(one.runs, on) - base).mean(dim=0)
            for strength, own, rise in zip(STRENGTHS, told, rises, strict=True):
                effect = crossed_difference(own[:1], base[None], on.families)
                share = _share(own[0] - base, moved, on.families, change)
                random = (own[1:] - base).mean(dim=1)
                rows.append(_row(one, on, ADDED, one.added, strength, effect, change, share, random, rise))
        return rows

    def _ablated(self, one: ChosenDirections, every: Sequence[ChosenDirections]) -> list[dict[str, Any]]:
        """In all runs of the group, and random ones in its first; other groups' directions; its own in the base."""
        others = [other for other in every if other is not one]
        conditions = [Ablate(one.ablated), *(Ablate(other.ablated) for other in others)]
        drawn = [Ablate(own) for own in random_like(one.ablated, RANDOM_DIRECTIONS, self.matrix.plan.seed + 8)]
        found: list[list[Tensor]] = [[] for _ in one.report]
        for run in one.runs:
            model = self.swapper.put(run.members[-1])
            for on, told in zip(one.report, found, strict=True):
                told.append(self._told(model, on, conditions + (drawn if run is one.runs[0] else [])))
        rise = _rises(model, conditions[:1])[0]
        base_model, rows = self.swapper.put(start_of(self.swapper)), []
        for on, told in zip(one.report, found, strict=True):
            tuned, base, change = self._tuned(one.runs, on), self._base(on), self._change(one.runs, on)
            moved = (tuned - base).mean(dim=0)
            random = (told[0][len(conditions) :] - tuned[0]).mean(dim=1)
            for k, source in enumerate([one, *others]):
                effect = torch.stack([own[k] for own in told]) - tuned
                share = _share(-effect.mean(dim=0), moved, on.families, change)
                row = _row(one, on, ABLATED, source.ablated, math.nan, crossed_mean(effect, on.families), change,
                           share, random, rise if k == 0 else math.nan)  # fmt: skip
                rows.append({**row, "direction_of": source.taught.group})
            in_base = self._told(base_model, on, conditions[:1])
            effect_there = crossed_difference(in_base, base[None], on.families)
            rows.append(_row(one, on, ABLATED_IN_BASE, one.ablated, math.nan, effect_there, change,
                             Estimate.missing(len(on.rows)), None, math.nan))  # fmt: skip
        return rows

    def _told(
        self, model: LanguageModel, on: Asked, conditions: Sequence[Add | Ablate]
    ) -> Float64[Tensor, "condition question"]:
        here = [[_here(one, model)] for one in conditions]
        told = steered_log_odds(model, on.twins, here, template=self.template, cache=self.cache)
        return torch.stack([own.values for own in told])

    def _base(self, on: Asked) -> Float64[Tensor, " question"]:
        return self.matrix.base[on.asked.key].values[list(on.rows)]

    def _tuned(self, runs: Sequence[TunedRun], on: Asked) -> Float64[Tensor, "run question"]:
        told = [self.matrix.told[run.name, run.members[-1].step][on.asked.key] for run in runs]
        return torch.stack([own.values[list(on.rows)] for own in told])

    def _change(self, runs: Sequence[TunedRun], on: Asked) -> Estimate:
        return crossed_difference(self._tuned(runs, on), self._base(on)[None], on.families)


def _push(direction: Direction, strength: float = 1.0) -> Add:
    return Add(direction, strength=strength, unit="raw", layers=(direction.level,))


def _here(one: Add | Ablate, model: LanguageModel) -> Add | Ablate:
    """The same for this model: a change's direction is of two models, and meant for both."""
    return replace(one, direction=replace(one.direction, checkpoint=checkpoint_now(model)))


def _rises(model: LanguageModel, conditions: Sequence[Add | Ablate]) -> list[float]:
    """How much more surprising plain text becomes, in nats per token."""
    plain = plain_loss(model, None).mean()
    return [float(plain_loss(model, _here(one, model)).mean() - plain) for one in conditions]


def _clear(told: Estimate) -> bool:
    return told.measurable and (told.low > 0 or told.high < 0)


def _share(
    effect: Float64[Tensor, " question"], change: Float64[Tensor, " question"], families: Sequence[str], told: Estimate
) -> Estimate:
    """Effect over change, a ratio of means with a jackknife over questions; missing where the change isn't clear."""
    codes, n = family_codes(families)
    if not _clear(told) or n < 2:
        return Estimate.missing(len(families))
    weights = torch.cat([torch.ones(1, len(codes)), (codes != torch.arange(n)[:, None]).double()]).double()
    ratio = (weights @ effect) / (weights @ change)
    without = ratio[1:]
    reach = float(stats.t.ppf(0.975, n - 1)) * math.sqrt(float((without - without.mean()).square().sum()) * (n - 1) / n)
    value = float(ratio[0])
    return Estimate(value, value - reach, value + reach, len(families))


def _row(
    one: ChosenDirections, on: Asked, does: str, direction: Direction, strength: float, effect: Estimate,
    change: Estimate, share: Estimate, random: Float64[Tensor, " direction"] | None, rise: float,
) -> dict[str, Any]:  # fmt: skip
    """A row of the table of effects; `random_most` is the random direction that does most the intended way."""
    wanted = math.copysign(1.0, change.value) * (1 if does == ADDED else -1)
    most = math.nan if random is None else float(random[(random * wanted).argmax()])
    return {
        "group": one.taught.group, "does": does, "direction_of": one.taught.group, "variant": direction.method,
        "level": direction.level, "strength": strength, "set": on.asked.name,
        "at_home": on.asked.name == one.taught.home.name, **effect.row("effect"), **change.beside("fine_tuned"),
        **share.beside("share"), "random_mean": math.nan if random is None else float(random.mean()),
        "random_most": most, "randoms": 0 if random is None else len(random), "text_loss_rise": rise,
    }  # fmt: skip


@dataclass(frozen=True)
class DirectionResult:
    """What was found of the direction of the change."""

    cosines: pd.DataFrame
    """See `cosine_table`."""
    effects: pd.DataFrame
    """One row for each group, what was done, direction, strength and set; see `Steering`."""
    chosen: Mapping[str, Direction]

    def tables(self) -> dict[str, pd.DataFrame]:
        """Those with rows."""
        tables = {"direction_cosines": self.cosines, "direction_effects": self.effects}
        return {name: table for name, table in tables.items() if len(table)}

    def artifacts(self) -> dict[str, object]:
        """The chosen directions, under names that files can have."""
        return {re.sub(r"[^\w.-]+", "_", name).strip("_"): own for name, own in self.chosen.items()}


def measured_directions(
    swapper: CheckpointSwapper,
    matrix: BehaviourMatrix,
    template: ChatTemplate,
    saved: Mapping[str, Direction],
    cache: Cache | None,
) -> DirectionResult:
    """The direction of every group's change: its cosines, and what it does."""
    changes = taught_changes(swapper, matrix, template, cache)
    effects, chosen = Steering(swapper, matrix, template, cache).effects(changes)
    return DirectionResult(cosine_table(changes, saved, matrix.plan.seed), effects, chosen)
