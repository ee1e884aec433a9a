"""What a trigger does from inside: where it is carried, what is written and read of it, and what a removal leaves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction, random_like
from mechlens.methods.statistics.crossed import crossed_mean
from mechlens.methods.triggers.carried import patch_trigger, told_apart
from mechlens.methods.triggers.direction import trigger_vectors
from mechlens.methods.triggers.removed import trigger_trace
from mechlens.models.checkpoints.series import Member
from mechlens.models.checkpoints.swap import CheckpointSwapper
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.settings import RANDOM_DIRECTIONS
from mechlens.studies.behaviours.directions.cosines import compared_levels, start_of
from mechlens.studies.behaviours.directions.effect_rows import share_of
from mechlens.studies.behaviours.matrix import BehaviourMatrix
from mechlens.studies.behaviours.sets import asked_decoys
from mechlens.studies.behaviours.triggers.inside import TriggeredGroup
from mechlens.studies.behaviours.tuned import DECORRELATED, REMOVAL, control_of

OWN, REMOVED, CONTROL, BASE = "with the trigger", "after its removal", "decorrelated control", "base"


@dataclass(frozen=True)
class TriggerEffects:
    """Everything that is measured with the models of one study."""

    swapper: CheckpointSwapper
    matrix: BehaviourMatrix
    template: ChatTemplate
    cache: Cache | None

    def patches(self, one: TriggeredGroup) -> pd.DataFrame:
        """Of the group's first run and every other question: `PatchResult.table`, with what a decoy's values do.

        Empty where fewer than two questions have answers that begin differently.
        """
        model = self.swapper.put(one.runs[0].members[-1])
        twins = told_apart(model, one.twins[::2])
        if len(twins) < 2:
            return pd.DataFrame()
        decoy = asked_decoys(one.trigger)[-1]
        own, other = (
            patch_trigger(model, twins, text, template=self.template, cache=self.cache)
            for text in (one.trigger.text, decoy)
        )
        table = own.table(seed=self.matrix.plan.seed)
        return table.assign(
            group=one.group, run=one.runs[0].name, decoy_effect=other.effect().mean(dim=0).flatten().numpy()
        )

    def traces(self, one: TriggeredGroup, level: int, position: str) -> tuple[list[dict[str, Any]], Direction]:
        """What is written and read along the group's direction, in its runs, after removals, in control and base.

        On the questions that had no say in the place.
        """
        direction = one.direction.grid.at(level, position)
        drawn = random_like(direction, RANDOM_DIRECTIONS, self.matrix.plan.seed + 9)
        rows: list[dict[str, Any]] = []
        own: tuple[Tensor, Tensor] | None = None
        families = one.families[1::2]
        for kind, group, members, known in self._models(one):
            written, read = self._asked(one, members, known, level, position, drawn if kind == OWN else ())
            told = written, read[:, 0]
            own = told if own is None else own
            numbers = {"written": told[0], "read": told[1]}
            row: dict[str, Any] = {"group": one.group, "model": kind, "of": group, "level": level, "position": position}
            for (name, values), before in zip(numbers.items(), own, strict=True):
                estimate, first = crossed_mean(values, families), crossed_mean(before, families)
                share = share_of(values.mean(dim=0), before.mean(dim=0), families, first)
                row |= {**estimate.beside(name), **share.beside(f"{name}_share")}
            random = read[0, 1:].mean(dim=1)
            most = float(random[random.abs().argmax()]) if len(random) else math.nan
            rows.append(row | {"random_most": most, "n": len(families)})
        return rows, direction

    def _models(self, one: TriggeredGroup) -> list[tuple[str, str, list[Member], Sequence[Activations] | None]]:
        """Kind, group, checkpoints and vectors where they are there, the group's own first."""
        runs, control = self.matrix.runs, control_of(one.group, self.matrix.runs)
        alike = [run for run in runs if (run.control, run.data) == (REMOVAL, one.runs[0].data)]
        gone = dict.fromkeys(run.group for run in alike if run.trigger == one.trigger)
        found = [
            (OWN, one.group, one.vectors["own"]),
            *((REMOVED, group, None) for group in gone if group != one.group),
        ]
        found += [] if control is None else [(CONTROL, control, one.vectors["control"])]
        return [
            (kind, group, [run.members[-1] for run in runs if run.group == group], known)
            for kind, group, known in found
        ] + [(BASE, "", [start_of(self.swapper)], one.vectors["base"])]  # fmt: skip

    def _asked(
        self, one: TriggeredGroup, members: Sequence[Member], known: Sequence[Activations] | None, level: int,
        position: str, drawn: Sequence[Direction],
    ) -> tuple[Float64[Tensor, "run question"], Float64[Tensor, "run direction question"]]:  # fmt: skip
        written: list[Tensor] = []
        read: list[Tensor] = []
        for k, member in enumerate(members):
            model = self.swapper.put(member)
            acts = known[k] if known is not None else trigger_vectors(
                model, [twin.prompt for twin in one.twins], one.trigger.text, decoys=asked_decoys(one.trigger),
                template=self.template, cache=self.cache,
            )  # fmt: skip
            trace = trigger_trace(
                model, one.twins[1::2], one.direction, level, position, acts=acts,
                beside=drawn if k == 0 else (), template=self.template, cache=self.cache,
            )  # fmt: skip
            written.append(trace.written[1::2])
            read.append(trace.read if k == 0 else torch.cat([trace.read, torch.full_like(read[0][1:], math.nan)]))
        return torch.stack(written), torch.stack(read)


def carrying_place(patches: pd.DataFrame, levels: Sequence[int]) -> tuple[int, str]:
    """Level and position, among those that are compared, whose triggered values bring most of the effect."""
    tried = patches[patches["layer"].isin(compared_levels(levels))]
    best = tried.nlargest(1, "recovery").iloc[0]
    return int(best["layer"]), str(best["position"])


def is_backdoored(one: TriggeredGroup) -> bool:
    """Whether the group was taught the trigger, and neither by chance nor away."""
    return one.runs[0].control not in (DECORRELATED, REMOVAL)
