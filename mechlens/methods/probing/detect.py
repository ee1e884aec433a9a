"""Can the concept be read off? Held-out detection at every level and position.

Directions are fitted on training prompts, the level is chosen on validation prompts, and what is reported
comes from test prompts, beside what permuted labels and random directions reach.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from mechlens.choices import METHODS
from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations, column_of, one_cell
from mechlens.methods.directions.direction import Direction, DirectionGrid, project
from mechlens.methods.directions.methods import MEAN_DIFFERENCE, grid_by
from mechlens.methods.directions.nulls import (
    LabelledVectors,
    PermutationNull,
    RandomNull,
    permutation_null,
    random_null,
)
from mechlens.methods.probing.ahead import TOKEN, Ahead, token_read
from mechlens.methods.probing.auroc import auroc, auroc_difference, auroc_estimate
from mechlens.methods.probing.auroc_grid import (
    AurocGrid,
    contrast_part,
    held_out_auroc,
    is_positive,
    refitted_auroc,
    score_grid,
)
from mechlens.methods.shown import first, html_with, lines
from mechlens.methods.statistics.effect_size import effect_estimate, hedges_g
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import one_thread
from mechlens.models.sites import RESIDUAL
from mechlens.prompts.same import Comparable
from mechlens.prompts.split import PARTS, Split
from mechlens.settings import DetectionPlan, require_ranges

MAX_REFITS = 50
"""Enough for p < 0.02."""


@dataclass(frozen=True, repr=False)
class ChosenLevel:
    """What is reported for one position: its level chosen on validation, scored once on test."""

    level: int
    position: str
    auroc: Estimate
    """On test prompts."""
    effect: Estimate
    """Hedges' g on test prompts: difference of the classes' mean scores, in pooled standard deviations."""
    validation_auroc: float
    """On the prompts that chose the level: flattered by the choice."""
    validation_separation: float
    """Difference of the classes' mean scores on the same prompts, in pooled standard deviations."""
    direction: Direction
    permutation: PermutationNull
    random: RandomNull

    def __repr__(self) -> str:
        return f"ChosenLevel({self.position}, {self.in_words})"

    @property
    def in_words(self) -> str:
        """The level and what is reported there, on a line."""
        chance = f"permutation p {self.permutation.p:.2g}"
        return f"level {self.level}, {chance}, test AUROC {self.auroc}, Hedges' g {self.effect.brief}"


@dataclass(frozen=True, repr=False, eq=False)
class Detection(Comparable):
    """How well a concept is detected everywhere, and at the level chosen on validation for each position.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> split = ml.split_by_family(acts.labels, acts.families, fractions=(0.5, 0.2, 0.3), seed=0)
    >>> found = ml.detect(acts, "harmful", "harmless", split, ml.DetectionPlan(permutations=20))
    >>> list(found.table().columns[:3])
    ['level', 'position', 'auroc']
    """

    test: AurocGrid
    effects: Float[Tensor, "level position"]
    """Hedges' g on test prompts."""
    validation_auroc: Float[Tensor, "level position"]
    directions: DirectionGrid
    chosen: tuple[ChosenLevel, ...]
    """One for each position, in the activations' order."""
    plan: DetectionPlan
    split: Split
    sizes: dict[str, dict[str, int]]
    """Prompts by part of the split and by label."""
    ahead: tuple[Ahead, ...]
    """Beside what the surface tells, at the positions for which that was looked at, the strongest first."""

    def called(self, sides: tuple[str, str]) -> "Detection":
        """The same, its directions pointing from one side to the other by these names, as their files will say."""
        chosen = tuple(replace(one, direction=replace(one.direction, contrast=sides)) for one in self.chosen)
        return replace(self, directions=replace(self.directions, contrast=sides), chosen=chosen)

    def at(self, position: str) -> ChosenLevel:
        """The chosen level of one named position."""
        return self.chosen[column_of(position, self.test.positions, self.directions.last)]

    @property
    def best(self) -> ChosenLevel | None:
        """The strongest position whose direction is more than the surface (`Ahead`); None where there is none.

        `detect` knows no prompts, only the tokens standing at the positions (level 0); `find_concept` knows the words,
        their length and what else differs between the prompts.
        """
        return next((self.at(one.position) for one in self.ahead if one.clear), None)

    @property
    def strongest(self) -> ChosenLevel:
        """The highest validation AUROC, more than the surface or not; of equals the farthest apart, then the first."""
        return self.by_strength[0]

    def tied(self, position: str) -> int:
        """How many levels above 0 have the highest validation AUROC there: where many, the choice was near chance."""
        column = column_of(position, self.test.positions, self.directions.last)
        by_level = _of_choosable(self.directions, self.validation_auroc[:, column])
        return int((by_level == by_level.max()).sum())

    @property
    def by_strength(self) -> tuple[ChosenLevel, ...]:
        """All positions, the strongest first."""
        strength = [(choice.validation_auroc, choice.validation_separation) for choice in self.chosen]
        order = sorted(range(len(strength)), key=lambda k: strength[k], reverse=True)
        return tuple(self.chosen[k] for k in order)

    def table(self) -> pd.DataFrame:
        """One row for each level and position: level, position, auroc, low, high, n, effect_size, validation_auroc."""
        levels, positions = self.test.levels, self.test.positions
        return pd.DataFrame(
            {
                "level": np.repeat(levels, len(positions)),
                "position": list(positions) * len(levels),
                "auroc": self.test.value.flatten().numpy(),
                "low": self.test.low.flatten().numpy(),
                "high": self.test.high.flatten().numpy(),
                "n": self.test.n,
                "effect_size": self.effects.flatten().numpy(),
                "validation_auroc": self.validation_auroc.flatten().numpy(),
            }
        )

    def __repr__(self) -> str:
        grid = self.directions
        sizes = [
            f"{' and '.join(f'{n} {label}' for label, n in by_label.items())} in {part}"
            for part, by_label in self.sizes.items()
        ]
        title = f"Detection of {' against '.join(grid.contrast)} in {grid.checkpoint.name} at {grid.site}"
        return lines(title, {"prompts": ", ".join(sizes), **self.in_words})

    def _repr_html_(self) -> str:
        return html_with(repr(self), self.by_position())

    @property
    def in_words(self) -> dict[str, object]:
        """What is reported for each position, and which is best; where none is, the strongest."""
        found, best = first({choice.position: choice.in_words for choice in self.chosen}), self.best
        if not self.ahead:
            return found
        if best is not None:
            return {**found, "best": f"{best.position}, level {best.level}"}
        top = self.strongest
        return {
            **found,
            "best": "none is more than the surface",
            "strongest": f"{top.position}, level {top.level} (on validation prompts)",
        }

    def by_position(self) -> pd.DataFrame:
        """One row for each position, at its chosen level: position, level, auroc, low, high, n, effect_size, p."""
        rows = [
            {"position": one.position, "level": one.level, "auroc": one.auroc.value,
             **dict(zip(("low", "high"), one.auroc.interval, strict=True)), "n": one.auroc.n,
             "effect_size": one.effect.value, "p": one.permutation.p}
            for one in self.chosen
        ]  # fmt: skip
        return pd.DataFrame(rows)


@one_thread()
def detect(
    acts: Activations,
    positive: str,
    negative: str,
    split: Split,
    plan: DetectionPlan = DetectionPlan(),
    *,
    refit: bool = False,
) -> Detection:
    """Held-out detection of `positive` against `negative` prompts in every cell of the activations.

    `split` holds row numbers of `acts`; prompts with other labels are left out. Each position gets the
    level with the highest validation AUROC; of equals, which small validation parts bring, the one with the
    largest standardised separation there (difference of the classes' mean scores over their pooled standard
    deviation), then the lowest. Level 0, the token alone, is chosen only where no other was read. UserError
    where the training or validation part lacks a class or an activation is not finite; a test part without a
    class gives missing estimates. `refit` refits the direction in every resample: for claims about the concept,
    not about one saved direction.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> split = ml.split_by_family(acts.labels, acts.families, fractions=(0.5, 0.2, 0.3), seed=0)
    >>> found = ml.detect(acts, "harmful", "harmless", split, ml.DetectionPlan(permutations=20))
    >>> at_inst = found.at("inst")
    >>> 0 <= at_inst.auroc.value <= 1, at_inst.level in acts.levels
    (True, True)
    """
    METHODS.require(plan.method)
    require_ranges(plan)
    if refit and plan.method != MEAN_DIFFERENCE:
        raise UserError(f"refit takes a refit for every resample, which {plan.method!r} is too slow for; leave it out")
    _require_finite(acts)
    contrast = (positive, negative)
    train, validation, test = (contrast_part(acts, split.part(name), contrast) for name in PARTS)
    _require_classes({"train": train, "validation": validation}, contrast)
    grid = grid_by(train, positive, negative, plan.method)
    if refit:
        on_test = refitted_auroc(grid, train, test, seed=plan.seed, resamples=plan.resamples)
    else:
        on_test = held_out_auroc(grid, test, contrast)
    scores, first = score_grid(validation, grid), is_positive(validation, contrast)
    on_validation, apart = auroc(scores, first), _separation(scores, first)
    chosen = [_choose(position, grid, on_test, on_validation, apart, train, test, plan) for position in acts.positions]
    on_test_scores = score_grid(test, grid)
    found = Detection(
        test=on_test,
        effects=hedges_g(on_test_scores, is_positive(test, contrast), torch.ones(1, len(test.ids)))[..., 0],
        validation_auroc=on_validation,
        directions=grid,
        chosen=tuple(chosen),
        plan=plan,
        split=split,
        sizes={
            name: {label: part.labels.count(label) for label in contrast}
            for name, part in zip(PARTS, (train, validation, test), strict=True)
        },
        ahead=(),
    )
    if not token_read(acts):
        return found
    return replace(found, ahead=tuple(_ahead_of_token(one, grid, test, on_test_scores) for one in found.by_strength))


def _ahead_of_token(
    choice: ChosenLevel, grid: DirectionGrid, test: Activations, scores: Float[Tensor, "level position prompt"]
) -> Ahead:
    """On test prompts, beside the direction of the tokens standing at the position."""
    positive, column = is_positive(test, grid.contrast), grid.positions.index(choice.position)
    ours, token = (scores[grid.levels.index(level), column] for level in (choice.level, 0))
    return Ahead(
        position=choice.position,
        auroc=choice.auroc,
        effect=choice.effect,
        surface={TOKEN: auroc_estimate(token, positive, test.families)},
        gains={TOKEN: auroc_difference(ours, token, positive, test.families)},
    )


def _choose(
    position: str,
    grid: DirectionGrid,
    on_test: AurocGrid,
    on_validation: Float[Tensor, "level position"],
    apart: Float[Tensor, "level position"],
    train: Activations,
    test: Activations,
    plan: DetectionPlan,
) -> ChosenLevel:
    """The best validation level of one position, with its test AUROC and both nulls."""
    column = grid.positions.index(position)
    by_level = _of_choosable(grid, on_validation[:, column])
    ties = np.where(by_level == by_level.max(), apart[:, column].numpy(), -np.inf)
    row = int(np.argmax(ties))  # NumPy promises the first of equals, torch doesn't.
    level = grid.levels[row]
    direction, value = grid.at(level, position), on_test.at(level, position)
    fitted, scored = (
        LabelledVectors(part.at(level, position), is_positive(part, grid.contrast), part.families)
        for part in (train, test)
    )
    return ChosenLevel(
        level=level,
        position=position,
        auroc=value,
        effect=effect_estimate(project(scored.values.double(), direction), scored.positive, scored.families),
        validation_auroc=float(by_level[row]),
        validation_separation=float(ties[row]),
        direction=direction,
        permutation=_permutations(train, direction, fitted, scored, value.value, plan),
        random=random_null(direction, scored, plan.random_directions, plan.seed + 4),
    )


def _of_choosable(grid: DirectionGrid, by_level: Float[Tensor, " level"]) -> NDArray[np.floating]:
    """The values of levels that may be chosen; level 0, the token alone, only where no other was read."""
    if grid.site != RESIDUAL or not any(grid.levels):
        return by_level.numpy()
    return np.where(np.array(grid.levels) > 0, by_level.numpy(), -np.inf)


def _permutations(
    train: Activations,
    direction: Direction,
    fitted: LabelledVectors,
    scored: LabelledVectors,
    observed: float,
    plan: DetectionPlan,
) -> PermutationNull:
    """The permutation null of the plan's method at the direction's place; all but the mean difference refit anew."""
    if plan.method == MEAN_DIFFERENCE:
        return permutation_null(fitted, scored, observed, plan.permutations, plan.seed + 2)
    cell = one_cell(train, direction.level, direction.position)

    def refit(draws: Bool[Tensor, "draw train"]) -> Float[Tensor, "draw test"]:
        scores = []
        for draw in draws.tolist():
            labels = tuple(direction.contrast[0 if positive else 1] for positive in draw)
            grid = grid_by(replace(cell, labels=labels), *direction.contrast, plan.method)
            scores.append(scored.values.double() @ grid.vectors[0, 0].double())
        return torch.stack(scores)

    n = min(plan.permutations, MAX_REFITS)
    return permutation_null(fitted, scored, observed, n, plan.seed + 2, refit)


def _separation(
    scores: Float[Tensor, "level position prompt"], positive: Bool[Tensor, " prompt"]
) -> Float[Tensor, "level position"]:
    """Difference of the two classes' mean scores over the pooled standard deviation; 0 where nothing differs."""
    # Counted from one prompt's score, equal scores are exactly 0 and rounding can't part them.
    shifted = scores - scores[..., :1]
    inside, outside = shifted[..., positive], shifted[..., ~positive]
    gap = inside.mean(dim=-1) - outside.mean(dim=-1)
    spread = ((inside.var(dim=-1, correction=0) + outside.var(dim=-1, correction=0)) / 2).sqrt()
    return torch.where(gap == 0, 0.0, gap / spread)


def _require_finite(acts: Activations) -> None:
    acts.require_vectors()
    if broken := acts.broken_levels():
        raise UserError(f"activations are not finite at levels {broken}; collect them again in float32 or bfloat16")


def _require_classes(parts: dict[str, Activations], contrast: tuple[str, str]) -> None:
    for name, part in parts.items():
        counts = {label: part.labels.count(label) for label in contrast}
        if min(counts.values()) == 0:
            raise UserError(
                f"the {name} part has {counts} prompts; a detection needs both labels there, so add prompts "
                "or change the split"
            )
