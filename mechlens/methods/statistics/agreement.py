"""Do two judges say the same? Cohen's kappa with its interval and the counts behind it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sklearn.metrics import cohen_kappa_score, confusion_matrix
from torch import Tensor

from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import family_weights, with_interval
from mechlens.settings import RESAMPLES


@dataclass(frozen=True)
class Agreement:
    """Cohen's kappa of two judges, with how often each pair of verdicts occurred."""

    kappa: Estimate
    """1 is full agreement, 0 what two independent judges with these rates would reach; missing where both
    always say one and the same thing."""
    counts: pd.DataFrame
    """Rows: the first judge's verdicts; columns: the second's."""


def agreement(
    first: Sequence[str], second: Sequence[str], families: Sequence[str], seed: int, resamples: int = RESAMPLES
) -> Agreement:
    """Cohen's kappa between two judges of the same answers, bootstrapped over prompt families.

    Resamples in which kappa has no value (one verdict left) are not counted.
    """
    verdicts = sorted({*first, *second})
    if len(verdicts) < 2:
        counts = pd.DataFrame(len(first), index=verdicts, columns=verdicts)
        return Agreement(kappa=Estimate.missing(len(first)), counts=counts)
    table = confusion_matrix(list(first), list(second), labels=verdicts)
    counts = pd.DataFrame(table, index=verdicts, columns=verdicts)
    joint = np.zeros((len(first), len(verdicts), len(verdicts)))
    for row, (verdict, other) in enumerate(zip(first, second, strict=True)):
        joint[row, verdicts.index(verdict), verdicts.index(other)] = 1.0
    weights = family_weights(families, resamples, seed)
    samples = kappas(torch.einsum("rp,pab->rab", weights, torch.from_numpy(joint)))
    value = float(cohen_kappa_score(list(first), list(second), labels=verdicts))
    return Agreement(with_interval(value, samples, len(first)), counts)


def kappas(tables: Float[Tensor, "table verdict verdict"]) -> Float[Tensor, " table"]:
    """Cohen's kappa of many tables of counts at once; NaN where only one verdict occurs."""
    shares = tables / tables.sum(dim=(1, 2), keepdim=True)
    observed = shares.diagonal(dim1=1, dim2=2).sum(dim=1)
    expected = (shares.sum(dim=1) * shares.sum(dim=2)).sum(dim=1)
    chance_left = 1 - expected
    return torch.where(chance_left > 1e-12, (observed - expected) / chance_left, torch.nan)
