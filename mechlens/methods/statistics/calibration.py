"""From scores to decisions and probabilities: a threshold for a false-positive rate, Platt scaling, its error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mechlens.errors import UserError, warn
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import family_weights, interval
from mechlens.settings import RESAMPLES

LARGEST = torch.finfo(torch.float32).max
"""No score of a model's activations is larger: a threshold that is would let everything pass, or nothing."""
BINS = 15
"""Bins of equal weight in the calibration error."""


@dataclass(frozen=True)
class Calibration:
    """What turns a score into a decision and a probability."""

    threshold: float
    """A score above it is positive."""
    slope: float
    intercept: float
    """The probability is 1 / (1 + exp(-(slope * score + intercept))), for equally many prompts of both classes."""
    n_positive: int
    n_negative: int
    """Prompts behind it."""

    def __post_init__(self) -> None:
        if not all(abs(value) <= LARGEST for value in (self.threshold, self.slope, self.intercept)):
            raise UserError(
                f"a threshold of {self.threshold} with slope {self.slope} and intercept {self.intercept} decides "
                "nothing; calibrate with scores that a float32 can hold"
            )

    def probability(self, scores: Float[Tensor, " prompt"]) -> Float[Tensor, " prompt"]:
        """Chance that a prompt is positive, where both classes are equally common."""
        return torch.sigmoid(self.slope * scores.double() + self.intercept)


def calibrate(
    scores: Float[Tensor, " prompt"], positive: Bool[Tensor, " prompt"], max_fpr: float | None
) -> Calibration:
    """Threshold and Platt scaling from held-out scores; `max_fpr` None leaves the threshold at 0."""
    threshold = 0.0 if max_fpr is None else fpr_threshold(scores[~positive], max_fpr)
    slope, intercept = _platt(scores, positive)
    return Calibration(threshold, slope, intercept, int(positive.sum()), int((~positive).sum()))


def fpr_threshold(negatives: Float[Tensor, " negative"], max_fpr: float) -> float:
    """The lowest threshold above which a further negative prompt scores with a chance of at most `max_fpr`.

    Split conformal (Vovk et al. 2005): the ceil((n + 1)(1 - max_fpr))-th smallest of n scores. With fewer negatives
    than 1 / max_fpr - 1 nothing so strict can be promised: the largest score is taken, with a warning.
    """
    n = len(negatives)
    rank = math.ceil((n + 1) * (1 - max_fpr) - 1e-9)
    if rank > n:
        needed = math.ceil(1 / max_fpr) - 1
        warn(
            f"{n} negative prompts can't promise a false-positive rate of {max_fpr:g}, which needs {needed}; "
            f"the threshold promises {1 / (n + 1):.2g}",
        )
    return float(negatives.double().sort().values[min(rank, n) - 1])


def _platt(scores: Float[Tensor, " prompt"], positive: Bool[Tensor, " prompt"]) -> tuple[float, float]:
    """Slope and intercept after Platt 1999, with his smoothed targets, and each class weighing one half.

    The smoothing keeps the slope finite where the scores separate the classes.
    """
    values = scores.double().numpy()
    middle, spread = float(values.mean()), float(values.std()) or 1.0
    n_up, n_down = int(positive.sum()), int((~positive).sum())
    target = np.where(positive.numpy(), (n_up + 1) / (n_up + 2), 1 / (n_down + 2))
    weight = np.where(positive.numpy(), 0.5 / n_up, 0.5 / n_down) * len(values)
    scaled = ((values - middle) / spread)[:, None]
    # A soft target is a prompt that counts a little for the other class.
    model = LogisticRegression(C=1e6, max_iter=1000, tol=1e-8)
    model.fit(
        np.concatenate([scaled, scaled]),
        np.repeat([1, 0], len(values)),
        sample_weight=np.concatenate([weight * target, weight * (1 - target)]),
    )
    slope = float(model.coef_[0, 0]) / spread
    return slope, float(model.intercept_[0]) - slope * middle


def calibration_error(
    probabilities: Float[Tensor, " prompt"],
    positive: Bool[Tensor, " prompt"],
    weights: Float[Tensor, " prompt"] | None = None,
) -> float:
    """Expected calibration error: mean |probability - share of positives| over bins of equal weight.

    Each class weighs one half in all, as the probabilities are meant. NaN where a class is empty. Few prompts a bin
    raise it by chance: also a perfectly calibrated detector has about sqrt(bins / n) / 2.
    """
    own = torch.ones(len(positive), dtype=torch.float64) if weights is None else weights.double()
    up, down = (own * positive).sum(), (own * ~positive).sum()
    if up == 0 or down == 0:
        return math.nan
    balanced = torch.where(positive, own / up, own / down) / 2
    order = probabilities.argsort(stable=True)
    share, sure, right = balanced[order], probabilities.double()[order], positive.double()[order]
    # The bin of a prompt is where the middle of its weight lies.
    bins = ((share.cumsum(0) - share / 2) * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, share * (sure - right))
    return float(gaps.abs().sum())


def calibration_error_estimate(
    probabilities: Float[Tensor, " prompt"],
    positive: Bool[Tensor, " prompt"],
    families: Sequence[str],
    seed: int,
    resamples: int = RESAMPLES,
) -> Estimate:
    """`calibration_error` with its family-bootstrap interval, widened to hold the value: resampling raises it."""
    value = calibration_error(probabilities, positive)
    if math.isnan(value):
        return Estimate.missing(len(positive))
    labels = ["positive" if flag else "negative" for flag in positive.tolist()]
    draws = family_weights(families, resamples, seed, labels)
    samples = torch.tensor([calibration_error(probabilities, positive, draw) for draw in draws], dtype=torch.float64)
    bounds = interval(samples)
    return Estimate(value, min(value, float(bounds.low)), max(value, float(bounds.high)), len(positive))
