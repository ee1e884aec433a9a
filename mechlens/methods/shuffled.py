"""Directions of nothing: mean differences between classes whose labels were shuffled."""

from dataclasses import replace

from mechlens.methods.activations import Activations
from mechlens.methods.directions import Direction, mean_difference, members, weighted_differences
from mechlens.methods.resample import permuted_labels


def shuffled_like(
    acts: Activations, positive: str, negative: str, level: int, position: str, n: int, seed: int
) -> tuple[Direction, ...]:
    """`n` mean differences fitted to shuffled labels: the null of "this direction comes from these labels".

    They lie where activations vary, which random directions mostly don't. Their lengths are their own: shuffled
    labels leave some of a strong difference in the direction, and making it as long as the real one would bring
    all of that back. Labels are shuffled as in `permuted_labels`, within families where these hold both classes.
    """
    real = mean_difference(acts, positive, negative, level, position)
    rows = (members(acts, positive) | members(acts, negative)).nonzero()[:, 0]
    kept = acts.select(rows)
    cell = replace(kept, values=kept.at(level, position)[:, None, None], levels=(level,), positions=(real.position,))
    labels = permuted_labels(members(cell, positive), cell.families, n, seed)
    vectors = weighted_differences(cell, labels.double(), (~labels).double())[:, 0, 0]
    return tuple(replace(real, vector=v.to(real.vector.dtype), method="shuffled labels") for v in vectors)
