"""Frozen readouts: a direction or a probe of one checkpoint, with its threshold and its calibration, at every cell.

Fitted and calibrated once, they are asked the same question of other checkpoints' activations: does the line still
tell the classes apart, at the same threshold, with the same meaning of its numbers?
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.directions.direction import DirectionGrid, direction_grid
from mechlens.methods.directions.methods import logistic_line
from mechlens.methods.probing.auroc_grid import contrast_part, is_positive, score_grid
from mechlens.methods.statistics.calibration import calibrate
from mechlens.methods.statistics.resample import one_thread
from mechlens.prompts.split import Split

KINDS = ("direction", "probe")
"""The mean difference, and the weight of a logistic regression on standardised activations."""


@dataclass(frozen=True)
class Readouts:
    """One line of each cell, which says positive above its threshold, and how likely that is."""

    kind: str
    lines: DirectionGrid
    thresholds: Float[Tensor, "level position"]
    """Half way between the classes' mean scores on validation prompts."""
    slopes: Float[Tensor, "level position"]
    intercepts: Float[Tensor, "level position"]
    """Platt scaling of the validation scores."""

    def probability(self, scores: Float[Tensor, "level position prompt"]) -> Float[Tensor, "level position prompt"]:
        """Chance that each prompt is positive, where both classes are equally common."""
        return torch.sigmoid(self.slopes[..., None] * scores + self.intercepts[..., None])


@one_thread()
def fit_lines(acts: Activations, contrast: tuple[str, str], split: Split, kind: str) -> DirectionGrid:
    """The line of every cell, from the training part; prompts with other labels are left out."""
    train = contrast_part(acts, split.train, contrast)
    lines = direction_grid(train, *contrast)
    return replace(lines, vectors=_probes(train, contrast), method="logistic probe") if kind == "probe" else lines


@one_thread()
def fit_readouts(acts: Activations, contrast: tuple[str, str], split: Split, kind: str) -> Readouts:
    """Lines from the training part, thresholds and calibration from the validation part."""
    lines = fit_lines(acts, contrast, split, kind)
    validation = contrast_part(acts, split.validation, contrast)
    scores, positive = score_grid(validation, lines), is_positive(validation, contrast)
    slopes, intercepts = torch.empty(2, *scores.shape[:2], dtype=torch.float64)
    for row in range(scores.shape[0]):
        for column in range(scores.shape[1]):
            found = calibrate(scores[row, column], positive, None)
            slopes[row, column], intercepts[row, column] = found.slope, found.intercept
    return Readouts(kind, lines, thresholds(lines, acts, contrast, split), slopes, intercepts)


def thresholds(
    lines: DirectionGrid, acts: Activations, contrast: tuple[str, str], split: Split
) -> Float[Tensor, "level position"]:
    """Half way between the two classes' mean scores on the validation prompts of these activations."""
    validation = contrast_part(acts, split.validation, contrast)
    scores, positive = score_grid(validation, lines), is_positive(validation, contrast)
    return (scores[..., positive].mean(dim=-1) + scores[..., ~positive].mean(dim=-1)) / 2


def _probes(train: Activations, contrast: tuple[str, str]) -> Float[Tensor, "level position d_model"]:
    """Weights in the raw space; the intercept is left to the calibration. Zero where no prompt differs."""
    positive = is_positive(train, contrast)
    weights = torch.zeros(train.values.shape[1:], dtype=torch.float64)
    for row, column, values in train.cells():
        if values.double().numpy().std(axis=0).any():
            weights[row, column], _ = logistic_line(values, positive, penalty=1.0, steps=300)
    return weights.to(train.values.dtype)


def balanced_accuracy(
    scores: Float[Tensor, "*cell prompt"],
    thresholds: Float[Tensor, "*cell"],
    positive: Bool[Tensor, " prompt"],
    weights: Float[Tensor, "resample prompt"],
) -> Float[Tensor, "*values"]:
    """Mean of the two classes' shares on their own side of the threshold, for each cell and resample."""
    above = (scores > thresholds[..., None]).double()
    up, down = weights * positive, weights * ~positive
    caught = above @ up.T / up.sum(dim=1)
    passed = (1 - above) @ down.T / down.sum(dim=1)
    return (caught + passed) / 2


def brier(
    probabilities: Float[Tensor, "*cell prompt"],
    positive: Bool[Tensor, " prompt"],
    weights: Float[Tensor, "resample prompt"],
) -> Float[Tensor, "*values"]:
    """Mean squared error of the probabilities, each class weighing one half: 0 is perfect, 0.25 knows nothing."""
    errors = (probabilities - positive.double()).square()
    up, down = weights * positive, weights * ~positive
    return (errors @ up.T / up.sum(dim=1) + errors @ down.T / down.sum(dim=1)) / 2
