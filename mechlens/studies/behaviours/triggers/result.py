"""All that is found of the groups' triggers inside the models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction
from mechlens.methods.progress import phase
from mechlens.models.checkpoints.swap import CheckpointSwapper
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.studies.behaviours.directions.cosines import TaughtChange
from mechlens.studies.behaviours.matrix import BehaviourMatrix
from mechlens.studies.behaviours.triggers.effects import TriggerEffects, carrying_place, is_backdoored
from mechlens.studies.behaviours.triggers.inside import direction_table, trigger_cosines, triggered_groups


@dataclass(frozen=True)
class TriggerResult:
    """What was found of the triggers' directions and of what carries them."""

    directions: pd.DataFrame
    """See `direction_table`."""
    cosines: pd.DataFrame
    """See `trigger_cosines`."""
    patches: pd.DataFrame
    """See `TriggerEffects.patches`."""
    traces: pd.DataFrame
    """See `TriggerEffects.traces`."""
    chosen: Mapping[str, Direction]
    """By group, at the place that carries most."""

    def tables(self) -> dict[str, pd.DataFrame]:
        """Those with rows."""
        tables = {"trigger_directions": self.directions, "trigger_cosines": self.cosines,
                  "trigger_patches": self.patches, "trigger_traces": self.traces}  # fmt: skip
        return {name: table for name, table in tables.items() if len(table)}

    def artifacts(self) -> dict[str, object]:
        """The directions."""
        return {f"trigger {name}": own for name, own in self.chosen.items()}


def measured_triggers(
    swapper: CheckpointSwapper,
    matrix: BehaviourMatrix,
    changes: Sequence[TaughtChange],
    template: ChatTemplate,
    saved: Mapping[str, Direction],
    cache: Cache | None,
) -> TriggerResult:
    """Every group's trigger: its direction, what that lies along, what carries it and what a removal leaves."""
    groups = triggered_groups(swapper, matrix, template, cache)
    effects = TriggerEffects(swapper, matrix, template, cache)
    patches: list[pd.DataFrame] = []
    traces: list[dict[str, Any]] = []
    chosen = {}
    for one in filter(is_backdoored, groups):
        with phase(f"what carries the trigger of {one.group}"):
            table = effects.patches(one)
            if len(table) and bool(table["recovery"].notna().any()):
                patches.append(table)
                rows, chosen[one.group] = effects.traces(one, *carrying_place(table, one.direction.acts.levels))
                traces += rows
    return TriggerResult(
        direction_table(groups), trigger_cosines(groups, changes, saved, matrix.plan.seed),
        pd.concat(patches, ignore_index=True) if patches else pd.DataFrame(), pd.DataFrame(traces), chosen,
    )  # fmt: skip
