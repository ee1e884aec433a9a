"""Held-out AUROC of a direction at every level and position, with intervals."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations, stored_name
from mechlens.methods.directions.direction import DirectionGrid
from mechlens.methods.directions.nulls import TIE_RESOLUTION, largest_norm, refitted_scores
from mechlens.methods.probing.auroc import auroc, auroc_bounds, snap, weighted_auroc
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import Interval, family_weights, interval, one_thread


@dataclass(frozen=True)
class AurocGrid:
    """AUROC and its 95% bounds for every cell; NaN where a class was empty."""

    value: Float[Tensor, "level position"]
    low: Float[Tensor, "level position"]
    high: Float[Tensor, "level position"]
    levels: tuple[int, ...]
    positions: tuple[str, ...]
    n: int
    """Prompts scored."""
    refit: bool
    """True: the interval holds the chance in the training prompts too, the direction having been refitted
    in every resample. False: it is about the one saved direction."""
    last: str = ""
    """Name under which the last token of the prompt is stored."""

    def at(self, level: int, position: str) -> Estimate:
        """The AUROC of one level and one named position."""
        name = stored_name(position, self.last, self.positions)
        if level not in self.levels or name not in self.positions:
            raise UserError(
                f"there is no AUROC at level {level}, position {position!r}; "
                f"there are levels {list(self.levels)} and positions {list(self.positions)}"
            )
        cell = self.levels.index(level), self.positions.index(name)
        if bool(torch.isnan(self.value[cell])):
            return Estimate.missing(self.n)
        value, low, high = (float(one[cell]) for one in (self.value, self.low, self.high))
        return Estimate(value, low, high, self.n, is_auroc=True)


def score_grid(acts: Activations, grid: DirectionGrid) -> Float[Tensor, "level position prompt"]:
    """Projection of every prompt on the direction of every cell, in float64; equal vectors tie exactly.

    On the raw direction, so scores are comparable within a cell only. UserError where activations and
    directions are not of one kind.
    """
    acts.require_vectors()
    for name, one, other in (
        ("levels", acts.levels, grid.levels),
        ("positions", acts.positions, grid.positions),
        ("site", acts.site, grid.site),
        ("weight regime", acts.checkpoint.regime, grid.checkpoint.regime),
    ):
        if one != other:
            raise UserError(
                f"the activations and the directions differ in {name} ({one} and {other}); collect both alike"
            )
    scores = torch.empty(*grid.vectors.shape[:2], len(acts.ids), dtype=torch.float64)
    for row, column, values in acts.cells():
        exact = values.double()
        raw = exact @ grid.vectors[row, column].double()
        scores[row, column] = snap(raw, TIE_RESOLUTION * largest_norm(exact) ** 2)
    return scores


def contrast_part(acts: Activations, rows: tuple[int, ...], contrast: tuple[str, str]) -> Activations:
    """The activations of those rows that carry one of the contrast's two labels."""
    return acts.select([row for row in rows if acts.labels[row] in contrast])


def is_positive(acts: Activations, contrast: tuple[str, str]) -> Bool[Tensor, " prompt"]:
    """True for the prompts with the contrast's first label."""
    return torch.tensor([label == contrast[0] for label in acts.labels], dtype=torch.bool)


@one_thread()
def held_out_auroc(grid: DirectionGrid, acts: Activations, contrast: tuple[str, str]) -> AurocGrid:
    """AUROC of saved directions on prompts they never saw; the contrast may differ from the one fitted.

    Prompts with other labels are left out; every cell is missing where a class is empty. Intervals are those of
    `auroc_bounds`, the directions frozen. UserError where a prompt was used in fitting.
    """
    test = contrast_part(acts, tuple(range(len(acts.ids))), contrast)
    _require_unseen(test, grid)
    positive, scores = is_positive(test, contrast), score_grid(test, grid)
    bounds = auroc_bounds(scores, positive, test.families)
    return _summary(grid, auroc(scores, positive), bounds, test, refit=False)


@one_thread()
def refitted_auroc(
    grid: DirectionGrid, train: Activations, acts: Activations, *, seed: int, resamples: int
) -> AurocGrid:
    """As `held_out_auroc`, with the direction refitted on resampled training families each time.

    The value is that of the directions in `grid`, which must come from `train`. Refits on a resample are
    noisier than the fit on everything, so the interval leans low.
    """
    contrast = grid.contrast
    train = contrast_part(train, tuple(range(len(train.ids))), contrast)
    test = contrast_part(acts, tuple(range(len(acts.ids))), contrast)
    _require_unseen(test, grid)
    positive, fitted = is_positive(test, contrast), is_positive(train, contrast)
    drawn = family_weights(train.families, resamples, seed, train.labels)
    weights = family_weights(test.families, resamples, seed + 1, test.labels)
    samples = torch.full((len(grid.levels), len(grid.positions), resamples), torch.nan, dtype=torch.float64)
    for (row, column, fits), (*_, values) in zip(train.cells(), test.cells(), strict=True):
        scores = refitted_scores(fits, values, drawn * fitted, drawn * ~fitted)
        samples[row, column] = weighted_auroc(scores, weights * positive, weights * ~positive)
    return _summary(grid, auroc(score_grid(test, grid), positive), interval(samples), test, refit=True)


def _require_unseen(test: Activations, grid: DirectionGrid) -> None:
    seen = set(test.ids) & set(grid.train_ids)
    if seen:
        raise UserError(
            f"{len(seen)} of the {len(test.ids)} prompts to be scored were used to fit the direction "
            f"(such as {min(seen)!r}); score it on prompts held out by a split"
        )


def _summary(
    grid: DirectionGrid,
    value: Float[Tensor, "level position"],
    bounds: Interval,
    test: Activations,
    *,
    refit: bool,
) -> AurocGrid:
    return AurocGrid(
        value=value,
        low=bounds.low,
        high=bounds.high,
        levels=grid.levels,
        positions=grid.positions,
        n=len(test.ids),
        refit=refit,
        last=grid.last,
    )
