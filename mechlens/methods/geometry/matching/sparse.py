"""How many units of one model it takes to predict a unit of another, by L1 regularisation (Li et al. 2015)."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import lasso_path
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.geometry.matching.correlation import standardised
from mechlens.methods.geometry.similarity.similarity import require_same_prompts
from mechlens.methods.statistics.resample import family_halves

PENALTIES = tuple(np.geomspace(1.0, 1e-3, 16).tolist())
"""Shares of the penalty that leaves no unit at all, from the strongest."""


@dataclass(frozen=True, eq=False)
class SparsePrediction:
    """The L1 path of every unit of the second model; see `sparse_prediction`.

    >>> import torch
    >>> values = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
    >>> found = ml.sparse_prediction(values, values[:, [2, 0]], families=[str(i) for i in range(80)], seed=0)
    >>> found.needed(0.9).tolist()  # one unit says it all
    [1.0, 1.0]
    """

    penalties: tuple[float, ...]
    nonzeros: Float[Tensor, "second penalty"] = field(repr=False)
    """Units of the first model that are used."""
    r2: Float[Tensor, "second penalty"] = field(repr=False)
    """Explained share of the variance in the half of the prompts that wasn't fitted."""

    @property
    def best(self) -> Float[Tensor, " second"]:
        """The largest R² of every unit's path, and 0 where nothing predicts it: no unit at all has about 0."""
        return self.r2.amax(dim=1).clamp(min=0.0)

    def needed(self, share: float) -> Float[Tensor, " second"]:
        """Fewest units with which a unit has `share` of the largest R² of its path; NaN where nothing predicts it."""
        enough = (self.r2 >= share * self.r2.amax(dim=1, keepdim=True)) & (self.r2 > 0)
        fewest = torch.where(enough, self.nonzeros, torch.inf).amin(dim=1)
        return torch.where(torch.isfinite(fewest), fewest, torch.nan)


def sparse_prediction(
    first: Float[Tensor, "prompt first"], second: Float[Tensor, "other second"], families: Sequence[str], *, seed: int
) -> SparsePrediction:
    """Every unit of the second model predicted from all of the first, at penalties from the strongest to a weak one.

    Fitted on half of the families and scored on the others, so that more units don't predict better of themselves. A
    unit that is constant in the fitted half is predicted by nothing.

    >>> import torch
    >>> values = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
    >>> found = ml.sparse_prediction(values, values[:, [2, 0]], families=[str(i) for i in range(80)], seed=0)
    >>> found.needed(0.9).tolist()  # one unit says it all
    [1.0, 1.0]
    """
    require_same_prompts(first, second)
    if len(families) != len(first):
        raise UserError(f"there are {len(first)} prompts and {len(families)} families; give one for each prompt")
    fitted = family_halves(families, 1, seed)[0]
    given, asked = (standardised(side).numpy() for side in (first, second))
    inside, outside = fitted.numpy(), ~fitted.numpy()
    centre, middles = given[inside].mean(axis=0), asked[inside].mean(axis=0)
    paths = [_path(given[inside] - centre, asked[inside, k] - middles[k]) for k in range(asked.shape[1])]
    predicted = np.stack([(given[outside] - centre) @ path for path in paths])  # second, held out, penalty
    truth = (asked[outside] - middles).T[:, :, None]
    size = np.square(truth - truth.mean(axis=1, keepdims=True)).sum(axis=1)
    r2 = 1 - np.square(truth - predicted).sum(axis=1) / np.where(size > 0, size, np.inf)
    used = np.stack([np.count_nonzero(path, axis=0) for path in paths]).astype(float)
    return SparsePrediction(PENALTIES, torch.from_numpy(used), torch.from_numpy(np.where(size > 0, r2, 0.0)))


def _path(given: "np.ndarray", asked: "np.ndarray") -> "np.ndarray":
    """Weights (unit by penalty) at the penalties; zeros for a target that doesn't vary."""
    strongest = np.abs(given.T @ asked).max() / len(asked)
    if strongest == 0:
        return np.zeros((given.shape[1], len(PENALTIES)))
    with warnings.catch_warnings():
        # What the weakest penalties haven't reached yet shows in the R² of prompts that weren't fitted.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found: np.ndarray = lasso_path(given, asked, alphas=strongest * np.array(PENALTIES))[1]
    return found
