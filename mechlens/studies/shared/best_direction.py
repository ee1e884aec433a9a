"""The mean difference of two classes at one position, at the level that tells them apart best."""

from dataclasses import replace

import torch

from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations, column_of
from mechlens.methods.directions.direction import Direction, direction_grid, project
from mechlens.methods.probing.auroc import auroc
from mechlens.prompts.split import split_by_family

LEAST_OF_EACH = 10
"""With fewer prompts of a class there is no direction."""


def best_direction(
    acts: Activations, positive: str, negative: str, position: str, seed: int, *, highest: int | None = None
) -> Direction | None:
    """Fitted to all prompts; the level from 1 to `highest` is chosen on three tenths of the families, by directions
    from the others. None where a class has too few prompts, or families, for that.
    """
    if min(acts.labels.count(label) for label in (positive, negative)) < LEAST_OF_EACH:
        return None
    kept = acts.select([i for i, label in enumerate(acts.labels) if label in (positive, negative)])
    try:
        split = split_by_family(kept.labels, kept.families, fractions=(0.7, 0.3, 0.0), seed=seed)
    except UserError:  # a class is of one family
        return None
    name = kept.positions[column_of(position, kept.positions, kept.last)]
    only = replace(kept, values=kept.values[:, :, kept.positions.index(name)][:, :, None], positions=(name,))
    grid = direction_grid(only.select(split.train), positive, negative)
    choose = only.select(split.validation)
    chosen = torch.tensor([label == positive for label in choose.labels])
    found = {
        level: float(auroc(project(choose.at(level, name).double(), grid.at(level, name)), chosen))
        for level in acts.levels
        if level > 0 and (highest is None or level <= highest)
    }
    best = max(found, key=lambda level: (found[level], -level))
    return direction_grid(only, positive, negative).at(best, name)
