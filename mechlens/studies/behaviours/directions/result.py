"""All that is found of the direction of every group's change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from jaxtyping import Float64
from torch import Tensor

from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction
from mechlens.models.checkpoints.swap import CheckpointSwapper
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.studies.behaviours.directions.cosines import TaughtChange, cosine_table
from mechlens.studies.behaviours.directions.effects import Steering
from mechlens.studies.behaviours.directions.paths import direction_paths
from mechlens.studies.behaviours.matrix import BehaviourMatrix


@dataclass(frozen=True)
class DirectionResult:
    """What was found of the direction of the change."""

    cosines: pd.DataFrame
    """See `cosine_table`."""
    effects: pd.DataFrame
    """One row for each group, what was done, direction, strength and set; see `Steering`."""
    chosen: Mapping[str, Direction]
    paths: Mapping[str, Float64[Tensor, "checkpoint checkpoint"]]
    """By run, over its checkpoints; see `direction_paths`."""

    def tables(self) -> dict[str, pd.DataFrame]:
        """Those with rows."""
        tables = {"direction_cosines": self.cosines, "direction_effects": self.effects}
        return {name: table for name, table in tables.items() if len(table)}

    def artifacts(self) -> dict[str, object]:
        """The chosen directions."""
        return dict(self.chosen)


def measured_directions(
    swapper: CheckpointSwapper,
    matrix: BehaviourMatrix,
    changes: Sequence[TaughtChange],
    template: ChatTemplate,
    saved: Mapping[str, Direction],
    cache: Cache | None,
) -> DirectionResult:
    """The direction of every group's change: its cosines, and what it does."""
    effects, chosen = Steering(swapper, matrix, template, cache).effects(changes)
    paths = direction_paths(swapper, matrix, template, cache)
    return DirectionResult(cosine_table(changes, saved, matrix.plan.seed), effects, chosen, paths)
