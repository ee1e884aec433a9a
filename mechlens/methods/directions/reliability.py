"""How much of a direction is signal: split-half reliability, and cosines corrected for noise.

Two estimates of the *same* direction from 64 prompts can have cosine 0.2; no cosine between directions
means anything without the numbers of this file.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.directions.direction import cosine, members, weighted_differences
from mechlens.methods.directions.methods import MEAN_DIFFERENCE, grid_by
from mechlens.methods.statistics.resample import family_halves, one_thread

MIN_RELIABLE = 0.1
"""A direction less reliable than this is mostly noise, and dividing by its reliability gives any number."""


@one_thread()
def split_half(
    acts: Activations, positive: str, negative: str, n_splits: int, seed: int, method: str = MEAN_DIFFERENCE
) -> Float[Tensor, "level position"]:
    """Reliability of the direction of all prompts in every cell: 0 is noise, 1 is noise-free.

    Families are halved `n_splits` times; r is the mean cosine between the halves' directions, and
    2r/(1+r) the reliability of the full sample (Spearman-Brown). For isotropic noise it is
    a^2/(a^2 + 2 d sigma^2/n) with mean separation a and n prompts a class. 0 where r is negative;
    NaN where a half has no direction (identical vectors, or a class with one family).
    """
    first = family_halves(acts.families, n_splits, seed, acts.labels).double()
    inside, outside = members(acts, positive), members(acts, negative)
    if method == MEAN_DIFFERENCE:
        one = weighted_differences(acts, first * inside, first * outside)
        other = weighted_differences(acts, (1 - first) * inside, (1 - first) * outside)
    else:
        one, other = (
            torch.stack([_fitted(acts, half, positive, negative, method) for half in side])
            for side in (first.bool(), ~first.bool())
        )
    halves = cosine(one, other).nanmean(dim=0).clamp(min=0.0)
    return 2 * halves / (1 + halves)


def _fitted(
    acts: Activations, half: Bool[Tensor, " prompt"], positive: str, negative: str, method: str
) -> Float[Tensor, "level position d_model"]:
    """The directions of one half; NaN where it has none."""
    part = acts.select(half.nonzero()[:, 0])
    if not {positive, negative} <= set(part.labels):
        return torch.full(acts.values.shape[1:], torch.nan)
    return grid_by(part, positive, negative, method).vectors


def corrected_cosine(
    cosines: Float[Tensor, "*cell"],
    reliability_a: Float[Tensor, "*cell"],
    reliability_b: Float[Tensor, "*cell"],
) -> Float[Tensor, "*cell"]:
    """What the cosines would be without sampling noise: cos / sqrt(rel_a rel_b).

    Valid only where the two directions come from different prompts: shared prompts share noise, which
    inflates the cosine. It can pass 1 by chance and is not clipped. NaN where a reliability is below MIN_RELIABLE.
    """
    sound = (reliability_a >= MIN_RELIABLE) & (reliability_b >= MIN_RELIABLE)
    return torch.where(sound, cosines / (reliability_a * reliability_b).sqrt(), torch.nan)
