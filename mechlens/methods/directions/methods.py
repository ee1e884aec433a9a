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
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mechlens.choices import METHODS
from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations
from mechlens.methods.directions.direction import Direction, DirectionGrid, direction_grid, mean_difference, members
from mechlens.registry import required


def lda_line(
    values: Float[Tensor, "prompt d_model"], positive: Bool[Tensor, " prompt"], difference: Float[Tensor, " d_model"]
) -> Float[Tensor, " d_model"]:
    """The difference of the class means through the inverse of the shrunk covariance within the classes."""
    within = torch.cat([side - side.mean(dim=0) for side in (values[positive], values[~positive])])
    return shrunk_covariance(within).solve(difference)


def logistic_line(
    values: Float[Tensor, "prompt d_model"],
    positive: Bool[Tensor, " prompt"],
    *,
    penalty: float,
    balanced: bool = False,
    steps: int = 1000,
) -> tuple[Float[Tensor, " d_model"], float]:
    """Weight and intercept, in the raw space, of an L2 logistic regression on standardised values (float64).

    `penalty` is scikit-learn's C: the smaller, the stronger. `balanced` lets both classes weigh alike.
    """
    exact = values.double().numpy()
    scaler = StandardScaler().fit(exact)
    model = LogisticRegression(C=penalty, max_iter=steps, class_weight="balanced" if balanced else None)
    model.fit(scaler.transform(exact), positive.numpy())
    weight = torch.from_numpy(model.coef_[0] / scaler.scale_).double()
    return weight, float(model.intercept_[0] - weight @ torch.from_numpy(scaler.mean_))


@dataclass(frozen=True)
class ShrunkCovariance:
    """A covariance matrix shrunk towards a multiple of the identity, kept without ever being formed.

    Orthonormal axes span the data; every direction outside their span has the same variance.
    """

    axes: Float[Tensor, "axis d_model"]
    variances: Float[Tensor, " axis"]
    elsewhere: float

    def solve(self, vector: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
        """The inverse of the matrix times the vector."""
        inside = self.axes @ vector
        return (inside / self.variances) @ self.axes + (vector - inside @ self.axes) / self.elsewhere


def shrunk_covariance(centred: Float[Tensor, "prompt d_model"]) -> ShrunkCovariance:
    """Covariance of centred vectors, shrunk by Ledoit & Wolf's share; the identity where nothing varies."""
    n, d_model = centred.shape
    _, lengths, axes = torch.linalg.svd(centred.double(), full_matrices=False)
    real = lengths > lengths.max() * max(n, d_model) * torch.finfo(lengths.dtype).eps
    lengths, axes = lengths[real], axes[real]
    if not len(lengths):
        return ShrunkCovariance(axes, lengths, elsewhere=1.0)
    variances = lengths.square() / n
    average = float(variances.sum()) / d_model
    # Never exactly 0, so that the matrix can be inverted.
    share = max(float(ledoit_wolf_shrinkage(centred.double().numpy(), assume_centered=True)), 1e-9)
    return ShrunkCovariance(axes, (1 - share) * variances + share * average, elsewhere=share * average)


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
