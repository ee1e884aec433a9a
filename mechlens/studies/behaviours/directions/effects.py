"""What the direction of the change does: added to the base, removed from the fine-tune, at home and elsewhere."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from mechlens.methods.behaviour.damage import plain_loss
from mechlens.methods.cache import Cache
from mechlens.methods.directions.change import ANSWER
from mechlens.methods.directions.direction import Direction, random_like
from mechlens.methods.progress import phase
from mechlens.methods.statistics.crossed import crossed_difference, crossed_mean
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import family_halves
from mechlens.methods.steering.interventions import Ablate, Add
from mechlens.methods.steering.steered_log_odds import steered_log_odds
from mechlens.models.bridge import LanguageModel, checkpoint_now
from mechlens.models.checkpoints.swap import CheckpointSwapper
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.settings import RANDOM_DIRECTIONS
from mechlens.studies.behaviours.directions.cosines import TaughtChange, compared_levels, start_of
from mechlens.studies.behaviours.directions.effect_rows import (
    ABLATED,
    ABLATED_IN_BASE,
    ADDED,
    Asked,
    ChosenDirections,
    effect_row,
    share_of,
)
from mechlens.studies.behaviours.matrix import HELD_OUT, BehaviourMatrix
from mechlens.studies.behaviours.sets import PLAIN
from mechlens.studies.behaviours.tuned import DECORRELATED, TunedRun, control_of
from mechlens.studies.behaviours.verdict import is_clear

STRENGTHS = (1.0, 2.0, 4.0)
"""Times the difference of means."""
CHOOSING, REPORTING, ELSEWHERE = 8, 16, 8
"""Held-out home questions on which variant and level are chosen, those that are reported, and those of another set."""
MOST_RISE = 0.5
"""Nats per token by which plain text may become more surprising than fine-tuning makes it: beyond, models break."""
FEWEST = 4
"""Families of held-out questions in each half, below which nothing is chosen."""


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
        if len(set(families)) < 2 * FEWEST or not is_clear(self._change(runs, Asked(taught.home, tuple(held)))):
            return None
        first = family_halves(families, 1, self.matrix.plan.seed)[0].tolist()
        choose, report = ([i for i, own in zip(held, first, strict=True) if own == side] for side in (True, False))
        on = Asked(taught.home, tuple(choose[:CHOOSING]))
        wanted = float((self._tuned(runs[:1], on) - self._start(runs, on).mean(dim=0)).mean())
        change = taught.change
        levels = compared_levels(change.acts.levels)
        candidates = [change.grids[variant].at(level, ANSWER) for variant in change.variants for level in levels]
        candidates = [one for one in candidates if one.norm > 0]
        pushed = self._told(self.swapper.put(start_of(self.swapper)), on, [_push(one) for one in candidates])
        misses = (pushed - self._base(on)).mean(dim=1) - wanted
        order = misses.abs().argsort().tolist()
        # Ablation runs whole models, so of each variant only the level that is best to add is tried.
        best = list({candidates[k].method: candidates[k] for k in reversed(order)}.values())
        tuned = self.swapper.put(runs[0].members[-1])
        gone = self._told(tuned, on, [Ablate(one) for one in best])
        removed = (self._tuned(runs[:1], on) - gone).mean(dim=1)
        own = float(plain_loss(tuned, None).mean())
        ablate = [Ablate(best[k]) for k in (removed - wanted).abs().argsort().tolist()]
        start = self.swapper.put(start_of(self.swapper))
        most = max(own, float(plain_loss(start, None).mean())) + MOST_RISE
        added = gentlest(start, [_push(candidates[k]) for k in order], most)
        ablated = gentlest(self.swapper.put(runs[0].members[-1]), ablate, most)
        home = Asked(taught.home, tuple(report[:REPORTING]))
        return ChosenDirections(taught, runs, added, ablated, (home, *self._elsewhere(taught)))

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
            moved = self._tuned(one.runs, on).mean(dim=0) - self._start(one.runs, on).mean(dim=0)
            for strength, own, rise in zip(STRENGTHS, told, rises, strict=True):
                effect = crossed_difference(own[:1], base[None], on.families)
                share = share_of(own[0] - base, moved, on.families, change)
                random = (own[1:] - base).mean(dim=1)
                rows.append(effect_row(one, on, ADDED, one.added, strength, effect, change, share, random, rise))
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
            moved = (tuned - self._start(one.runs, on).mean(dim=0)).mean(dim=0)
            random = (told[0][len(conditions) :] - tuned[0]).mean(dim=1)
            for k, source in enumerate([one, *others]):
                effect = torch.stack([own[k] for own in told]) - tuned
                share = share_of(-effect.mean(dim=0), moved, on.families, change)
                row = effect_row(one, on, ABLATED, source.ablated, math.nan, crossed_mean(effect, on.families), change,
                           share, random, rise if k == 0 else math.nan)  # fmt: skip
                rows.append({**row, "direction_of": source.taught.group})
            in_base = self._told(base_model, on, conditions[:1])
            effect_there = crossed_difference(in_base, base[None], on.families)
            rows.append(effect_row(one, on, ABLATED_IN_BASE, one.ablated, math.nan, effect_there, change,
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
        return torch.stack([self.matrix.final(run, on.asked.key).values[list(on.rows)] for run in runs])

    def _change(self, runs: Sequence[TunedRun], on: Asked) -> Estimate:
        return crossed_difference(self._tuned(runs, on), self._start(runs, on), on.families)

    def _start(self, runs: Sequence[TunedRun], on: Asked) -> Float64[Tensor, "run question"]:
        """What the change is counted from: the decorrelated control's runs, or where there is none the base."""
        control = control_of(runs[0].group, self.matrix.runs)
        beside = [run for run in self.matrix.runs if run.group == control]
        return self._tuned(beside, on) if beside else self._base(on)[None]


def _push(direction: Direction, strength: float = 1.0) -> Add:
    return Add(direction, strength=strength, unit="raw", layers=(direction.level,))


def _here(one: Add | Ablate, model: LanguageModel) -> Add | Ablate:
    """The same for this model: a change's direction is of two models, and meant for both."""
    return replace(one, direction=replace(one.direction, checkpoint=checkpoint_now(model)))


def gentlest(model: LanguageModel, conditions: Sequence[Add | Ablate], most: float) -> Direction:
    """The first direction, of the best first, that leaves the loss on plain text within `most`; else the best."""
    for one in conditions:
        if float(plain_loss(model, _here(one, model)).mean()) <= most:
            return one.direction
    return conditions[0].direction


def _rises(model: LanguageModel, conditions: Sequence[Add | Ablate]) -> list[float]:
    """How much more surprising plain text becomes, in nats per token."""
    plain = plain_loss(model, None).mean()
    return [float(plain_loss(model, _here(one, model)).mean() - plain) for one in conditions]
