"""Ways to find a direction beside the mean difference: LDA, a logistic probe, the component of paired differences.

A fit gives a line; the classes give its sign and length. Every method here returns the part of the mean
difference that lies along its line, so that, as with the mean difference itself, adding 1.0 times the vector
moves an activation by the distance between the class means along it, from `negative` to `positive`. It is never
longer than the mean difference, and zero where the class means don't differ along it. LDA and probes often
predict better than the mean difference; that says nothing about steering.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.choices import METHODS
from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations
from mechlens.methods.directions.direction import Direction, DirectionGrid, direction_grid, mean_difference, members
from mechlens.methods.directions.lines import lda_line, logistic_line
from mechlens.registry import required

DirectionMethod = Callable[[Activations, str, str, int, str], Direction]
"""Activations, positive label, negative label, level, position -> the direction there."""
MEAN_DIFFERENCE = "mean-difference"
"""The method of which all cells, and all resamples, are had at once."""
PENALTY = 1.0
"""C of the logistic probe."""


def lda(acts: Activations, positive: str, negative: str, level: int, position: str) -> Direction:
    """Linear discriminant: the mean difference through the inverse of the pooled covariance within classes.

    The best line for telling two Gaussian classes of one covariance apart; Marks & Tegmark 2024 call it the
    mass-mean probe for such data. The covariance is shrunk after Ledoit & Wolf 2004. Without any spread within
    classes it is the mean difference.
    """
    cell = _cell(acts, positive, negative, level, position)
    return cell.along(lda_line(cell.values, cell.positive, cell.difference), "LDA")


def logistic(acts: Activations, positive: str, negative: str, level: int, position: str) -> Direction:
    """Weight of a logistic regression (L2 penalty, C = 1) on standardised activations, in the raw space.

    Standardising makes it indifferent to the units of single dimensions, and so dependent on the basis: unlike
    the other methods it doesn't turn with a rotation of the space. Dimensions that hardly vary can get long raw
    weights, so that adding the vector leads away from where activations lie: it is for reading more than for steering.
    """
    cell = _cell(acts, positive, negative, level, position)
    # Its optimum is better than the intercept alone, and the loss is convex: so it points along the difference
    # of the means, never against it, and the projection in `along` keeps the probe's own sign.
    weight, _ = logistic_line(cell.values, cell.positive, penalty=PENALTY)
    return cell.along(weight, "logistic probe")


def paired_component(acts: Activations, positive: str, negative: str, level: int, position: str) -> Direction:
    """First principal component of the differences within families (positive minus negative; Zou et al. 2023).

    About zero, not about their mean: centred differences would have lost what all pairs share. Families with
    only one of the labels have no difference and count only for sign and length. UserError without any pair.
    """
    cell = _cell(acts, positive, negative, level, position)
    pairs = _pair_differences(cell)
    return cell.along(torch.linalg.svd(pairs, full_matrices=False).Vh[0], "paired component")


def grid_by(acts: Activations, positive: str, negative: str, method: str) -> DirectionGrid:
    """The direction at every level and position by a method's name (`mechlens.choices.METHODS`).

    UserError where another package's method gives something else than a direction of the right size.
    """
    by_means = direction_grid(acts, positive, negative)
    if method == MEAN_DIFFERENCE:
        return by_means
    find: DirectionMethod = required(METHODS, method)
    found = [find(acts, positive, negative, level, position) for level in acts.levels for position in acts.positions]
    for one in found:
        if not isinstance(one, Direction) or one.vector.shape != acts.values.shape[3:]:
            raise UserError(f"the direction method {method!r} gave no Direction of {acts.values.shape[3]} numbers")
    vectors = torch.stack([one.vector for one in found]).reshape(by_means.vectors.shape)
    return replace(by_means, vectors=vectors.to(by_means.vectors.dtype), method=found[0].method)


@dataclass(frozen=True)
class _Cell:
    """The prompts of two labels at one level and position, in float64."""

    values: Float[Tensor, "prompt d_model"]
    positive: Bool[Tensor, " prompt"]
    families: tuple[str, ...]
    by_means: Direction
    """Their mean difference, which knows where all this comes from."""

    @property
    def difference(self) -> Float[Tensor, " d_model"]:
        """Difference of the class means."""
        return self.by_means.vector.double()

    def along(self, line: Float[Tensor, " d_model"], method: str) -> Direction:
        """The mean difference's part along a line, as the direction that `method` found."""
        length = line.norm()
        unit = line / length if length > 0 else line
        vector = (unit @ self.difference) * unit
        return replace(self.by_means, vector=vector.to(self.by_means.vector.dtype), method=method)


def _cell(acts: Activations, positive: str, negative: str, level: int, position: str) -> _Cell:
    """UserError where a label has no prompt, both are the same, or a value isn't finite."""
    if positive == negative:
        raise UserError(f"{positive!r} was given as both labels; a direction needs two")
    by_means = mean_difference(acts, positive, negative, level, position)
    inside, outside = members(acts, positive), members(acts, negative)
    rows = (inside | outside).nonzero()[:, 0]
    values = acts.at(level, position)[rows].double()
    if not bool(torch.isfinite(values).all()):
        raise UserError(
            f"activations are not finite at level {level}, position {position!r}; "
            "collect them again in float32 or bfloat16"
        )
    return _Cell(values, inside[rows], tuple(acts.families[i] for i in rows.tolist()), by_means)


def _pair_differences(cell: _Cell) -> Float[Tensor, "pair d_model"]:
    """Mean of the positive minus mean of the negative prompts of every family that has both."""
    sides: dict[str, tuple[list[int], list[int]]] = {}
    for row, (family, positive) in enumerate(zip(cell.families, cell.positive.tolist(), strict=True)):
        sides.setdefault(family, ([], []))[0 if positive else 1].append(row)
    pairs = [
        cell.values[inside].mean(dim=0) - cell.values[outside].mean(dim=0)
        for inside, outside in sides.values()
        if inside and outside
    ]
    if not pairs:
        positive, negative = cell.by_means.contrast
        raise UserError(
            f"no family has prompts of both labels {positive!r} and {negative!r}, and paired differences need "
            "them; give prompts in pairs or choose another method"
        )
    return torch.stack(pairs)
