"""The direction of the change in every group of training runs: how the groups', seeds' and variants' lie together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pandas as pd

from mechlens.errors import UserError, quoted
from mechlens.methods.activations.activations import Activations
from mechlens.methods.cache import Cache
from mechlens.methods.directions.change import (
    BASE,
    ChangeDirections,
    change_cosine,
    change_directions,
    mean_of_runs,
    saved_cosine,
    twin_vectors,
)
from mechlens.methods.directions.direction import Direction
from mechlens.methods.progress import progress_bar
from mechlens.methods.steering.fits import require_direction
from mechlens.models.bridge import LanguageModel, checkpoint_now
from mechlens.models.checkpoints.series import Member
from mechlens.models.checkpoints.swap import CheckpointSwapper
from mechlens.models.sites import RESIDUAL
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.prompts.twins import Twin
from mechlens.runs.vectors.direction_files import read_direction
from mechlens.studies.behaviours.matrix import TRAINED_ON, BehaviourMatrix
from mechlens.studies.behaviours.sets import AskedSet
from mechlens.studies.behaviours.tuned import control_of

FEWEST = 8
"""Families of questions that a group was trained on, below which no direction is made of them."""
LEVELS = 6
"""Levels that are compared and tried, evenly spread below the last fifth of the depth."""


def saved_directions(given: Sequence[str], model: LanguageModel) -> dict[str, Direction]:
    """Directions by name, as the option gives them; UserError for what can't be compared with the model's own."""
    found = {}
    for one in given:
        name, _, path = one.partition("=")
        if not name or not path:
            raise UserError(f"{quoted(one)} lacks a name or a file; write NAME=FILE, such as harm=runs/harm")
        found[name] = direction = read_direction(path)
        require_direction(model, direction, force=True)
        if (direction.site, direction.checkpoint.regime) != (RESIDUAL, checkpoint_now(model).regime):
            raise UserError(
                f"{path} holds a direction at {direction.site} of {direction.checkpoint.regime} weights, and what is "
                f"compared is the residual stream of {checkpoint_now(model).regime} ones; give another"
            )
    return found


@dataclass(frozen=True)
class TaughtChange:
    """What one group's fine-tuning changed, by questions that it was trained on."""

    group: str
    home: AskedSet
    change: ChangeDirections
    """Of the mean over the group's runs."""
    by_run: Mapping[str, ChangeDirections]


def taught_changes(
    swapper: CheckpointSwapper, matrix: BehaviourMatrix, template: ChatTemplate, cache: Cache | None
) -> list[TaughtChange]:
    """Of every group with enough questions that it was trained on; controls too, whose directions are drift."""
    found = []
    for group in progress_bar(list(matrix.groups), title="directions", unit="group"):
        if (taught := taught_twins(matrix, group)) is None:
            continue
        home, twins = taught

        def vectors(member: Member, twins: list[Twin] = twins) -> Activations:
            return twin_vectors(swapper.put(member), twins, template=template, cache=cache)

        base, seed, beside = vectors(start_of(swapper)), matrix.plan.seed, control_of(group, matrix.runs)
        runs = {run.name: vectors(run.members[-1]) for run in matrix.runs if run.group == group}
        controls = [vectors(run.members[-1]) for run in matrix.runs if run.group == beside]
        control = mean_of_runs(controls) if controls else None
        found.append(TaughtChange(
            group, home, change_directions(base, mean_of_runs(list(runs.values())), control=control, seed=seed),
            {name: change_directions(base, own, control=control, seed=seed) for name, own in runs.items()},
        ))  # fmt: skip
    return found


def taught_twins(matrix: BehaviourMatrix, group: str) -> tuple[AskedSet, list[Twin]] | None:
    """The home of a group and the twins of it that the group was trained on; None where these are too few.

    The shown answers are those that training made likelier, so that a twin's direction points the twin's way.
    """
    home = matrix.home(group)
    rows = [] if home is None else matrix.rows(home, TRAINED_ON, group)
    if home is None or len({home.twins[i].prompt.group for i in rows}) < FEWEST:
        return None
    cell = matrix.cell(group, home, TRAINED_ON)
    assert cell is not None  # it has rows
    return home, [home.twins[i] if cell.change.value > 0 else home.twins[i].reversed for i in rows]


def start_of(swapper: CheckpointSwapper) -> Member:
    """The base as a member of the series."""
    return Member(swapper.base.name, swapper.base.path, "base", 0, swapper.base.revision)


def compared_levels(levels: Sequence[int]) -> list[int]:
    """Those above 0 of which the last fifth, where the output's words are written, is left out."""
    top = max(int(0.8 * levels[-1] + 1e-9), 2)
    between = [level for level in levels if 0 < level < top]
    step = -(-len(between) // LEVELS) or 1
    return between[step - 1 :: step]


def cosine_table(changes: Sequence[TaughtChange], saved: Mapping[str, Direction], seed: int) -> pd.DataFrame:
    """One row for each pair and level: what the two are, cosine, corrected, and the reliability of both.

    `kind` is "variants" of one group, "runs" of one group, "groups", or "saved": a direction of a file.
    """
    rows: list[dict[str, Any]] = []
    for one in changes:
        for pair in combinations(one.change.variants, 2):
            rows += _rows("variants", (one.group, one.change), (one.group, one.change), pair, seed)
        for first, second in combinations(one.by_run.items(), 2):
            for variant in one.change.variants:
                if variant != BASE:  # the same in all runs of a group
                    rows += _rows("runs", first, second, (variant, variant), seed)
    for a, b in combinations(changes, 2):
        for variant in (own for own in a.change.variants if own in b.change.variants):
            rows += _rows("groups", (a.group, a.change), (b.group, b.change), (variant, variant), seed)
    for one in changes:
        for name, direction in saved.items():
            rows += [_saved(one, variant, name, direction) for variant in one.change.variants]
    return pd.DataFrame(rows)


_Named = tuple[str, ChangeDirections]


def _rows(kind: str, first: _Named, second: _Named, pair: tuple[str, str], seed: int) -> list[dict[str, Any]]:
    (name, one), (other_name, other) = first, second
    levels = compared_levels(one.acts.levels)
    curve = change_cosine(one, pair[0], other, pair[1], levels, seed=seed)
    return [
        {
            "kind": kind, "first": name, "first_variant": pair[0], "second": other_name, "second_variant": pair[1],
            "level": level, **measured.row("cosine"), **corrected.beside("corrected"),
            "reliability_first": _reliability(one, pair[0], level),
            "reliability_second": _reliability(other, pair[1], level),
        }
        for level, measured, corrected in zip(levels, curve.measured, curve.corrected, strict=True)
    ]  # fmt: skip


def _saved(one: TaughtChange, variant: str, name: str, direction: Direction) -> dict[str, Any]:
    measured, corrected = saved_cosine(one.change, variant, direction)
    return {
        "kind": "saved", "first": one.group, "first_variant": variant, "second": name, "second_variant": "",
        "level": direction.level, **measured.row("cosine"), **corrected.beside("corrected"),
        "reliability_first": _reliability(one.change, variant, direction.level),
    }  # fmt: skip


def _reliability(change: ChangeDirections, variant: str, level: int) -> float:
    return float(change.reliability[variant][change.acts.levels.index(level)])
