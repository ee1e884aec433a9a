"""Folds that keep families whole and classes even, so that every training prompt has a score that didn't know it."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor

from mechlens.errors import UserError

ScoreFold = Callable[[list[int], list[int]], Float[Tensor, " held_out"]]
"""Rows to fit on and rows to score -> scores of the latter."""


def held_out_scores(
    score: ScoreFold, positive: Bool[Tensor, " prompt"], families: Sequence[str], folds: int, seed: int
) -> Float[Tensor, " prompt"]:
    """Each prompt's score by a fit to the folds that don't hold its family (float64)."""
    pairs = set(zip(positive.tolist(), families, strict=True))
    n_folds = min(folds, *(sum(flag == own for own, _ in pairs) for flag in (True, False)))
    if n_folds < 2:
        raise UserError("each label needs prompts of at least 2 families, so that scores can be held out; add some")
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    scores = torch.full((len(positive),), torch.nan, dtype=torch.float64)
    for fitted, held_out in splitter.split(np.zeros(len(positive)), positive.numpy(), list(families)):
        scores[torch.from_numpy(held_out)] = score(fitted.tolist(), held_out.tolist()).double()
    return scores
