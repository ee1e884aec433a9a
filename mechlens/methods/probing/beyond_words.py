"""Read-outs that score every prompt by a fit to others; what they are worth is in `within_folds.py`.

Words, embeddings and activations are read by one reader, logistic regression, so that nothing but what is read differs.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.directions.methods import logistic_line
from mechlens.methods.probing.auroc import auroc, snap
from mechlens.methods.probing.baselines import tfidf_scores
from mechlens.methods.probing.within_folds import Folds
from mechlens.methods.statistics.resample import family_codes

PENALTY = 1.0
"""scikit-learn's C of the reader."""


def read_words(texts: Sequence[str], folds: Folds) -> Float[Tensor, "repeat prompt"]:
    """Logistic regression on TF-IDF of words, punctuation marks and pairs of them."""

    def read(fit: list[int], _: int) -> Tensor:
        fitted = [texts[i] for i in fit]
        if not any(text.strip() for text in fitted):
            return torch.zeros(len(texts))
        return tfidf_scores(fitted, folds.positive[fit], texts)

    return folds.scored(read)


def read_numbers(numbers: Float[Tensor, " prompt"], folds: Folds) -> Float[Tensor, "repeat prompt"]:
    """The numbers themselves, the side with the larger mean among the prompts fitted on counting as positive."""

    def read(fit: list[int], _: int) -> Tensor:
        own = folds.positive[fit]
        return numbers if numbers[fit][own].mean() >= numbers[fit][~own].mean() else -numbers

    return folds.scored(read)


def read_vectors(
    values: Float[Tensor, "prompt level d"], folds: Folds, levels: Sequence[Sequence[int]] | None = None
) -> Float[Tensor, "repeat prompt"]:
    """Logistic regression on standardised vectors, of the first level where none are given."""

    def read(fit: list[int], level: int) -> Tensor:
        line, _ = logistic_line(values[fit, level], folds.positive[fit], penalty=PENALTY)
        return values[:, level].double() @ line

    return folds.scored(read, levels)


def levels_of(values: Float[Tensor, "prompt level d"], folds: Folds) -> tuple[tuple[int, ...], ...]:
    """The row of the level that each fold reads, chosen on the rows that it fits on.

    That with the largest AUROC of mean differences which leave the scored prompt's family out; of equals the first.
    """
    family, _ = family_codes(folds.families)
    areas = torch.empty(values.shape[1], sum(map(len, folds.parts)), dtype=torch.float64)
    fits = [list(fold.fitted) for part in folds.parts for fold in part]
    for level, row in enumerate(values.unbind(dim=1)):
        wide = row.double() - row.double().mean(dim=0)
        products = wide @ wide.T
        for k, fit in enumerate(fits):
            areas[level, k] = _left_out_auroc(products[fit][:, fit], folds.positive[fit], family[fit])
    chosen = iter(areas.numpy().argmax(axis=0).tolist())  # NumPy promises the first of equals, torch doesn't
    return tuple(tuple(next(chosen) for _ in part) for part in folds.parts)


def _left_out_auroc(products: Float[Tensor, "n n"], positive: Bool[Tensor, " n"], family: Tensor) -> Tensor:
    others = family[:, None] != family[None, :]
    up, down = (others & positive).double(), (others & ~positive).double()
    share = up / up.sum(dim=1, keepdim=True) - down / down.sum(dim=1, keepdim=True)
    scores = (products * share).sum(dim=1)
    return auroc(snap(scores, 1e-10 * float(products.diagonal().max())), positive)
