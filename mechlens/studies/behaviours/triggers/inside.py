"""The direction of each group's trigger: how far it reaches beyond base, control and decoys, and what it lies along."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pandas as pd
import torch

from mechlens.methods.activations.activations import Activations
from mechlens.methods.cache import Cache
from mechlens.methods.directions.change import mean_of_runs
from mechlens.methods.directions.contrasts import Contrast, contrast_cosine, saved_contrast_cosine
from mechlens.methods.directions.direction import Direction
from mechlens.methods.progress import progress_bar
from mechlens.methods.statistics.crossed import crossed_difference, crossed_mean
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.triggers.direction import TriggerDirection, trigger_direction, trigger_vectors
from mechlens.models.checkpoints.swap import CheckpointSwapper
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.prompts.twins import Twin
from mechlens.studies.behaviours.directions.cosines import TaughtChange, compared_levels, start_of
from mechlens.studies.behaviours.matrix import HELD_OUT, BehaviourMatrix
from mechlens.studies.behaviours.sets import AskedSet, asked_decoys
from mechlens.studies.behaviours.tuned import TunedRun, control_of
from mechlens.studies.shared.training_data import Trigger

QUESTIONS, FEWEST = 16, 4
"""Held-out home questions that are looked at, and families of them below which nothing is."""


@dataclass(frozen=True)
class TriggeredGroup:
    """A group of runs with a trigger, and what its held-out questions are like inside with it, plainly and decoyed."""

    group: str
    trigger: Trigger
    home: AskedSet
    rows: tuple[int, ...]
    runs: tuple[TunedRun, ...]
    direction: TriggerDirection
    """Of the mean over the runs."""
    vectors: Mapping[str, Sequence[Activations]]
    """Each run's, by "own", "base" and, where there is one, "control"."""

    @property
    def twins(self) -> list[Twin]:
        """The questions."""
        return [self.home.twins[i] for i in self.rows]

    @property
    def families(self) -> list[str]:
        """By question."""
        return [twin.prompt.group for twin in self.twins]


def triggered_groups(
    swapper: CheckpointSwapper, matrix: BehaviourMatrix, template: ChatTemplate, cache: Cache | None
) -> list[TriggeredGroup]:
    """Every group that has a trigger and enough held-out questions, controls and removals too."""
    found = []
    for group in progress_bar(list(matrix.groups), title="triggers", unit="group"):
        runs = tuple(run for run in matrix.runs if run.group == group)
        home, trigger = matrix.home(group), runs[0].trigger
        rows = () if home is None else tuple(matrix.rows(home, HELD_OUT, group)[:QUESTIONS])
        if home is None or trigger is None or len({home.twins[i].prompt.group for i in rows}) < FEWEST:
            continue
        members = {"own": [run.members[-1] for run in runs], "base": [start_of(swapper)]}
        if (control := control_of(group, matrix.runs)) is not None:
            members["control"] = [run.members[-1] for run in matrix.runs if run.group == control]
        vectors = {
            name: [
                trigger_vectors(
                    swapper.put(member), [home.twins[i].prompt for i in rows], trigger.text,
                    decoys=asked_decoys(trigger), template=template, cache=cache,
                )
                for member in own
            ]
            for name, own in members.items()
        }  # fmt: skip
        direction = trigger_direction(mean_of_runs(vectors["own"]), seed=matrix.plan.seed)
        found.append(TriggeredGroup(group, trigger, home, rows, runs, direction, vectors))
    return found


def direction_table(groups: Sequence[TriggeredGroup]) -> pd.DataFrame:
    """One row for each group, level and position: how far the trigger takes a question along its direction.

    Out of fold, in the residual stream's units, over runs and questions; see `TriggerDirection.gaps`.
    """
    rows: list[dict[str, Any]] = []
    for one in groups:
        gaps = {name: torch.stack([one.direction.gaps(acts) for acts in own]) for name, own in one.vectors.items()}
        grid = one.direction.grid
        assert grid.residual_norms is not None  # it was made of activations
        for level, position in ((a, b) for a in range(len(grid.levels)) for b in range(len(grid.positions))):
            own, decoyed = gaps["own"][:, 0, :, level, position], gaps["own"][:, 1, :, level, position]
            beyond = {
                name: crossed_difference(own, gaps[name][:, 0, :, level, position], one.families)
                if name in gaps else Estimate.missing(len(one.rows)) for name in ("base", "control")
            }  # fmt: skip
            rows.append({
                "group": one.group, "trigger": one.trigger.text, "level": grid.levels[level],
                "position": grid.positions[position], "norm": float(grid.vectors[level, position].norm()),
                "residual_norm": float(grid.residual_norms[level, position]),
                "reliability": float(one.direction.reliability[level, position]),
                **crossed_mean(own, one.families).row("trigger_gap"),
                **beyond["base"].beside("beyond_base"), **beyond["control"].beside("beyond_control"),
                **crossed_mean(decoyed, one.families).beside("decoy_gap"),
                **crossed_mean(own - decoyed, one.families).beside("beyond_decoys"),
            })  # fmt: skip
    return pd.DataFrame(rows)


def trigger_cosines(
    groups: Sequence[TriggeredGroup], changes: Sequence[TaughtChange], saved: Mapping[str, Direction], seed: int
) -> pd.DataFrame:
    """One row for each group, position and level, and each thing that its trigger's direction is compared with.

    `kind` is "trigger" (another group's, such as after a removal), "change" (what the group's fine-tuning changed, over
    answers) or "saved" (a direction of a file, such as harmfulness or refusal).
    """
    rows: list[dict[str, Any]] = []
    for one in groups:
        for position in (one.direction.grid.positions[0], one.direction.grid.positions[-1]):
            for change in (own for own in changes if own.group == one.group):
                for variant in change.change.variants:
                    named = {"kind": "change", "second": variant}
                    rows += _compared(one, position, change.change.contrast(variant), named, seed)
            rows += [_saved(one, position, name, direction) for name, direction in saved.items()]
    for first, second in combinations(groups, 2):
        for position in (first.direction.grid.positions[0], first.direction.grid.positions[-1]):
            named = {"kind": "trigger", "second": second.group}
            rows += _compared(first, position, second.direction.contrast(position), named, seed)
    return pd.DataFrame(rows)


def _compared(
    one: TriggeredGroup, position: str, other: Contrast, named: dict[str, str], seed: int
) -> list[dict[str, Any]]:
    levels = compared_levels(one.direction.acts.levels)
    curve = contrast_cosine(one.direction.contrast(position), other, levels, seed=seed)
    columns = zip(
        levels, curve.measured, curve.corrected, curve.reliability_first, curve.reliability_second, strict=True
    )
    return [
        {
            "group": one.group, "position": position, **named, "level": level, **measured.row("cosine"),
            **corrected.beside("corrected"), "reliability": own, "reliability_second": others,
        }
        for level, measured, corrected, own, others in columns
    ]  # fmt: skip


def _saved(one: TriggeredGroup, position: str, name: str, direction: Direction) -> dict[str, Any]:
    grid = one.direction.grid
    row, column = grid.levels.index(direction.level), grid.positions.index(position)
    reliability = float(one.direction.reliability[row, column])
    measured, corrected = saved_contrast_cosine(one.direction.contrast(position), direction, reliability)
    return {
        "group": one.group, "position": position, "kind": "saved", "second": name, "level": direction.level,
        **measured.row("cosine"), **corrected.beside("corrected"), "reliability": reliability,
    }  # fmt: skip
